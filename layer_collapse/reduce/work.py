"""The model while it is being folded: a float64 graph, its original dtypes, plans and their proof.

Weights are composed in float64 all the way and rounded to the model's dtype once, at the end; every
plan is proven with its weights rounded as they will be stored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize

from ..graph import call_counts, carries_data, shape_of, submodule
from . import proof
from .holdings import remove_dead, tensors, tied, writes_into
from .proof import Call
from .report import Fold

#: What may be done where zero padding makes the merging of two convolutions inexact.
BORDERS = ("biasmap", "ring", "refuse")


class Refused(Exception):
    """A fold that is not exact, or not safe; the message is the reason."""


@dataclass
class Plan:
    """One fold, before it is proven.

    Args:
        name: the layer that changes or leaves.
        detail: what happens, for the report.
        sources: values that the changed part of the graph reads; the proof makes them random.
        target: the value that must stay the same.
        modules: new modules by path, in float64.
        becomes: nodes that leave, each with the node (or call) that takes its place.
        others: more values that must stay the same.
        arguments: new positional arguments of nodes that read less (a concatenation).
        rule: name for the report where it differs from the rule's own.
        merges: whether two layers become one, which need not be faster.
        sized: whether it holds for the spatial size of the example inputs only.
    """

    name: str
    detail: str
    sources: tuple[fx.Node, ...]
    target: fx.Node
    modules: dict[str, nn.Module] = field(default_factory=dict)
    becomes: dict[fx.Node, fx.Node | Call] = field(default_factory=dict)
    others: tuple[fx.Node, ...] = ()
    arguments: dict[fx.Node, tuple[Any, ...]] = field(default_factory=dict)
    rule: str = ""
    merges: bool = False
    sized: bool = False


class _Values(ShapeProp):
    """Notes every value that is not a tensor (sizes), for running parts of the graph alone."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if "tensor_meta" not in n.meta:
            n.meta["fold_value"] = result
        return result


class Work:
    """A graph in float64 that plans are tried on.

    Args:
        module: the graph to fold, in evaluation mode; it becomes the work's own.
        inputs: its placeholders' values, in order.
        border: what to do where zero padding makes a fold inexact: "refuse", "biasmap" or "ring".
    """

    def __init__(self, module: fx.GraphModule, inputs: list[Any], border: str = "biasmap") -> None:
        self.module = module
        self.border = border
        with torch.no_grad():
            _Values(module).propagate(*inputs)
        self.dtypes = {name: t.dtype for name, t in tensors(module).items()}
        self.tied = tied(module)
        proof.to_float64(module)
        self.version = 0  # of the graph, for what rules keep between calls
        self.cache: dict[str, tuple[int, Any]] = {}
        self.sized = False  # whether a constant was kept that fits the example's size only
        self._generator = torch.Generator().manual_seed(0)

    # What rules ask

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, or None."""
        return submodule(self.module, node)

    def obstacle(self, node: fx.Node) -> str | None:
        """Why the module that ``node`` calls must not be changed, or None."""
        path, module = str(node.target), self.called(node)
        if module is None:
            return f"{node.name!r} is not a module"
        if parametrize.is_parametrized(module):
            return f"{path!r} has a parametrisation; remove it first"
        if self.hooked(node):
            return f"{path!r} has hooks, which would not run any more; remove them first"
        if call_counts(self.module)[path] > 1:
            return f"{path!r} is shared: it is called more than once"
        for name, tensor in tensors(module).items():
            if f"{path}.{name}" in self.tied:
                return f"the {name} of {path!r} is tied to another module's"
            if type(tensor) not in (Tensor, nn.Parameter):
                return f"the {name} of {path!r} is quantised ({type(tensor).__name__})"
        for other in self.module.graph.nodes:
            if other.op == "get_attr" and str(other.target).startswith(path + "."):
                return f"{other.target!r} is also read by itself in forward"
        return None

    def hooked(self, node: fx.Node) -> bool:
        """Whether hooks sit on the module that ``node`` calls."""
        module = self.called(node)
        return module is not None and any(
            getattr(module, hooks)
            for hooks in (
                "_forward_hooks",
                "_forward_pre_hooks",
                "_backward_hooks",
                "_backward_pre_hooks",
            )
        )

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's tensor; Refused when it is not one tensor."""
        shape = shape_of(node)
        if shape is None:
            raise Refused(f"{node.name!r} is not a single tensor")
        return shape

    def known(self, node: fx.Node) -> bool:
        """Whether a node is a size or another number that the data cannot change."""
        return "fold_value" in node.meta and not carries_data(node)

    def sizes(self) -> dict[fx.Node, Any]:
        """Values of all nodes that depend on the input's shape alone."""
        return {n: n.meta["fold_value"] for n in self.module.graph.nodes if self.known(n)}

    def run(self, targets: list[fx.Node], values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """Part of the graph as it is, see :func:`proof.run_region`."""
        return proof.run_region(self.module, targets, {**self.sizes(), **values})

    # Trying a plan

    def attempt(self, rule: str, plan: Plan) -> Fold:
        """Prove ``plan`` and carry it out.

        Raises:
            Refused: it is wrong by more than the tolerance, or cannot run; nothing has changed.
        """
        self._check_in_place(plan)
        known = self.sizes()
        # In the graph's order: rules collect sources in sets, whose order differs between runs.
        values = {s: self._random(s) for s in sorted(plan.sources)} | known
        targets = [plan.target, *plan.others]
        env = proof.run_region(self.module, targets, values)
        before = [env[target] for target in targets]
        dtypes = self._stored_dtypes(plan)
        modules = {path: _rounded(m, path, dtypes) for path, m in plan.modules.items()}
        becomes = {
            node: _rounded_call(to, dtypes) if isinstance(to, Call) else to
            for node, to in plan.becomes.items()
        }
        with _arguments(plan.arguments) as accept:
            try:
                after = proof.run_region(self.module, targets, values, modules, becomes)
            except Exception as error:
                reason = proof.first_line(error)
                raise Refused(f"its folded form does not run ({reason})") from error
            max_abs, max_rel = proof.difference([after[target] for target in targets], before)
            limit = proof.tolerance(list(dtypes.values()))
            if not max_rel <= limit:
                raise Refused(f"its relative error of {max_rel:.1e} is above {limit:.0e}")
            accept()
        self._carry_out(plan, dtypes)
        for node, value in after.items():  # a narrower layer changes the shapes behind it
            if isinstance(value, Tensor) and "tensor_meta" in node.meta:
                node.meta["tensor_meta"] = node.meta["tensor_meta"]._replace(shape=value.shape)
        return Fold(plan.name, plan.rule or rule, plan.detail, max_abs, max_rel)

    def _random(self, node: fx.Node) -> Tensor:
        example = torch.empty(self.shape(node), dtype=torch.float64)
        device = next((t.device for t in tensors(self.module).values()), torch.device("cpu"))
        random: Tensor = proof.noise(example, self._generator).to(device)
        return random

    def _check_in_place(self, plan: Plan) -> None:
        """Refuse to hand a value that others still read to an operation that writes into it."""
        for node, to in plan.becomes.items():
            if not isinstance(to, fx.Node):
                continue
            others = [u for u in to.users if u is not node and u not in plan.becomes]
            fixed = to.op in ("placeholder", "get_attr")
            if (others or fixed) and any(writes_into(self.module, u, node) for u in node.users):
                raise Refused(f"{to.name!r} is used elsewhere and would be changed in place")

    def _stored_dtypes(self, plan: Plan) -> dict[str, torch.dtype]:
        """Dtype in which each tensor of the plan's modules will be stored, by its path."""
        meta = plan.target.meta.get("tensor_meta")
        new = getattr(meta, "dtype", torch.get_default_dtype())
        modules = dict(plan.modules)
        for to in plan.becomes.values():
            modules |= {c.path: c.module for c in to.chain} if isinstance(to, Call) else {}
        dtypes = {}
        for path, module in modules.items():
            beside = self.dtypes.get(f"{path}.weight", new)  # a bias that was not there before
            for name in tensors(module):
                dtypes[f"{path}.{name}"] = self.dtypes.get(f"{path}.{name}", beside)
        return dtypes

    def _carry_out(self, plan: Plan, dtypes: dict[str, torch.dtype]) -> None:
        graph = self.module.graph
        for path, module in plan.modules.items():
            self.module.set_submodule(path, module)
        for node, to in plan.becomes.items():
            if isinstance(to, Call):
                value = to.entrance
                for call in to.chain:
                    self.module.add_submodule(call.path, call.module)
                    with graph.inserting_before(node):
                        value = graph.call_module(call.path, (value,))
                    value.meta = dict(node.meta)
                to = value
            node.replace_all_uses_with(to)
        remove_dead(self.module)
        self.dtypes |= dtypes
        self.sized |= plan.sized
        self.version += 1

    def finished(self) -> fx.GraphModule:
        """The folded graph, every tensor in the dtype in which it is stored."""
        for name, tensor in tensors(self.module).items():
            dtype = self.dtypes[name]
            if tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
        for node in self.module.graph.nodes:
            node.meta.pop("fold_value", None)
        self.module.graph.lint()
        self.module.recompile()
        return self.module


@contextmanager
def _arguments(new: Mapping[fx.Node, tuple[Any, ...]]) -> Iterator[Callable[[], None]]:
    """Give nodes other arguments, and their own ones back unless what is yielded was called."""
    own = {node: node.args for node in new}
    for node, args in new.items():
        node.args = args
    try:
        yield own.clear
    finally:
        for node, args in own.items():
            node.args = args


def _rounded(module: nn.Module, path: str, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """A float64 copy whose values are those that the stored dtypes can hold."""
    module = copy.deepcopy(module)
    for name, tensor in tensors(module).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes[f"{path}.{name}"]).to(torch.float64)
    return module.eval()


def _rounded_call(call: Call, dtypes: Mapping[str, torch.dtype]) -> Call:
    below = call.source
    source = _rounded_call(below, dtypes) if isinstance(below, Call) else below
    return Call(call.path, _rounded(call.module, call.path, dtypes), source)
