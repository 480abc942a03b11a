"""Tracing by torch.fx: symbolic, so that one graph serves every batch and image size."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..measure.rectifiers import hides_rectifier, module_kind, rectifier_function
from .inputs import TraceError, first_line, owner_path, training_mode
from .lifting import lift_layers, liftable

_DROPOUTS = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
}


class Untraceable(TraceError):
    """What torch.fx cannot follow; ``path`` is the module in whose forward it stopped."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class _Tracer(fx.Tracer):
    """torch.fx's tracer that stops at torch's own modules, at gates and at ``leaves``."""

    def __init__(self, leaves: Collection[str] = ()) -> None:  # unpickling gives none
        super().__init__()
        self.leaves = leaves
        self.stopped_in: str | None = None

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if qualified_name in self.leaves:
            return True
        if type(module).__module__.startswith("layer_collapse.reduce."):
            return True
        leaf: bool = super().is_leaf_module(module, qualified_name)
        # a leaf hides all that is inside it: nn.TransformerEncoder its layers
        inside = module.named_modules(prefix=qualified_name) if leaf else [(qualified_name, module)]
        for path, hidden in inside:
            if reason := hides_rectifier(hidden):
                raise TraceError(
                    f"rectifier inside {path!r} ({type(hidden).__name__}) cannot be instrumented: "
                    f"the module {reason}; replace it by one that calls nn.ReLU or F.relu"
                )
        return leaf

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.stopped_in = self.stopped_in or self.path_of_module(m)  # the innermost is first
            raise


def _concrete_args(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Optional parameters of forward that are not given, with their defaults.

    Left as proxies they would answer ``is not None`` with True and trace the wrong branch.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given = {p.name for p in named[: len(args)]} | set(kwargs)
    return {p.name: p.default for p in named if p.default is not p.empty and p.name not in given}


def _drop_concrete_arguments(graph: fx.Graph, concrete: dict[str, Any]) -> None:
    """Take the fixed arguments, and fx's checks that they keep their value, out of the graph."""
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        name = str(node.target)
        if name not in concrete and name.rpartition("_")[0] not in concrete:
            continue
        for check in list(node.users):
            if all(user.target is torch._assert for user in check.users):
                for assertion in list(check.users):
                    graph.erase_node(assertion)
                graph.erase_node(check)
        if not node.users:
            graph.erase_node(node)


def chain_inplace_rectifiers(root: nn.Module, graph: fx.Graph) -> None:
    """Let what follows an in-place rectifier read its result, as it does in memory."""
    position = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        called = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        function = rectifier_function(node)
        if function is None and (called is None or module_kind(called) is None):
            continue
        name = getattr(function, "__name__", "")
        inplace = getattr(called, "inplace", False) or node.kwargs.get("inplace", False)
        if inplace or name.endswith("_"):
            source = node.all_input_nodes[0]
            for user in list(source.users):
                if position[user] > position[node]:
                    user.replace_input_with(source, node)
                    node.meta["result_ignored"] = True


def _trace_once(
    model: nn.Module, concrete: dict[str, Any], leaves: Collection[str]
) -> fx.GraphModule:
    tracer = _Tracer(leaves)
    attributes = set(vars(model))
    try:
        graph = tracer.trace(model, concrete_args=concrete or None)
    except TraceError:
        raise
    except Exception as error:
        raise Untraceable(
            f"cannot trace {type(model).__name__}: its forward has control flow or calls that "
            f"torch.fx does not follow ({first_line(error)}); move them out of forward",
            tracer.stopped_in or "",
        ) from error
    else:
        _drop_concrete_arguments(graph, concrete)
        chain_inplace_rectifiers(tracer.root, graph)
        for node in graph.nodes:
            if isinstance(node.type, str):  # annotations of the future, which fx does not pickle
                node.type = None
        return fx.GraphModule(tracer.root, graph, type(model).__name__)
    finally:
        for name in set(vars(model)) - attributes:  # tensors that forward creates: the graph's now
            delattr(model, name)


def _functional_dropouts_to_modules(
    evaluation: fx.GraphModule, training: fx.GraphModule, model: nn.Module
) -> None:
    """Give back their training switch to functional dropouts, which tracing freezes.

    Raises:
        Untraceable: the two modes run different graphs in any other way.
    """
    frozen: list[fx.Node] = []
    alike = len(evaluation.graph.nodes) == len(training.graph.nodes)
    for node, other in zip(evaluation.graph.nodes, training.graph.nodes, strict=False):
        alike = alike and (node.op, node.target) == (other.op, other.target)
        if (str(node.args), str(node.kwargs)) != (str(other.args), str(other.kwargs)):
            alike = alike and node.op == "call_function" and node.target in _DROPOUTS
            frozen.append(node)
    if not alike:
        raise Untraceable(
            f"{type(model).__name__}.forward computes something else in training than in "
            "evaluation (beyond dropout), so one graph cannot stand for both; use modules that "
            "switch by themselves"
        )
    for number, node in enumerate(frozen):
        function: Any = node.target
        arguments = inspect.signature(function).bind(*node.args, **node.kwargs).arguments
        name = f"functional_dropout_{number}"
        evaluation.add_submodule(name, _DROPOUTS[function](float(arguments.get("p", 0.5))))
        with evaluation.graph.inserting_after(node):
            replacement = evaluation.graph.call_module(name, (arguments["input"],))
        replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        evaluation.graph.erase_node(node)


def _switches(evaluation: fx.GraphModule, training: fx.GraphModule, model: nn.Module) -> set[str]:
    """Paths of modules that do nothing in evaluation but something else in training."""
    found = set()
    for graph, other in ((evaluation, training), (training, evaluation)):
        there = Counter(_description(node) for node in other.graph.nodes)
        for node in graph.graph.nodes:
            there[_description(node)] -= 1
            path = owner_path(node)
            if there[_description(node)] < 0 and path and _hands_on(model.get_submodule(path)):
                found.add(path)
    return found


def _description(node: fx.Node) -> str:
    constant = [a for a in (*node.args, *node.kwargs.values()) if not isinstance(a, fx.Node)]
    return f"{owner_path(node)} {node.op} {node.target} {constant}"


def _hands_on(module: nn.Module) -> bool:
    """Whether a module without weights gives back its very input in evaluation."""
    if any(True for _ in module.parameters()) or any(True for _ in module.children()):
        return False
    probe = torch.empty(2, 2, 2, 2, device="meta")
    try:
        with training_mode(module, False):
            return module(probe) is probe
    except Exception:
        return False


def symbolic(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], opaque: Collection[str] = ()
) -> fx.GraphModule:
    """The graph of a model's evaluation mode whose dropouts switch by themselves.

    A module that does something in training only (stochastic depth) is called as a whole, its node
    marked ``meta["identity"]``.

    Args:
        opaque: paths of modules that are called as a whole, not looked into.

    Raises:
        Untraceable: torch.fx cannot follow the forward, or training and evaluation differ.
    """
    concrete = _concrete_args(model, args, kwargs)
    switches: set[str] = set()
    while True:
        with training_mode(model, False):
            evaluation = _trace_once(model, concrete, {*opaque, *switches})
            lifted = liftable(evaluation, model)
        with training_mode(model, True):
            for path in lifted:  # as a module of torch's own it will switch by itself
                model.get_submodule(path).training = False
            training = _trace_once(model, concrete, {*opaque, *switches})
        more = _switches(evaluation, training, model) - switches
        if not more:
            break
        switches |= more
    _functional_dropouts_to_modules(evaluation, training, model)
    lift_layers(evaluation, model, lifted)
    for node in evaluation.graph.nodes:
        if node.op == "call_module" and node.target in switches:
            node.meta["identity"] = True
    return evaluation
