"""The graph of a model, and where its rectifiers stand in it.

``trace`` (:mod:`layer_collapse.tracing`) turns a model into a :class:`torch.fx.GraphModule` that
shares its parameters; the functions here ask what such a graph holds. It is for analysis and
folding; counting runs in the model itself (:mod:`layer_collapse.measure`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from torch import fx, nn

from .measure.rectifiers import module_kind, rectifier_function
from .tracing import trace
from .tracing.inputs import (
    ExampleInputs,
    TraceError,
    check_traceable,
    ordered_inputs,
    owner_path,
    record_shapes,
    training_mode,
    without_cache,
)

__all__ = [
    "BATCH_NORM",
    "WEIGHTED",
    "ExampleInputs",
    "TraceError",
    "call_counts",
    "carries_data",
    "check_traceable",
    "depth",
    "live_nodes",
    "ordered_inputs",
    "owner_path",
    "reaches_output",
    "record_shapes",
    "rectifier_function",
    "rectifier_nodes",
    "shape_of",
    "submodule",
    "trace",
    "training_mode",
    "without_cache",
]

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


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's value, or None when it is not a tensor or was not recorded."""
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(shape)


def submodule(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, or None for any other node."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


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


def live_nodes(module: fx.GraphModule, without: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Nodes on the ways of data from the inputs to the output that pass none of ``without``."""
    reached: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node in without or not carries_data(node):
            continue
        if node.op == "placeholder" or any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    live: set[fx.Node] = set()
    for node in reversed(module.graph.nodes):
        if node in reached and (node.op == "output" or any(user in live for user in node.users)):
            live.add(node)
    return live


def reaches_output(module: fx.GraphModule, without: Collection[fx.Node] = ()) -> bool:
    """Whether the output still depends on each input that it depends on, without some nodes.

    The nodes are taken out together. With a rectifier taken out, a True answer means that there is
    a way around it: the network works on when that layer has become a constant. A mask of padding
    is an input too, and one that leads around most layers, so that it is not enough alone.
    """
    inputs = {node for node in live_nodes(module) if node.op == "placeholder"}
    return bool(inputs) and inputs <= live_nodes(module, without)


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
