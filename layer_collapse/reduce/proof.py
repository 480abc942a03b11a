"""Numeric proof: run graphs, whole or in part, in float64 and compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves, tree_map

from ..graph import ExampleInputs
from .float64 import call, wide

#: Largest relative error that a fold may have, by the dtype in which its weights are stored.
TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}
_LOWER = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = ("float", "half", "bfloat16")


class FoldError(RuntimeError):
    """A model whose folded form could not be proven equal; the message is one sentence."""


@dataclass(frozen=True)
class Call:
    """Stands for a node during a run: ``module(source)`` in place of what the node does.

    ``source`` may be another call, whose result ``module`` reads.
    """

    path: str
    module: nn.Module
    source: fx.Node | Call

    @property
    def chain(self) -> list[Call]:
        """This call and those below it, from the bottom up."""
        return [*(self.source.chain if isinstance(self.source, Call) else []), self]

    @property
    def entrance(self) -> fx.Node:
        """The node that the lowest call reads."""
        return self.source.entrance if isinstance(self.source, Call) else self.source


#: Nodes that do something else during a run: another node's value, or a call.
Becomes = Mapping[fx.Node, "fx.Node | Call"]


def tolerance(dtypes: Sequence[torch.dtype]) -> float:
    """The accepted relative error for weights of these dtypes; the coarsest one decides."""
    return max((TOLERANCE.get(dtype, 0.0) for dtype in dtypes), default=TOLERANCE[torch.float64])


def answer(model: nn.Module, inputs: ExampleInputs) -> Any:
    """What a model gives for a tensor, a sequence of positional or a mapping of keyword inputs."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*(inputs or ()))


def difference(candidate: Any, reference: Any) -> tuple[float, float]:
    """Largest absolute and relative error over all tensors of two equally built results.

    Relative: max|a - b| / max|ref| per tensor. Anything that cannot be compared (other structure,
    shape or a value that is not finite) counts as infinite.
    """
    ours, theirs = tree_leaves(candidate), tree_leaves(reference)
    if len(ours) != len(theirs):
        return math.inf, math.inf
    worst_abs = worst_rel = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(b, Tensor) or not isinstance(a, Tensor):
            equal = type(a) is type(b) and a == b
            error, scale = (0.0 if equal else math.inf), 1.0
        elif a.shape != b.shape:
            return math.inf, math.inf
        elif not b.numel():
            continue
        elif not b.is_floating_point():
            error, scale = (0.0 if torch.equal(a, b) else math.inf), 1.0
        else:
            # Identical infinities (attention masks) are equal; their difference would be NaN.
            gap = torch.where(a == b, torch.zeros_like(b), (a - b).abs())
            finite = b.abs().masked_fill(~b.isfinite(), 0.0)
            error, scale = float(gap.max()), float(finite.max())
        if math.isnan(error):
            return math.inf, math.inf
        relative = 0.0 if error == 0 else error / scale if scale else math.inf
        worst_abs, worst_rel = max(worst_abs, error), max(worst_rel, relative)
    return worst_abs, worst_rel


def has_nan(value: Any) -> bool:
    """Whether any tensor in ``value`` holds a NaN."""
    return any(isinstance(t, Tensor) and bool(t.isnan().any()) for t in tree_leaves(value))


def first_line(error: Exception) -> str:
    """The first line of an error's message, to be quoted in another one."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def doubled(value: Any) -> Any:
    """Floating-point tensors in ``value`` as float64 copies, everything else as it is."""
    return tree_map(
        lambda leaf: (
            leaf.detach().clone().to(torch.float64)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else leaf
        ),
        value,
    )


def noise(value: Any, generator: torch.Generator) -> Any:
    """``value`` with its floating-point tensors replaced by standard normal float64 ones."""
    return tree_map(
        lambda leaf: (
            torch.randn(tuple(leaf.shape), generator=generator, dtype=torch.float64).to(leaf.device)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else leaf
        ),
        value,
    )


class Float64(fx.Interpreter):
    """Runs a graph in float64, one module widened at a time; casts go to float64 as well."""

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args = map_aggregate(args, _as_float64)
        kwargs = map_aggregate(kwargs, _as_float64)
        target = "double" if n.op == "call_method" and n.target in _CASTS else n.target
        with torch.no_grad():
            result = getattr(self, n.op)(target, args, kwargs)
        # Made of no floating-point value (zeros of a size), so of the default dtype.
        lower = isinstance(result, Tensor) and result.dtype in _LOWER
        if lower and n.op in ("call_function", "call_method"):
            given = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            return result if any(leaf.is_floating_point() for leaf in given) else wide(result)
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return call(self.fetch_attr(target), args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return wide(value) if isinstance(value, Tensor) else value


def _as_float64(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOWER else value


class _Region(Float64):
    """Part of a graph, with some modules replaced."""

    def __init__(self, module: fx.GraphModule, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.replaced = modules

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.replaced:
            return call(self.replaced[target], args, kwargs)
        return super().call_module(target, args, kwargs)


def run_region(
    module: fx.GraphModule,
    targets: Sequence[fx.Node],
    values: Mapping[fx.Node, Any],
    modules: Mapping[str, nn.Module] | None = None,
    becomes: Becomes | None = None,
) -> dict[fx.Node, Any]:
    """Values of ``targets`` and of all that lies between them and the given ``values``.

    Args:
        module: a graph in evaluation mode; what it holds may have any dtype.
        targets: nodes to compute.
        values: known values; the computation does not look behind them. Tensors are copied first,
            so that operations in place cannot reach the caller's.
        modules: submodules to use instead of the graph's own, by path.
        becomes: nodes that do something else.
    """
    becomes = becomes or {}
    region = _Region(module, modules or {})
    region.env = {
        node: value.clone() if isinstance(value, Tensor) else value
        for node, value in values.items()
    }
    stack = list(targets)
    while stack:
        node = stack[-1]
        if node in region.env:
            stack.pop()
            continue
        other = becomes.get(node)
        source = other.entrance if isinstance(other, Call) else other
        needed = node.all_input_nodes if source is None else [source]
        missing = [n for n in needed if n not in region.env]
        if missing:
            stack.extend(missing)
            continue
        if isinstance(other, Call):
            value = region.env[other.entrance]
            with torch.no_grad():
                for step in other.chain:
                    value = call(step.module, [value])
            region.env[node] = value
        elif other is not None:
            region.env[node] = region.env[other]
        else:
            region.env[node] = region.run_node(node)
        stack.pop()
    return region.env
