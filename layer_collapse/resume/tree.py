"""Nested states as named tensors and plain JSON values, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "compared", "described", "flattened", "rebuilt", "zeros_like"]

#: What tensors of a checkpoint may be.
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "bool"),
    *("int64", "int32", "int16", "int8", "uint8"),
)

_DEEPEST = 64  # levels of a tree that is read; states have a dozen


def flattened(what: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON in which every tensor is its name; the tensors go into ``tensors``.

    Args:
        what: name of the value; those of the tensors begin with it.
        value: numbers, strings, booleans, None and tensors in dicts with text keys, lists, tuples.
        tensors: filled, in order.

    Raises:
        ValueError: something else; named.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        tensors[what] = value
        return {"tensor": what}
    if isinstance(value, list | tuple):
        items = [flattened(f"{what}/{i}", item, tensors) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {"dict": {k: flattened(f"{what}/{k}", item, tensors) for k, item in value.items()}}
    raise ValueError(
        f"{what}: expected numbers, text, tensors, and lists or dicts with text keys of those (got "
        f"{type(value).__name__}); leave it out or convert it"
    )


def rebuilt(tree: Any, tensors: Mapping[str, Tensor], depth: int = 0) -> Any:
    """The inverse of :func:`flattened`; every part of ``tree`` is checked.

    Raises:
        ValueError: it is no such tree, or names another tensor than ``tensors`` has.
    """
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if not isinstance(tree, dict) or len(tree) != 1 or depth > _DEEPEST:
        raise ValueError(f"malformed value {tree!r:.80}")
    kind, inner = next(iter(tree.items()))
    if kind == "tensor" and isinstance(inner, str) and inner in tensors:
        return tensors[inner]
    if kind == "float" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if kind == "dict" and isinstance(inner, dict):
        return {key: rebuilt(item, tensors, depth + 1) for key, item in inner.items()}
    if kind in ("list", "tuple") and isinstance(inner, list):
        items = [rebuilt(item, tensors, depth + 1) for item in inner]
        return items if kind == "list" else tuple(items)
    raise ValueError(f"malformed value {tree!r:.80}")


def compared(what: str, saved: Any, own: Any) -> None:
    """Whether two trees are alike but for their numbers and texts.

    Raises:
        ValueError: they are not; names the first difference.
    """
    if not (isinstance(saved, dict) and isinstance(own, dict)):
        if isinstance(saved, dict) is isinstance(own, dict) and _sort(saved) == _sort(own):
            return
        raise ValueError(f"{what} is {_short(saved)} in the checkpoint and {_short(own)} here")
    if "float" in saved or "float" in own:
        return  # an infinity in the place of another number
    (kind, inner), (own_kind, mine) = next(iter(saved.items())), next(iter(own.items()))
    if kind != own_kind or (kind == "tensor" and inner != mine):
        raise ValueError(f"{what} is a {kind} in the checkpoint and a {own_kind} here")
    if kind in ("list", "tuple"):
        inner, mine = dict(enumerate(inner)), dict(enumerate(mine))
    if kind in ("list", "tuple", "dict"):
        if odd := sorted(map(str, inner.keys() ^ mine.keys())):
            where = "only in the checkpoint" if odd[0] in map(str, inner) else "only here"
            raise ValueError(f"{what} has {odd[0]!r:.80} {where}")
        for key in mine:
            compared(f"{what}/{key}", inner[key], mine[key])


def _sort(value: Any) -> str:
    return "number" if value is None or type(value) in (int, float) else type(value).__name__


def _short(value: Any) -> str:
    return f"a {next(iter(value))}" if isinstance(value, dict) and value else f"{value!r:.40}"


def described(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Shape and dtype of each tensor, as JSON has it."""
    return {k: [list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in tensors.items()}


def zeros_like(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """New tensors of the same shape, dtype, device and spread; of what is spread, its part."""
    with torch.no_grad():
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
