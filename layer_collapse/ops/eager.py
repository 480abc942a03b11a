"""The way past the dispatcher: what a small tensor's rectifier costs in eager mode.

A call of a custom op costs about 3 us and an ``autograd.Function`` 10 us more per training step,
several times what torch takes for all of a small rectifier. Plain CPU tensors in eager mode
therefore hand their memory straight to the loops. Where a gradient is needed and the tensor is
small, the signs are counted first and torch's own rectifier, whose autograd is native, reads x
again from the cache; a large tensor is worth the fused op. Under ``torch.compile``, function
transforms, modes and tracing there is no shortcut: only ops are seen there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C
from ..measure.rectifiers import Kind

#: Elements from which reading x a second time costs more than an autograd.Function.
_FUSED_FROM = 1 << 18
#: ScalarType codes of the dtypes that the loops take.
CODES = {torch.float32: 6, torch.float64: 7, torch.float16: 5, torch.bfloat16: 15}
#: Counts like the kinds with three counters and leaves the output to torch.
_COUNT_ONLY = 4

_NATIVE: dict[str, Callable[..., Tensor]] = {
    "relu": lambda x, slope: torch.relu(x),
    "relu6": lambda x, slope: F.relu6(x),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "gelu": lambda x, slope: F.gelu(x),
    "gelu_tanh": lambda x, slope: F.gelu(x, approximate="tanh"),
    "silu": lambda x, slope: F.silu(x),
    "hardswish": lambda x, slope: F.hardswish(x),
}
_NATIVE_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "relu": lambda x, slope: x.relu_(),
    "relu6": lambda x, slope: F.relu6(x, inplace=True),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope, inplace=True),
    "silu": lambda x, slope: F.silu(x, inplace=True),
    "hardswish": lambda x, slope: F.hardswish(x, inplace=True),
}


def is_unobserved() -> bool:
    """Whether nothing but this process's eager mode sees the calls that are made now."""
    return (
        forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def rectify_eager(
    kind: Kind, x: Any, ledger: Tensor, channels: int, channel_dim: int, slope: float, inplace: bool
) -> Tensor | None:
    """``rectify`` where all positions count, or None, with nothing done, where it takes the op.

    Args:
        x: whatever was passed as the rectifier's input.
        ledger: of ``kind`` and ``channels``.
    """
    native = (_NATIVE_IN_PLACE if inplace else _NATIVE).get(kind.name)
    if native is None or not ledger.is_cpu or type(x) is not Tensor or not x.is_cpu:
        return None
    if x.dtype not in CODES or not is_unobserved():
        return None
    contiguous = x.is_contiguous()
    if not contiguous and not (
        channel_dim == 1 and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return None
    smooth = kind.name in ("gelu", "gelu_tanh", "silu")
    fused = not (smooth or (x.requires_grad and torch.is_grad_enabled()))
    if not (fused or smooth or x.numel() < _FUSED_FROM):
        return None
    y = x
    if fused and not inplace and contiguous and kind.name != "relu6":
        # torch's strides: see empty_result in csrc/cpu/rectify.cpp
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
    elif (fused and not inplace) or (not fused and kind.rows > 3):
        y = torch.empty_like(x)  # if not fused, only the counters are wanted
    counted = _C.rectify_memory(
        ledger.data_ptr(),
        channels,
        kind.code if fused or kind.rows > 3 else _COUNT_ONLY,
        slope,
        x.data_ptr(),
        y.data_ptr(),
        x.shape,
        channel_dim,
        CODES[x.dtype],
        not contiguous,
    )
    if not counted:
        return None
    if y is x and fused and not x.is_inference():
        torch.autograd.graph.increment_version(x)
    return y if fused else native(x, slope)
