"""The graph of a model, and where its rectifiers stand in it.

``trace`` turns a model into a :class:`torch.fx.GraphModule` that shares its parameters, ``sites``
lists every rectifier call with the layer that feeds it and the dim its neurons lie on. The graph is
for analysis and folding; counting runs in the model itself (:mod:`layer_collapse.measure`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from .measure.rectifiers import FUNCTIONS, METHODS, hides_rectifier, module_kind

#: Modules with weights that map channels to channels: what "depth" counts.
WEIGHTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_DROPOUTS = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
}

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any] | None


class TraceError(RuntimeError):
    """A model, or a rectifier in it, that cannot be analysed; the message is one sentence."""


class _Tracer(fx.Tracer):
    """torch.fx's tracer that stops at torch's own modules and at this package's gates."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
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


@contextmanager
def training_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    """Every module of ``model`` in the given mode; afterwards each is as it was."""
    before = {module: module.training for module in model.modules()}
    model.train(mode)
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


def _bind(
    model: nn.Module, example_inputs: ExampleInputs
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs), {}


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


def _chain_inplace_rectifiers(root: nn.Module, graph: fx.Graph) -> None:
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


def _trace_once(model: nn.Module, concrete: dict[str, Any]) -> fx.GraphModule:
    tracer = _Tracer()
    attributes = set(vars(model))
    try:
        graph = tracer.trace(model, concrete_args=concrete or None)
    except TraceError:
        raise
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise TraceError(
            f"cannot trace {type(model).__name__}: its forward has control flow or calls that "
            f"torch.fx does not follow ({first_line}); move them out of forward"
        ) from error
    else:
        _drop_concrete_arguments(graph, concrete)
        _chain_inplace_rectifiers(tracer.root, graph)
        return fx.GraphModule(tracer.root, graph, type(model).__name__)
    finally:
        for name in set(vars(model)) - attributes:  # tensors that forward creates: the graph's now
            delattr(model, name)


def _functional_dropouts_to_modules(
    evaluation: fx.GraphModule, training: fx.GraphModule, model: nn.Module
) -> None:
    """Give back their training switch to functional dropouts, which tracing freezes.

    Raises:
        TraceError: the two modes run different graphs in any other way.
    """
    frozen: list[fx.Node] = []
    alike = len(evaluation.graph.nodes) == len(training.graph.nodes)
    for node, other in zip(evaluation.graph.nodes, training.graph.nodes, strict=False):
        alike = alike and (node.op, node.target) == (other.op, other.target)
        if (str(node.args), str(node.kwargs)) != (str(other.args), str(other.kwargs)):
            alike = alike and node.op == "call_function" and node.target in _DROPOUTS
            frozen.append(node)
    if not alike:
        raise TraceError(
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


def trace(model: nn.Module, example_inputs: ExampleInputs = None) -> fx.GraphModule:
    """Trace a model into a graph whose modules and parameters are the model's own.

    Args:
        model: any traceable module, in any mode; it is left as it is.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments. With
            them, the shape of every value is known (``node.meta["tensor_meta"]``).

    Raises:
        TraceError: torch.fx cannot follow the forward, or training and evaluation differ in more
            than dropout.
    """
    args, kwargs = _bind(model, example_inputs)
    concrete = _concrete_args(model, args, kwargs)
    with training_mode(model, True):
        in_training = _trace_once(model, concrete)
    with training_mode(model, False):
        module = _trace_once(model, concrete)
        _functional_dropouts_to_modules(module, in_training, model)
        module.graph.lint()
        module.recompile()
        if example_inputs is not None:
            record_shapes(module, example_inputs)
    for path, submodule in module.named_modules():  # GraphModule.train() reaches what is its own
        if path == "" or path.startswith("functional_dropout_"):
            submodule.training = model.training
    return module


def ordered_inputs(module: fx.GraphModule, example_inputs: ExampleInputs) -> list[Any]:
    """Example inputs in the order of the graph's placeholders."""
    args, kwargs = _bind(module, example_inputs)
    names = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    return [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]


class _Shapes(fx.Interpreter):
    """torch's ShapeProp, but for the traceback that it prints where the model does not run."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        tensors = []

        def described(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            tensors.append(value)
            return _extract_tensor_metadata(value)

        meta = map_aggregate(result, described)
        if tensors:
            n.meta["tensor_meta"] = meta
        return result


def record_shapes(module: fx.GraphModule, example_inputs: ExampleInputs) -> None:
    """Run ``module`` once in evaluation mode and note every value's shape in the graph."""
    ordered = ordered_inputs(module, example_inputs)
    try:
        with torch.no_grad(), training_mode(module, False):
            _Shapes(module).run(*ordered)
    except Exception as error:
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise TraceError(
            f"the model does not run on the example inputs ({first_line}); pass inputs of the "
            "shapes and dtypes that the model expects"
        ) from error


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's value, or None when it is not a tensor or was not recorded."""
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(shape)


def submodule(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, or None for any other node."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def owner_path(node: fx.Node) -> str:
    """Path of the module in whose forward this node stands ("" for the root)."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]) if paths else ""


def rectifier_function(node: fx.Node) -> Any | None:
    """The function that a functional rectifier node calls, or None for any other node."""
    if node.op == "call_function" and node.target in FUNCTIONS:
        return node.target
    if node.op == "call_method" and node.target in METHODS:
        return METHODS[str(node.target)]
    return None


def rectifier_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """Nodes that call one of the seven rectifiers, in the order of execution."""
    found = []
    for node in module.graph.nodes:
        called = submodule(module, node)
        is_module = called is not None and module_kind(called) is not None
        if is_module or rectifier_function(node) is not None:
            found.append(node)
    return found


_NOT_DATA = ("size", "dim", "numel", "stride")


def carries_data(node: fx.Node) -> bool:
    """Whether a node's value depends on its inputs' elements and not on their shape alone."""
    if node.op == "call_method":
        return node.target not in _NOT_DATA
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] not in ("shape", "ndim", "dtype", "device")
    return True


def reaches_output(module: fx.GraphModule, without: fx.Node | None = None) -> bool:
    """Whether data flows from an input to the output when one node is taken out.

    With ``without`` a rectifier, a True answer means that there is a way around it: the network
    still depends on its input when that layer has become a constant.
    """
    reached: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node is without or not carries_data(node):
            continue
        if node.op == "placeholder" or any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return any(node.op == "output" and node in reached for node in module.graph.nodes)


def depth(module: fx.GraphModule) -> int:
    """Longest path of weighted layers (linear and convolutional) from input to output."""
    longest: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        above = max((longest[source] for source in node.all_input_nodes), default=0)
        called = submodule(module, node)
        # A module that computes several layers in a row says how many.
        longest[node] = above + getattr(called, "depth", int(isinstance(called, WEIGHTED)))
    return max(longest.values(), default=0)


def call_counts(module: fx.GraphModule) -> Counter[str]:
    """How often each submodule is called in one forward pass."""
    return Counter(str(n.target) for n in module.graph.nodes if n.op == "call_module")
