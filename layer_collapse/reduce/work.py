"""The model while it is being folded: its graph, and the plans that are proven and carried out.

Folds compose in float64; every plan is proven with its weights as they will be stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..graph import call_counts, carries_data, shape_of, submodule
from . import proof
from .aliasing import writes_into
from .float64 import is_quantised
from .holdings import remove_dead, tensors, tied
from .latency import Stopwatch
from .plan import Plan, Refused, Slower
from .proof import Call
from .region import extracted
from .report import Fold
from .storing import Waiting, round_all, rounded, widen_small

__all__ = ["BORDERS", "Plan", "Refused", "Work"]

#: What may be done where zero padding makes the merging of two convolutions inexact.
BORDERS = ("biasmap", "ring", "refuse")


class Work:
    """A graph that plans are tried on.

    Args:
        module: the graph to fold, in evaluation mode, shapes recorded
            (:func:`layer_collapse.graph.record_shapes`); it becomes the work's own, but for the
            memory of its parameters, which is only read.
        border: what to do where zero padding makes a fold inexact: "refuse", "biasmap" or "ring".
        stopwatch: times merges, which are refused where they are slower; None: all are made.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        border: str = "biasmap",
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.module = module
        self.border = border
        self.stopwatch = stopwatch
        #: Merges to be made though slower by themselves, by the path of their last layer; with the
        #: times of the whole chain at its end. And the chains that were timed.
        self.paying: dict[str, tuple[float, float] | None] = {}
        self.chains: dict[tuple[str, ...], tuple[float, float] | None] = {}
        self._timed: dict[Any, tuple[float, float]] = {}
        held = tensors(module)
        self.dtypes = {name: t.dtype for name, t in held.items()}
        self.tied = tied(module)
        self._waiting = Waiting()
        widen_small(module)
        self.version = 0  # of the graph, for what rules keep between calls
        self.cache: dict[str, tuple[int, Any]] = {}
        self.sized = False  # whether a constant was kept that fits the example's size only
        self.fixed = False  # whether it fits that very size
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
        if is_quantised(module):
            return f"{path!r} is quantised ({type(module).__name__})"
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
        return "plain_value" in node.meta and not carries_data(node)

    def sizes(self) -> dict[fx.Node, Any]:
        """Values of all nodes that depend on the input's shape alone."""
        return {n: n.meta["plain_value"] for n in self.module.graph.nodes if self.known(n)}

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
        stored = plan.with_modules(lambda path, module: rounded(path, module, dtypes))
        with _arguments(plan.arguments) as accept:
            try:
                after = proof.run_region(
                    self.module, targets, values, stored.modules, stored.becomes
                )
            except Exception as error:
                reason = proof.first_line(error)
                raise Refused(f"its folded form does not run ({reason})") from error
            max_abs, max_rel = proof.difference([after[target] for target in targets], before)
            limit = proof.tolerance(list(dtypes.values()))
            if not max_rel <= limit:
                raise Refused(f"its relative error of {max_rel:.1e} is above {limit:.0e}")
            accept()
        times = self._times(plan, stored) if plan.merges and self.stopwatch else None
        self._carry_out(plan.with_modules(lambda path, m: self._waiting.take(path, m, dtypes)))
        self.dtypes |= dtypes
        for node, value in after.items():  # a narrower layer changes the shapes behind it
            if isinstance(value, Tensor) and "tensor_meta" in node.meta:
                node.meta["tensor_meta"] = node.meta["tensor_meta"]._replace(shape=value.shape)
        return Fold(
            plan.name, plan.rule or rule, plan.detail, max_abs, max_rel, *(times or (None, None))
        )

    @torch.no_grad()
    def _times(self, plan: Plan, stored: Plan) -> tuple[float, float] | None:
        """Milliseconds of the region apart and merged, each as it would be stored.

        Raises:
            Slower: merged takes longer, and is no part of a chain that pays.
        """
        if str(plan.target.target) in self.paying:
            return self.paying[str(plan.target.target)]

        def as_stored(path: str, module: nn.Module) -> nn.Module:
            return rounded(path, module, self.dtypes)

        sources = sorted(s for s in plan.sources if not self.known(s))
        place = (self.module, plan.target, sources, self.sizes())
        apart = extracted(*place, as_stored)
        merged = extracted(*place, as_stored, stored.modules, stored.becomes)
        # The same merge comes again in the next round of rules, with the same times.
        key = (plan.name, *((n, p.shape) for n, p in [*tensors(apart).items()]))
        if key not in self._timed:
            assert self.stopwatch is not None
            values = [self.sample(s) for s in sources]
            self._timed[key] = self.stopwatch(lambda: apart(*values), lambda: merged(*values))
        times = self._timed[key]
        if times[1] >= times[0]:
            raise Slower(f"slower: {times[1]:.3g} ms merged, {times[0]:.3g} ms apart")
        return times

    def sample(self, node: fx.Node) -> Tensor:
        """A random value of a node's shape and dtype."""
        return self._random(node).to(node.meta["tensor_meta"].dtype)

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
        calls = dict[str, nn.Module]()
        for to in plan.becomes.values():
            calls |= {c.path: c.module for c in to.chain} if isinstance(to, Call) else {}
        dtypes = {}
        for path, module in (plan.modules | calls).items():
            beside = self.dtypes.get(f"{path}.weight", new)  # a bias that was not there before
            for name in tensors(module):
                dtypes[f"{path}.{name}"] = self.dtypes.get(f"{path}.{name}", beside)
        return dtypes

    def _carry_out(self, plan: Plan) -> None:
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
        self.sized |= plan.sized
        self.fixed |= plan.sized and not plan.stepped
        self.version += 1

    def finished(self) -> fx.GraphModule:
        """The folded graph, every tensor in the dtype in which it is stored."""
        round_all(self.module, self.dtypes)
        for node in self.module.graph.nodes:
            node.meta.pop("plain_value", None)
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
