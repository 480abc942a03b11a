"""Checkpoints: one safetensors file whose header carries JSON; written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import check_header, check_text, write_atomically

_KEY = "layer_collapse"


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and plain JSON data as one file; readers see the old file or the new one.

    Raises:
        OSError: one sentence, e.g. the disk is full; the old file is untouched.
        ValueError: ``meta`` is not JSON, or far more of it than of tensors.
    """
    # A copy each: safetensors refuses tensors that share memory, as tied weights do.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    header = {_KEY: json.dumps(meta, allow_nan=False)}
    check_text(len(header[_KEY]), sum(t.numel() * t.element_size() for t in plain.values()))
    write_atomically(path, safetensors.torch.save(plain, metadata=header))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save` wrote; nothing is unpickled.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no such file, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no checkpoint of layer_collapse or is damaged ({error!s:.300}); delete it "
            "to start again"
        ) from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path} is damaged (its header is no object); delete it to start again")
    return tensors, meta


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` under ``prefix``; :func:`without_prefix` undoes it."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {
        name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }
