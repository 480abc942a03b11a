"""Float64 on demand: a model stays in the dtypes it is stored in; what is computed with is widened.

Folding composes and proves in float64, where a float32 model would need twice its size again. Here
one module at a time is widened, and of a large weight one block of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from .holdings import tensors

#: Elements of one weight that are float64 at a time: 8 MiB.
BLOCK = 2**20
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def wide(tensor: Tensor) -> Tensor:
    """A floating-point tensor in float64; itself where it is, and for any other dtype."""
    return tensor.detach().to(torch.float64) if tensor.is_floating_point() else tensor


def widened(value: Any) -> Any:
    """All floating-point tensors of a nested value in float64."""
    return tree_map(lambda leaf: wide(leaf) if isinstance(leaf, Tensor) else leaf, value)


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is one of torch's quantised ones, which take float32 alone."""
    return ".quantized." in type(module).__module__


def _narrowed(value: Any) -> Any:
    def narrow(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(narrow, value)


def call(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
    """``module(*args, **kwargs)`` as if it were float64; nothing of that is left behind.

    Args:
        module: weights of any dtype; a plain Linear or ungrouped convolution runs in blocks of
            rows, a plain Embedding looks up first and widens then.
    """
    kwargs = kwargs or {}
    if is_quantised(module):
        return widened(module(*_narrowed(args), **_narrowed(kwargs)))
    held = tensors(module)
    lower = {n: t for n, t in held.items() if t.is_floating_point() and t.dtype != torch.float64}
    if not lower:
        return module(*args, **kwargs)
    plain = not (module._forward_hooks or module._forward_pre_hooks or kwargs)
    if plain and type(module) is nn.Embedding and module.max_norm is None:
        return wide(module(*args))
    weight = held.get("weight")
    large = plain and weight is not None and weight.numel() > BLOCK
    if large and type(module) is nn.Linear:
        return _linear(args[0], module.weight, module.bias)
    if large and type(module) in _CONV and module.groups == 1:
        return _convolution(args[0], module)
    values = {name: wide(tensor) for name, tensor in lower.items()}
    return functional_call(module, values, tuple(args), dict(kwargs))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Made first: small results between large blocks would keep the allocator from reusing them.
    out = x.new_empty(*x.shape[:-1], len(weight))
    for rows in blocks(weight):
        out[..., rows] = F.linear(x, wide(weight[rows]))
    return out if bias is None else out.add_(wide(bias))


def _convolution(x: Tensor, conv: Any) -> Tensor:
    """Some output channels at a time; padding of any mode stays the layer's own business."""
    out: Tensor | None = None
    dim = 1 - conv.weight.ndim  # of the channels: [N, C, ...] or [C, ...]
    for rows in blocks(conv.weight):
        some = conv._conv_forward(x, wide(conv.weight[rows]), None)
        if out is None:
            shape = list(some.shape)
            shape[dim] = len(conv.weight)
            out = some.new_empty(shape)
        out.narrow(dim, rows.start, some.shape[dim]).copy_(some)
    assert out is not None
    if conv.bias is not None:
        out += wide(conv.bias).view(-1, *[1] * (conv.weight.ndim - 2))
    return out


def blocks(weight: Tensor) -> Iterator[slice]:
    """Slices of rows that hold at most ``BLOCK`` elements each (or one row)."""
    return _slices(len(weight), math.prod(weight.shape[1:]))


def _slices(number: int, size: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(size, 1))
    return (slice(start, min(start + step, number)) for start in range(0, number, step))


def parts(places: Tensor, size: int) -> Iterator[Tensor]:
    """Indices of rows of ``size`` elements each, as many at a time as a block holds."""
    return (places[rows] for rows in _slices(len(places), size))


def by_rows(weight: Tensor, compute: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """A weight of the same shape, computed from ``weight`` by rows.

    Args:
        compute: from some rows in float64, and which they are, to the new ones.

    Returns:
        In float64; of more than ``BLOCK`` elements in the dtype of ``weight``.
    """
    if weight.numel() <= BLOCK:
        return compute(wide(weight), slice(0, len(weight)))
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for rows in blocks(weight):
        out[rows] = compute(wide(weight[rows]), rows)
    return out


def product(outer: Tensor, inner: Tensor) -> Tensor:
    """``outer @ inner``, two matrices, computed in float64 block by block.

    Returns:
        In float64; of more than ``BLOCK`` elements in the dtype of ``outer``.
    """
    shape = (outer.shape[0], inner.shape[1])
    large = math.prod(shape) > BLOCK
    dtype = outer.dtype if large else torch.float64
    out = torch.empty(shape, dtype=dtype, device=outer.device)
    for rows in blocks(outer):
        some = wide(outer[rows])
        for columns in _slices(inner.shape[1], max(inner.shape[0], len(some))):
            out[rows, columns] = some @ wide(inner[:, columns])
    return out
