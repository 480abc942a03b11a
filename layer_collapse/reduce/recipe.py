"""A graph as plain JSON values, and back: every field is checked, nothing is allocated."""

from __future__ import annotations

import keyword
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen

from . import registry

_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
}
DTYPES: Mapping[str, torch.dtype] = _DTYPES
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FORMATS = {
    str(f).removeprefix("torch."): f
    for f in (
        *(torch.contiguous_format, torch.preserve_format),
        *(torch.channels_last, torch.channels_last_3d),
    )
}
_LONGEST = 1000  # characters: looking for the owners of a path takes their square
# No character that could end the quotes around a name in the code that torch.fx writes.
_PART = r"[A-Za-z0-9_]([A-Za-z0-9_ -]*[A-Za-z0-9_-])?"
_PATH = re.compile(rf"{_PART}(\.{_PART})*", re.ASCII)


def require(condition: bool, problem: str) -> None:
    """ValueError(problem) unless the condition holds."""
    if not condition:
        raise ValueError(problem)


def check_path(path: Any) -> None:
    """A path of a module or tensor that cannot reach anything else of a module."""
    fine = isinstance(path, str) and len(path) <= _LONGEST and bool(_PATH.fullmatch(path))
    require(fine, f"bad path {path!r:.80}")
    for part in path.split("."):
        require(not hasattr(nn.Module, part), f"path {path!r:.80} names a part of nn.Module")
        require(not hasattr(fx.GraphModule, part), f"path {path!r:.80} names a part of the graph")
        require(not keyword.iskeyword(part), f"path {path!r:.80} holds a keyword")
        require(not part.startswith("__"), f"bad path {path!r:.80}")


def check_name(name: Any) -> str:
    """An identifier."""
    usable = isinstance(name, str) and name.isascii() and name.isidentifier()
    require(usable and not keyword.iskeyword(name), f"bad name {name!r:.80}")
    return str(name)


def encode(value: Any) -> Any:
    """An argument as JSON values; ValueError names what cannot be written."""
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return {"list": [encode(item) for item in value]}
    if isinstance(value, tuple) and (type(value) in (tuple, torch.Size)):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype) and value in DTYPE_NAMES:
        return {"dtype": DTYPE_NAMES[value]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    raise ValueError(f"an argument of type {type(value).__name__} cannot be saved")


def decode(value: Any, nodes: Mapping[str, Any]) -> Any:
    """The inverse of :func:`encode`; ``nodes`` are those that may be referred to."""
    if value is None or isinstance(value, bool | str) or type(value) in (int, float):
        return value
    require(isinstance(value, dict) and len(value) == 1, f"bad argument {value!r:.80}")
    kind, inner = next(iter(value.items()))
    if kind in ("list", "tuple", "slice"):
        require(isinstance(inner, list), f"bad {kind} {inner!r:.80}")
        items = [decode(item, nodes) for item in inner]
        require(kind != "slice" or len(items) == 3, f"bad slice {inner!r:.80}")
        return slice(*items) if kind == "slice" else items if kind == "list" else tuple(items)
    if kind == "dict":
        require(isinstance(inner, dict), f"bad dict {inner!r:.80}")
        return {key: decode(item, nodes) for key, item in inner.items()}
    if kind == "ellipsis":
        return Ellipsis
    require(isinstance(inner, str), f"bad {kind!r:.80} {inner!r:.80}")
    if kind == "device":
        try:
            return torch.device(inner)
        except Exception as error:
            raise ValueError(f"unknown device {inner!r:.80}") from error
    tables: Mapping[str, Mapping[str, Any]] = {
        "node": nodes,
        "dtype": DTYPES,
        "memory_format": _FORMATS,
        "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
    }
    require(kind in tables, f"unknown kind of argument {kind!r:.80}")
    require(inner in tables[kind], f"unknown {kind} {inner!r:.80}")
    return tables[kind][inner]


def graph_to_recipe(module: fx.GraphModule) -> list[dict[str, Any]]:
    """The nodes of a graph; ValueError names the first that is not registered."""
    require(type(module.graph._codegen) is CodeGen, "a graph with its own calling convention")
    return [node_to_recipe(node) for node in module.graph.nodes]


def node_to_recipe(node: fx.Node) -> dict[str, Any]:
    """One node as JSON values; ValueError where what it calls or holds is not registered."""
    target = node.target
    if node.op == "call_function":
        known = _hashable(target) and target in registry.FUNCTION_NAMES
        require(known, f"function {getattr(target, '__name__', target)!r} is not registered")
        target = registry.FUNCTION_NAMES[target]
    elif node.op == "call_method":
        require(target in registry.METHODS, f"method {target!r} is not registered")
    try:
        args, kwargs = encode(tuple(node.args)), encode(dict(node.kwargs))
    except ValueError as error:
        raise ValueError(f"{node.name!r}: {error}") from error
    return {"name": node.name, "op": node.op, "target": target, "args": args, "kwargs": kwargs}


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def recipe_to_graph(nodes: Any, modules: set[str], tensors: set[str]) -> fx.Graph:
    """A graph from its recipe.

    Args:
        nodes: what :func:`graph_to_recipe` gave.
        modules: paths that may be called.
        tensors: paths that may be read.

    Raises:
        ValueError: anything is missing, unknown or out of order.
    """
    require(isinstance(nodes, list) and bool(nodes), "expected a list of nodes")
    graph, made = fx.Graph(), dict[str, fx.Node]()
    for number, entry in enumerate(nodes):
        fields = {"name", "op", "target", "args", "kwargs"}
        require(isinstance(entry, dict) and set(entry) == fields, f"node {number} is malformed")
        name, op, target = check_name(entry["name"]), entry["op"], entry["target"]
        require(isinstance(target, str), f"node {name!r:.80} has no target")
        require(name not in made, f"two nodes are called {name!r:.80}")
        require((op == "output") == (number == len(nodes) - 1), "expected one output, at the end")
        args, kwargs = decode(entry["args"], made), decode(entry["kwargs"], made)
        shaped = isinstance(args, tuple) and isinstance(kwargs, dict)
        require(shaped, f"node {name!r:.80} has malformed arguments")
        for key in kwargs:
            check_name(key)
        _check_target(op, target, args, kwargs, modules, tensors)
        function = registry.FUNCTIONS[target] if op == "call_function" else target
        made[name] = graph.create_node(op, function, args, kwargs, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SyntaxWarning)  # "perhaps you missed a comma?"
            compile(graph.python_code("self").src, "recipe", "exec")
    except Exception as error:
        raise ValueError(f"its nodes are no program ({error!s:.80})") from error
    return graph


def _check_target(
    op: Any,
    target: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    modules: set[str],
    tensors: set[str],
) -> None:
    tables: Mapping[str, Any] = {
        "call_function": registry.FUNCTIONS,
        "call_method": registry.METHODS,
        "call_module": modules,
        "get_attr": tensors,
        "output": {"output"},
    }
    if op == "placeholder":
        check_name(target)
        require(len(args) <= 1 and not kwargs, f"input {target!r:.80} is malformed")
        return
    require(isinstance(op, str) and op in tables, f"unknown operation {op!r:.80}")
    require(target in tables[op], f"{op} of {target!r:.80} is not registered")
    if op == "output":
        require(len(args) == 1 and not kwargs, "the output is malformed")
    if op == "get_attr":
        require(not args and not kwargs, f"{target!r:.80} takes no arguments")
    if op == "call_method":
        require(bool(args) and isinstance(args[0], fx.Node), f"{target!r:.80} has no object")
    if target == "getattr" and op == "call_function":
        named = len(args) == 2 and isinstance(args[0], fx.Node) and not kwargs
        known = named and isinstance(args[1], str) and args[1] in registry.ATTRIBUTES
        require(known, f"attribute {args[1:]!r:.80} is not registered")


def module_to_recipe(path: str, module: nn.Module) -> dict[str, Any]:
    """Type and constructor fields of a module; ValueError where it is not registered."""
    kind, fields = registry.MODULES.get(type(module).__name__, (None, ()))
    require(
        kind is type(module),
        f"{path!r} is a {type(module).__name__}, which is not registered",
    )
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    require(not any(hooks), f"{path!r} has hooks, which cannot be saved")
    values = {}
    for name in fields:
        read = registry.DERIVED.get(name)
        value = read(module) if read else getattr(module, name)
        require(registry.fits(name, value), f"{path!r} has {name} = {value!r:.80}")
        values[name] = encode(value)
    return {"type": type(module).__name__, "fields": values}


def recipe_to_module(path: str, entry: Any) -> nn.Module:
    """A module on the meta device from its recipe; ValueError where a field does not fit."""
    fine = isinstance(entry, dict) and set(entry) == {"type", "fields"}
    require(fine and isinstance(entry["type"], str), f"module {path!r:.80} is malformed")
    require(entry["type"] in registry.MODULES, f"module type {entry['type']!r:.80} is unknown")
    _, names = registry.MODULES[entry["type"]]
    given = entry["fields"]
    same = isinstance(given, dict) and set(given) == set(names)
    require(same, f"module {path!r:.80} has not the fields of a {entry['type']}")
    fields = {name: decode(value, {}) for name, value in given.items()}
    for name, value in fields.items():
        require(registry.fits(name, value), f"module {path!r:.80} has {name} = {value!r:.80}")
    try:
        return registry.build(entry["type"], fields).eval()
    except Exception as error:
        raise ValueError(f"module {path!r:.80} cannot be built ({error!s:.80})") from error
