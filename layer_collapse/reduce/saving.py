"""A folded model in one file: safetensors weights whose header holds the recipe of the graph.

Weights and recipe cannot get out of step, and loading runs no code from the file: targets and
module types come from :mod:`layer_collapse.reduce.registry` alone.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, fx, nn

from ..files import check_header, check_text, write_atomically
from . import recipe
from .contents import VERSION, assembled, checked, dense, named_tensors, owner_of, strides_of
from .recipe import DTYPE_NAMES, require

FORMAT = "layer_collapse.folded"


def save_folded(
    module: fx.GraphModule, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None
) -> None:
    """Write a folded model to one file, complete or not at all.

    Args:
        module: as :func:`layer_collapse.reduce.fold.fold` returns it; tied tensors stay tied.
        path: of the file; one that exists is replaced.
        extra: anything JSON can hold, for example the report.

    Raises:
        TypeError: ``module`` is not a graph module.
        ValueError: it calls something that is not registered, or ``extra`` is not JSON.
        OSError: the file cannot be written.
    """
    if not isinstance(module, fx.GraphModule):
        raise TypeError(
            f"save_folded: expected a fx.GraphModule (got {type(module).__name__}); fold it first"
        )
    try:
        text, stored = _to_recipe(module, dict(extra or {}))
        checked(text, {key: (tuple(t.shape), t.dtype) for key, t in stored.items()})
        check_text(len(text), sum(t.numel() * t.element_size() for t in stored.values()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"save_folded: {error}; nothing was written") from error
    header = {"format": FORMAT, "recipe": text, "crc32": str(zlib.crc32(text.encode()))}
    write_atomically(path, to_bytes(stored, header))


def unsavable(module: fx.GraphModule) -> list[str]:
    """Why :func:`save_folded` would refuse the nodes or modules of a graph: a sentence for each.

    It looks at no tensor, so that it costs nothing to ask before a long fold.
    """
    problems = []
    for node in module.graph.nodes:
        if node.meta.get("identity"):  # folding takes it out
            continue
        path = str(node.target)
        try:
            recipe.node_to_recipe(node)
            if node.op in ("call_module", "get_attr"):
                recipe.check_path(path)
            if node.op == "call_module":
                recipe.module_to_recipe(path, module.get_submodule(path))
        except ValueError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def load_folded(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Rebuild a folded model, on the CPU and in evaluation mode.

    Everything is checked before memory is taken for it, then every tensor's checksum. The saved
    ``extra`` is in ``module.meta["extra"]``.

    Raises:
        ValueError: the file is not whole, was changed, or holds what is not registered.
        OSError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_folded: there is no file {str(path)!r}")
    try:
        check_header(Path(path))
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            require(header.get("format") == FORMAT, f"its format is not {FORMAT!r}")
            text = header.get("recipe", "")
            checksum = str(zlib.crc32(text.encode(errors="surrogatepass")))
            require(header.get("crc32") == checksum, "its recipe is damaged")
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            stored = {k: (tuple(s.get_shape()), _DTYPE[s.get_dtype()]) for k, s in slices.items()}
            content, graph, modules = checked(text, stored)
            values = {}
            for key, strides in strides_of(content).items():
                value = file.get_tensor(key)
                require(_crc32(value) == content["checksums"][key], f"{key!r} is damaged")
                # Copied to where torch aligns memory: elsewhere, matrix products round differently.
                values[key] = torch.empty_strided(value.shape, strides, dtype=value.dtype)
                values[key].copy_(value)
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"load_folded: {str(path)!r} cannot be loaded: {error!s:.300}") from error
    return assembled(content, graph, modules, values)


_DTYPE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def _to_recipe(module: fx.GraphModule, extra: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    nodes = recipe.graph_to_recipe(module)
    modules = {p: recipe.module_to_recipe(p, module.get_submodule(p)) for p in sorted(called)}
    tensors: dict[str, dict[str, Any]] = {}
    stored: dict[str, Tensor] = {}
    keys: dict[Any, str] = {}
    for path, kind, tensor in named_tensors(module):
        if path not in read and owner_of(path, called) is None:
            continue
        require(tensor.dtype in DTYPE_NAMES, f"{path!r} has dtype {tensor.dtype}")
        require(
            type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta,
            f"{path!r} is a {type(tensor).__name__} on {tensor.device}, not a plain tensor",
        )
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        key = keys.setdefault(place if tensor.numel() else path, path)
        if key == path:
            stored[key] = tensor.detach().cpu().contiguous().clone()
        # A view with gaps is stored without them.
        strides = tensor.stride() if dense(tensor.shape, tensor.stride()) else stored[key].stride()
        tensors[path] = {
            "stored": key,
            "kind": kind,
            "trains": tensor.requires_grad,
            "shape": list(tensor.shape),
            "strides": list(strides),
            "dtype": DTYPE_NAMES[tensor.dtype],
        }
    missing = read - set(tensors)
    require(not missing, f"attribute {min(missing, default='')!r} is not a tensor")
    content = {
        "version": VERSION,
        "class": type(module).__name__,
        "nodes": nodes,
        "modules": modules,
        "tensors": tensors,
        "checksums": {key: _crc32(tensor) for key, tensor in stored.items()},
        "extra": extra,
    }
    return json.dumps(content, allow_nan=False), stored


def _crc32(tensor: Tensor) -> int:
    flat = tensor.contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
