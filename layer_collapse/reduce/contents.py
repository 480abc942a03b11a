"""What a saved file says it holds: checked whole, before memory is taken for any of it."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import recipe
from .recipe import DTYPES, require

VERSION = 1
_KINDS = ("parameter", "buffer", "temporary")  # temporary: a buffer outside the state_dict
#: Shape and dtype of what a file stores, by key.
Stored = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def named_tensors(module: nn.Module) -> list[tuple[str, str, Tensor]]:
    """Path, kind and value of all tensors, tied ones under each of their paths."""
    found: list[tuple[str, str, Tensor]] = [
        (p, "parameter", t) for p, t in module.named_parameters(remove_duplicate=False)
    ]
    persistent = module.state_dict(keep_vars=True)
    for path, tensor in module.named_buffers(remove_duplicate=False):
        found.append((path, "buffer" if path in persistent else "temporary", tensor))
    return found


def dense(shape: Any, strides: Any) -> bool:
    """Whether strides place every element once, without gaps."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def owner_of(path: str, modules: Container[str]) -> str | None:
    """The one of ``modules`` inside which ``path`` lies, or None."""
    parts = path.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in modules), None)


def checked(text: str, stored: Stored) -> tuple[dict[str, Any], fx.Graph, dict[str, nn.Module]]:
    """The recipe, its graph and its modules on the meta device, all fields checked."""
    content = json.loads(text)
    require(isinstance(content, dict), "its recipe is not an object")
    version = content.get("version")
    require(version == VERSION, f"its version is {version!r:.40}, expected {VERSION}")
    fields = {"version", "class", "nodes", "modules", "tensors", "checksums", "extra"}
    require(set(content) == fields, "its recipe has missing or unknown fields")
    for name in fields - {"version", "class", "nodes"}:
        require(isinstance(content[name], dict), f"its {name} are malformed")
    recipe.check_name(content["class"])
    modules: dict[str, nn.Module] = {}
    for path, entry in content["modules"].items():
        recipe.check_path(path)
        require(owner_of(path, content["modules"]) is None, f"{path!r:.80} lies inside a module")
        modules[path] = recipe.recipe_to_module(path, entry)
    tensors = content["tensors"]
    for path, entry in tensors.items():
        _check_tensor(path, entry, stored)
    used = set(strides_of(content))
    sums = content["checksums"]
    require(used == set(stored) == set(sums), "its tensors are not those of its recipe")
    require(all(type(s) is int for s in sums.values()), "its checksums are malformed")
    owned: dict[str, dict[str, Any]] = {path: {} for path in modules}
    for path, entry in tensors.items():
        if (owner := owner_of(path, modules)) is not None:
            owned[owner][path[len(owner) + 1 :]] = entry
    for path, module in modules.items():
        _check_module(path, module, owned[path])
    graph = recipe.recipe_to_graph(content["nodes"], set(modules), set(tensors))
    read = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    require(called == set(modules), "it holds modules that are never called")
    for path in tensors:
        used_there = owner_of(path, modules) is not None or path in read
        require(used_there, f"tensor {path!r:.80} is never used")
    for path in [*tensors, *modules]:
        blocked = owner_of(path, tensors) is not None or (path in modules and path in tensors)
        require(not blocked, f"{path!r:.80} stands where a tensor does")
    return content, graph, modules


def strides_of(content: Mapping[str, Any]) -> dict[str, list[int]]:
    """How each stored tensor is laid out, by its key in the file.

    Raises:
        ValueError: two paths that share one want it laid out differently.
    """
    found: dict[str, list[int]] = {}
    for path, entry in content["tensors"].items():
        same = found.setdefault(entry["stored"], entry["strides"]) == entry["strides"]
        require(same, f"tensor {path!r:.80} has other strides than one that it is tied to")
    return found


def _check_tensor(path: Any, entry: Any, stored: Stored) -> None:
    recipe.check_path(path)
    fields = {"stored", "kind", "trains", "shape", "strides", "dtype"}
    require(isinstance(entry, dict) and set(entry) == fields, f"tensor {path!r} is malformed")
    key, kind, dtype = entry["stored"], entry["kind"], entry["dtype"]
    require(isinstance(key, str) and key in stored, f"tensor {path!r} is not in the file")
    require(isinstance(dtype, str) and dtype in DTYPES, f"tensor {path!r} has an unknown dtype")
    for name in ("shape", "strides"):
        sizes = entry[name]
        fine = isinstance(sizes, list) and all(type(s) is int and 0 <= s < 2**62 for s in sizes)
        require(fine, f"tensor {path!r} has malformed {name}")
    same = (tuple(entry["shape"]), DTYPES[dtype]) == stored[key]
    require(same, f"tensor {path!r} has another shape or dtype in the file than in the recipe")
    aligned = len(entry["shape"]) == len(entry["strides"])
    placed = aligned and (0 in entry["shape"] or dense(entry["shape"], entry["strides"]))
    require(placed, f"tensor {path!r} has strides that do not fit its shape")
    require(kind in _KINDS and type(entry["trains"]) is bool, f"tensor {path!r} is malformed")
    floating = DTYPES[dtype].is_floating_point
    require(floating or not entry["trains"], f"tensor {path!r} cannot train: it holds integers")


def _check_module(path: str, module: nn.Module, given: Mapping[str, Any]) -> None:
    """Take out the optional biases that the file has not, then compare names and shapes."""
    expected = {name: (kind, t) for name, kind, t in named_tensors(module)}
    bias = expected.get("bias")
    if bias is not None and "bias" not in given and hasattr(module, "eps"):
        module.register_parameter("bias", None)
        del expected["bias"]
    require(set(expected) == set(given), f"module {path!r} has other tensors than its type")
    for name, (kind, tensor) in expected.items():
        entry = given[name]
        fits = tuple(entry["shape"]) == tuple(tensor.shape) and entry["kind"] == kind
        alike = DTYPES[entry["dtype"]].is_floating_point == tensor.dtype.is_floating_point
        require(fits and alike, f"tensor {path}.{name} does not fit a {type(module).__name__}")


def assembled(
    content: dict[str, Any],
    graph: fx.Graph,
    modules: dict[str, nn.Module],
    values: dict[str, Tensor],
) -> fx.GraphModule:
    """The model from a checked recipe and the tensors of the file, laid out as it says."""
    made: dict[Any, Tensor] = {}
    root: dict[str, Any] = dict(modules)
    temporary = set()
    for path, entry in content["tensors"].items():
        place = _place(entry)
        if place not in made:
            made[place] = _made(values[entry["stored"]], entry)
        tensor = made[place]
        owner = owner_of(path, modules)
        if owner is None:
            root[path] = tensor
            if entry["kind"] == "temporary":
                temporary.add(path)
            continue
        inner, _, name = path[len(owner) + 1 :].rpartition(".")
        holder = modules[owner].get_submodule(inner)
        (holder._parameters if entry["kind"] == "parameter" else holder._buffers)[name] = tensor  # type: ignore[assignment]
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) not in root:
            root[str(node.target)] = made[_place(content["tensors"][str(node.target)])]
    module = fx.GraphModule(root, graph, content["class"])
    for path in temporary:
        owner_path, _, name = path.rpartition(".")
        module.get_submodule(owner_path)._non_persistent_buffers_set.add(name)
    module.meta["extra"] = content["extra"]
    return module.eval()


def _place(entry: Mapping[str, Any]) -> tuple[str, bool, bool]:
    """What two paths have in common when they name one tensor."""
    return entry["stored"], entry["kind"] == "parameter", entry["trains"]


def _made(value: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """A tensor of its own for each way to use a value, in the value's memory."""
    if entry["kind"] == "parameter":
        return nn.Parameter(value, requires_grad=entry["trains"])
    return value.detach().requires_grad_(entry["trains"])
