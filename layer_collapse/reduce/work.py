"""The model while it is being folded: its graph, plans and their proof.

Large weights (rank 2 and more) stay in the dtype they are stored in, those that no fold touches in
the very memory of the user's model; all other tensors are float64. Folds compose in float64. What
they give stays so, to be rounded once at the end, up to half the model's size together; beyond that
every fold rounds what it gives. Every plan is proven with its weights as they will be stored.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize

from ..graph import call_counts, carries_data, shape_of, submodule
from . import proof
from .float64 import wide
from .holdings import like, put, remove_dead, sharing_copy, tensors, tied, writes_into
from .proof import Call
from .report import Fold


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
        modules: new modules by path; what is new in them is float64.
        becomes: nodes that leave, each with the node (or call) that takes its place.
        rule: name for the report where it differs from the rule's own.
        merges: whether two weighted layers become one, which need not be faster: timed on request.
    """

    name: str
    detail: str
    sources: tuple[fx.Node, ...]
    target: fx.Node
    modules: dict[str, nn.Module] = field(default_factory=dict)
    becomes: dict[fx.Node, fx.Node | Call] = field(default_factory=dict)
    rule: str = ""
    merges: bool = False


class _Values(ShapeProp):
    """Notes every value that is not a tensor (sizes), for running parts of the graph alone."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if "tensor_meta" not in n.meta:
            n.meta["fold_value"] = result
        return result


class Work:
    """A graph that plans are tried on.

    Args:
        module: the graph to fold, in evaluation mode; it becomes the work's own, but for the memory
            of its parameters, which is only read.
        inputs: its placeholders' values, in order.
        budget: bytes of large weights that may wait in float64; half the model's by default.
    """

    def __init__(
        self, module: fx.GraphModule, inputs: list[Any], *, budget: int | None = None
    ) -> None:
        self.module = module
        with torch.no_grad():
            _Values(module).propagate(*inputs)
        held = tensors(module)
        self.dtypes = {name: t.dtype for name, t in held.items()}
        self.tied = tied(module)
        self._budget = sum(t.nbytes for t in held.values()) // 2 if budget is None else budget
        self._unrounded = weakref.WeakSet[nn.Module]()
        _widen_small(module)
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
        calls, read = self._uses()
        if calls[path] > 1:
            return f"{path!r} is shared: it is called more than once"
        for name, tensor in tensors(module).items():
            if f"{path}.{name}" in self.tied:
                return f"the {name} of {path!r} is tied to another module's"
            if type(tensor) not in (Tensor, nn.Parameter):
                return f"the {name} of {path!r} is quantised ({type(tensor).__name__})"
        if path in read:
            return f"{read[path]!r} is also read by itself in forward"
        return None

    def _uses(self) -> tuple[Counter[str], dict[str, str]]:
        """How often modules are called, and modules whose tensors forward reads by themselves."""
        version, uses = self.cache.get("uses", (-1, None))
        if uses is None or version != self.version:
            read = dict[str, str]()
            for node in self.module.graph.nodes:
                parts = str(node.target).split(".") if node.op == "get_attr" else []
                for length in range(1, len(parts)):
                    read.setdefault(".".join(parts[:length]), str(node.target))
            uses = call_counts(self.module), read
            self.cache["uses"] = (self.version, uses)
        return uses

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
        before = proof.run_region(self.module, [plan.target], values)[plan.target]
        dtypes = self._stored_dtypes(plan)
        stored = _mapped(plan, lambda path, module: rounded(module, path, dtypes))
        try:
            after = proof.run_region(
                self.module, [plan.target], values, stored.modules, stored.becomes
            )
        except Exception as error:
            raise Refused(f"its folded form does not run ({proof.first_line(error)})") from error
        max_abs, max_rel = proof.difference(after[plan.target], before)
        limit = proof.tolerance(list(dtypes.values()))
        if not max_rel <= limit:
            raise Refused(f"its relative error of {max_rel:.1e} is above {limit:.0e}")
        self._carry_out(_mapped(plan, lambda path, module: self._kept(module, path, dtypes)))
        self.dtypes |= dtypes
        for node, value in after.items():  # a narrower layer changes the shapes behind it
            if isinstance(value, Tensor) and "tensor_meta" in node.meta:
                node.meta["tensor_meta"] = node.meta["tensor_meta"]._replace(shape=value.shape)
        return Fold(plan.name, plan.rule or rule, plan.detail, max_abs, max_rel)

    def _random(self, node: fx.Node) -> Tensor:
        example = torch.empty(self.shape(node), dtype=torch.float64)
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
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
        calls = {to.path: to.module for to in plan.becomes.values() if isinstance(to, Call)}
        dtypes = {}
        for path, module in (plan.modules | calls).items():
            beside = self.dtypes.get(f"{path}.weight", new)  # a bias that was not there before
            for name in tensors(module):
                dtypes[f"{path}.{name}"] = self.dtypes.get(f"{path}.{name}", beside)
        return dtypes

    def _kept(self, module: nn.Module, path: str, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
        """The module as it waits for further folds: not rounded while the budget lasts."""
        waiting = sum(_wide_bytes(other) for other in self._unrounded)
        if waiting + _wide_bytes(module) > self._budget:
            module = rounded(module, path, dtypes)
        _widen_small(module)
        self._unrounded.add(module)
        return module.eval()

    def _carry_out(self, plan: Plan) -> None:
        graph = self.module.graph
        for path, module in plan.modules.items():
            self.module.set_submodule(path, module)
        for node, to in plan.becomes.items():
            if isinstance(to, Call):
                self.module.add_submodule(to.path, to.module)
                with graph.inserting_before(node):
                    call = graph.call_module(to.path, (to.source,))
                call.meta = dict(node.meta)
                to = call
            node.replace_all_uses_with(to)
        remove_dead(self.module)
        self.version += 1

    def finished(self) -> fx.GraphModule:
        """The folded graph, every tensor in the dtype in which it is stored."""
        for name, tensor in tensors(self.module).items():
            dtype = self.dtypes[name]
            if tensor.dtype != dtype:
                put(self.module, name, like(tensor, tensor.detach().to(dtype)))
        for node in self.module.graph.nodes:
            node.meta.pop("fold_value", None)
        self.module.graph.lint()
        self.module.recompile()
        return self.module


def _mapped(plan: Plan, change: Callable[[str, nn.Module], nn.Module]) -> Plan:
    """The plan with all its new modules changed."""
    modules = {path: change(path, module) for path, module in plan.modules.items()}
    becomes = {
        node: Call(to.path, change(to.path, to.module), to.source) if isinstance(to, Call) else to
        for node, to in plan.becomes.items()
    }
    return replace(plan, modules=modules, becomes=becomes)


def rounded(module: nn.Module, path: str, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """A module as it will be stored; what has its dtype already is shared with ``module``."""
    module = sharing_copy(module)
    for name, tensor in tensors(module).items():
        dtype = dtypes.get(f"{path}.{name}", tensor.dtype)
        if tensor.dtype != dtype:
            put(module, name, like(tensor, tensor.detach().to(dtype)))
    return module.eval()


def _widen_small(module: nn.Module) -> None:
    """Buffers and parameters of rank 0 and 1 to float64, in objects of their own."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    made: dict[int, Tensor] = {}
    for name, tensor in tensors(module).items():
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()
        if plain and (tensor.ndim < 2 or name in buffers):
            new = made.setdefault(id(tensor), like(tensor, wide(tensor)))
            put(module, name, new)


def _wide_bytes(module: nn.Module) -> int:
    """Bytes of the large weights that are float64."""
    large = (p for p in module.parameters() if p.ndim >= 2 and p.dtype == torch.float64)
    return sum(p.nbytes for p in large)
