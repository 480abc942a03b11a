"""Functional layers back into modules: ``F.batch_norm(x, self.running_mean, ...)`` as a BatchNorm.

Subclasses of torch's layers with a forward of their own (a batch norm with its activation inside)
and exported graphs call functions on a module's parameters. Where those functions are a layer of
torch, a plain one takes the module's place: same path, same parameters, so that fold rules see it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
#: Parameters of the functions that are layers, in order.
_PARAMETERS: Mapping[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.conv1d: _CONV,
    F.conv2d: _CONV,
    F.conv3d: _CONV,
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.batch_norm: (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    ),
}
_CONVOLUTIONS: Mapping[Any, Any] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _arguments(node: fx.Node) -> dict[str, Any] | None:
    """Arguments by name; None where the node is no layer."""
    if node.op != "call_function" or node.target not in _PARAMETERS:
        return None
    names = _PARAMETERS[node.target]
    if len(node.args) > len(names) or set(node.kwargs) - set(names):
        return None
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _owner(arguments: dict[str, Any]) -> str | None:
    """Path of the module whose tensors of these names a functional layer is given, or None."""
    paths = set()
    for name in _TENSORS:
        value = arguments.get(name)
        if value is None:
            continue
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        path, _, attribute = str(value.target).rpartition(".")
        if attribute != name:
            return None
        paths.add(path)
    return paths.pop() if len(paths) == 1 else None


def _plain(node: fx.Node, arguments: dict[str, Any], owner: nn.Module) -> nn.Module | None:
    """An empty module of torch's own that computes what the node does, or None."""
    weight = owner.weight
    numbers = {k: v for k, v in arguments.items() if k not in (*_TENSORS, "input")}
    if any(isinstance(leaf, fx.Node) for value in numbers.values() for leaf in _leaves(value)):
        return None
    bias = arguments.get("bias") is not None
    if node.target is F.batch_norm:
        kind = next((k for k in _BATCH_NORMS if isinstance(owner, k)), None)
        if kind is None or numbers.get("training", False) or arguments["running_mean"] is None:
            return None
        affine = arguments.get("weight") is not None
        if affine != bias or numbers.get("eps", 1e-5) != owner.eps:
            return None
        return kind(owner.num_features, owner.eps, owner.momentum, affine, True)  # type: ignore[arg-type]
    if not isinstance(weight, Tensor):
        return None
    if node.target is F.linear:
        return nn.Linear(weight.shape[1], weight.shape[0], bias)
    if node.target is F.layer_norm:
        shape = tuple(numbers["normalized_shape"])
        return nn.LayerNorm(shape, numbers.get("eps", 1e-5), True, bias)
    groups, padding = numbers.get("groups", 1), numbers.get("padding", 0)
    return _CONVOLUTIONS[node.target](
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        _sizes(numbers.get("stride", 1)),
        _sizes(padding),
        _sizes(numbers.get("dilation", 1)),
        groups,
        bias,
    )


def _sizes(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _leaves(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _replacement(node: fx.Node, arguments: dict[str, Any], owner: nn.Module) -> nn.Module | None:
    """A plain layer with the tensors (and the submodules) of ``owner``, or None."""
    if any(getattr(owner, hooks) for hooks in _HOOKS):
        return None
    with torch.device("meta"):
        plain = _plain(node, arguments, owner)
    if plain is None:
        return None
    tensors = dict(owner._parameters) | dict(owner._buffers)
    own = {name for name, tensor in tensors.items() if tensor is not None}
    expected = {*plain._parameters, *plain._buffers}
    if own - expected or not all(hasattr(owner, name) for name in expected):
        return None
    for name in plain._parameters:
        value = owner._parameters.get(name)
        plain._parameters[name] = value if arguments.get(name) is not None else None
    for name in plain._buffers:
        plain._buffers[name] = owner._buffers[name]
    for name, child in owner.named_children():
        plain.add_module(name, child)
    plain.training = owner.training
    return plain


def liftable(module: fx.GraphModule, model: nn.Module) -> dict[str, nn.Module]:
    """Plain layers by path that can stand for functional ones on the same parameters.

    Not where something else reads the parameters, or the path is called as a module too.
    """
    calls: dict[str, list[tuple[fx.Node, dict[str, Any]]]] = defaultdict(list)
    readers: dict[str, set[fx.Node]] = defaultdict(set)
    called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target).rpartition(".")[0]].update(node.users)
        arguments = _arguments(node)
        if arguments is not None and (owner := _owner(arguments)):
            calls[owner].append((node, arguments))
    found = {}
    for path, layers in calls.items():
        if path in called or readers[path] - {node for node, _ in layers}:
            continue
        alike = {
            str([(k, v) for k, v in a.items() if k not in (*_TENSORS, "input")]) for _, a in layers
        }
        plain = _replacement(*layers[0], model.get_submodule(path)) if len(alike) == 1 else None
        if plain is not None:
            found[path] = plain
    return found


def lift_layers(module: fx.GraphModule, model: nn.Module, plain: Mapping[str, nn.Module]) -> None:
    """Call the ``plain`` layers that :func:`liftable` found in place of the functions."""
    graph = module.graph
    for node in list(graph.nodes):
        arguments = _arguments(node)
        owner = None if arguments is None else _owner(arguments)
        if arguments is None or owner is None or owner not in plain:
            continue
        module.set_submodule(owner, plain[owner])
        with graph.inserting_before(node):
            call = graph.call_module(owner, (arguments["input"],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
