"""Batch norms that leave their work to the rectifier behind them, so that one op does both.

A paired batch norm still runs where the model calls it, but only hands its input on as a
:class:`Pending` tensor. The counting rectifier takes that and runs the fused op. Any other use of
the tensor is an error that says so: nothing is computed from a value that is not there.

Where the op does not apply (another device or dtype, torch.compile, forward-mode differentiation,
a mask of valid positions, hooks that want to see the value) the batch norm does its own work.
Under torch.compile there is nothing to gain: the compiler fuses the two by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from ..graph import submodule
from ..ops.batch_norm import FUSED_KINDS, Norm, bn_rectify
from .rectifiers import Call
from .sites import Site, source_of

if TYPE_CHECKING:
    from .taps import Counter, Shared

#: Attribute of a paired batch norm that holds its :class:`Pair`.
PAIR = "_layer_collapse_pair"

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CHANGED = (
    "control flow changed since the model was traced; track it with fuse_bn=False or with "
    "example_inputs that take the same path"
)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass
class Pair:
    """A batch norm and the site of the one rectifier call that reads it."""

    norm: str  # path of the batch norm
    counter: Counter
    shared: Shared
    modules: tuple[nn.Module, ...]  # whose hooks would see the value in between

    def __str__(self) -> str:
        return f"batch norm {self.norm!r} is fused with rectifier {self.counter.site.name!r}"


@dataclass
class Work:
    """What a batch norm leaves to its rectifier."""

    x: Tensor
    norm: Norm
    pair: Pair
    recording: bool  # whether gradients are recorded where the batch norm was called


class Pending(Tensor):
    """The result of a batch norm that its rectifier will compute; only its shape is known yet."""

    work: Work

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        values = [*args, *(kwargs or {}).values()]
        values += [v for value in values if isinstance(value, list | tuple) for v in value]
        owners = [v.work.pair for v in values if isinstance(v, Pending)]
        raise RuntimeError(
            f"{owners[0] if owners else 'a fused batch norm'}, but "
            f"{getattr(func, '__name__', func)!r} reads what lies between them: {_CHANGED}"
        )


_METADATA = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    *(
        getattr(Tensor, name).__get__  # type: ignore[attr-defined]
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_sparse")
    ),
}


def find_pairs(
    graph: fx.GraphModule, sites: list[Site], model: nn.Module
) -> dict[str, tuple[str, tuple[nn.Module, ...]]]:
    """Pairs of a batch norm and a rectifier that reads it and is its only reader.

    Both must be called in the same forward, the batch norm once, and nobody may look at what lies
    between them: not even by ignoring the result of an in-place rectifier and reading its input.

    Returns:
        Name of the rectifier's site -> (path of the batch norm, the modules of the two).
    """
    calls: dict[int, int] = {}
    for node in graph.graph.nodes:
        if (module := submodule(graph, node)) is not None:
            calls[id(module)] = calls.get(id(module), 0) + 1
    nodes = {node.name: node for node in graph.graph.nodes}
    pairs: dict[str, tuple[str, tuple[nn.Module, ...]]] = {}
    for site in sites:
        node = nodes[site.node]
        before = node.all_input_nodes[0]
        norm = submodule(graph, before)
        if (
            not isinstance(norm, _NORMS)
            or type(norm) not in _NORMS
            or model.get_submodule(str(before.target)) is not norm  # a function in the forward
            or site.kind.name not in FUSED_KINDS
            or calls[id(norm)] != 1
            or len(before.users) != 1
            or node.meta.get("result_ignored")
            or _owner(before) != _owner(node)
            or site.split is not None
            or site.channel_dim != 1
            or site.neurons != norm.num_features
            or "forward" in vars(norm)
        ):
            continue
        source, functional = source_of(node)
        modules: tuple[nn.Module, ...] = (norm,)
        if not functional:
            modules = (norm, model.get_submodule(source))
        if not _watched(modules):
            pairs[site.name] = (str(before.target), modules)
    return pairs


def _owner(node: fx.Node) -> str:
    """Which call of which module makes this call."""
    stack = list(node.meta.get("nn_module_stack") or {})
    if node.op == "call_module":
        stack = stack[:-1]
    return str(stack[-1]) if stack else ""


def _watched(modules: tuple[nn.Module, ...]) -> bool:
    return any(getattr(module, name) for module in modules for name in _HOOKS)


def _batch_norm_call(norm: Any) -> Norm:
    """What ``nn.BatchNorm`` passes to ``F.batch_norm``; the batch is counted on the way."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    tracks = not norm.training or norm.track_running_stats
    training = norm.training or (norm.running_mean is None and norm.running_var is None)
    return Norm(
        norm.running_mean if tracks else None,
        norm.running_var if tracks else None,
        norm.weight,
        norm.bias,
        training,
        momentum,
        norm.eps,
    )


def _fits(norm: Any, x: Tensor, pair: Pair) -> bool:
    """Whether the fused op does exactly what the batch norm and the rectifier would do to x."""
    if (
        torch.compiler.is_compiling()
        or not x.is_cpu
        or type(x) not in (Tensor, nn.Parameter)
        or x.dtype not in _DTYPES
        or forward_ad._current_level >= 0
        or pair.shared.valid is not None
        or _watched(pair.modules)
        or nn.modules.module._has_any_global_hook()
    ):
        return False
    if x.dim() < 2 or x.shape[1] != norm.num_features or x.numel() <= x.shape[1]:
        return False  # torch says what is wrong, or does what it does with one value per channel
    tensors = (
        *norm._parameters.values(),
        norm._buffers["running_mean"],
        norm._buffers["running_var"],
    )
    numbers = [n for n in tensors if n is not None]
    dtypes = {n.dtype for n in numbers}
    allowed = [{x.dtype}] if x.dtype == torch.float64 else [{x.dtype}, {torch.float32}]
    return (not dtypes or dtypes in allowed) and all(
        n.is_cpu and n.is_contiguous() for n in numbers
    )


_paired_classes: dict[type[nn.Module], type[nn.Module]] = {}


def paired_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a batch norm that leaves the work to its rectifier."""
    if original not in _paired_classes:

        def forward(self: Any, input: Tensor) -> Tensor:
            pair: Pair = getattr(self, PAIR)
            if not _fits(self, input, pair):
                return original.forward(self, input)  # type: ignore[no-any-return]
            self._check_input_dim(input)
            pending: Pending = Tensor._make_subclass(Pending, input)
            pending.work = Work(input, _batch_norm_call(self), pair, torch.is_grad_enabled())
            return pending

        _paired_classes[original] = type(original.__name__, (original,), {"forward": forward})
    return _paired_classes[original]


def take_pending(call: Call, counter: Counter | None) -> Tensor:
    """Run the fused op for a rectifier call whose input is pending.

    Args:
        call: ``call.x`` is a :class:`Pending`.
        counter: of the site that this call was traced as; None in a replay, where any will do
            because nothing is counted.

    Raises:
        RuntimeError: another rectifier than the traced one got the value.
    """
    pending: Any = call.x
    work: Work = pending.work
    expected = work.pair.counter
    kind = expected.site.kind
    if (counter is not None and counter is not expected) or call.kind.code != kind.code:
        got = call.kind.name if counter is None else repr(counter.site.name)
        raise RuntimeError(f"{work.pair}, but its result reached {got}: {_CHANGED}")
    if work.recording != torch.is_grad_enabled():
        raise RuntimeError(
            f"{work.pair}: gradients must be recorded for both or for neither; do not end a "
            "checkpoint or a no_grad block between them, or track the model with fuse_bn=False"
        )
    return bn_rectify(replace(call, x=work.x), work.norm, expected.ledger)
