"""Sizes at which a folded network holds: it is tried at others than the example's, and guarded."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..graph import carries_data, shape_of, submodule
from . import passing
from .gate import FixedSize
from .proof import FoldError
from .walk import factors, free_path, summands
from .work import Work

__all__ = ["Growth", "batch_growth", "guard", "larger", "other_sizes", "step_of"]

#: Where, and how much longer: (number of the tensor, dim) -> places.
Growth = dict[tuple[int, int], int]


def _tensors(inputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def larger(inputs: Any, growth: Growth, generator: torch.Generator) -> Any:
    """Inputs in another size: floating-point tensors as normal noise in float64, others longer by
    their last entries.
    """
    leaves, spec = tree_flatten(inputs)
    number = -1
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        number += 1
        shape = [size + growth.get((number, dim), 0) for dim, size in enumerate(leaf.shape)]
        if leaf.is_floating_point():
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            leaves[place] = noise.to(leaf.device)
            continue
        for dim, size in enumerate(shape):
            index = torch.arange(size, device=leaf.device).clamp(max=leaf.shape[dim] - 1)
            leaf = leaf.index_select(dim, index)
        leaves[place] = leaf
    return tree_unflatten(leaves, spec)


def batch_growth(inputs: Any) -> Growth:
    """One sample more: along the first dim of all tensors that have as many as the first one."""
    tensors = _tensors(inputs)
    samples = next((len(t) for t in tensors if t.ndim), 0)
    return {(i, 0): 1 for i, t in enumerate(tensors) if t.ndim and len(t) == samples}


def other_sizes(inputs: Any, by: int) -> Iterator[list[Growth]]:
    """For every size that may be another: how it may grow; a model need not take any of it.

    Dims of one size are taken for the same thing (the sides of an image, the tokens of two
    inputs); for where that is not so, each by itself follows.
    """
    places: dict[int, list[tuple[int, int]]] = {}
    for number, tensor in enumerate(_tensors(inputs)):
        for dim in range(1, tensor.ndim):
            places.setdefault(tensor.shape[dim], []).append((number, dim))
    for found in places.values():
        alone = [[p for p in found if p[1] == dim] for dim in sorted({dim for _, dim in found})]
        ways = [found, *(alone if len(alone) > 1 else [])]
        yield [dict.fromkeys(way, by) for way in ways]


def step_of(graph: fx.GraphModule) -> int:
    """By what inputs may grow for all strides to end as they do; 0 if that is not known.

    The product over all layers of the least multiple of a layer's strides: whatever dims are
    permuted between them, it is a multiple of what each dim needs.
    """
    step = 1
    for node in graph.graph.nodes:
        module = submodule(graph, node)
        if node.op in ("placeholder", "output", "get_attr") or not carries_data(node):
            continue
        if not (passing.is_uniform(node, module) or summands(node) or factors(node)):
            return 0
        stride = getattr(module, "stride", 1)
        step *= math.lcm(*stride) if isinstance(stride, tuple) else int(stride or 1)
    return step


def guard(work: Work, step: int) -> None:
    """Let the network refuse inputs of another size than the example's, for which it is wrong.

    Raises:
        FoldError: it takes tensors out of an input in a way that cannot be followed.
    """
    folded = work.module
    for node in list(folded.graph.nodes):
        if node.op == "placeholder" and node.users:
            for tensor in _tensors_of(node):
                _guard_one(work, tensor, step)
    folded.recompile()


def _tensors_of(node: fx.Node) -> list[fx.Node]:
    """An input, or what is taken out of it where it is a list or a mapping."""
    shape = shape_of(node)
    if shape is not None:
        return [node] if shape else []
    if "tensor_meta" not in node.meta:
        return []  # no tensor is in it
    found = []
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise FoldError(
                "fold: the folded model holds for inputs of one size only, but takes them from "
                f"{node.name!r} by {user.name!r}, where their size cannot be checked; index it, or "
                "pass tensors"
            )
        found += _tensors_of(user)
    return found


def _guard_one(work: Work, node: fx.Node, step: int) -> None:
    shape = shape_of(node)
    assert shape is not None
    readers, path = list(node.users), free_path(work, "fixed_size")
    fixed = FixedSize(shape[1:], step, node.meta.get("fixed_batch"))
    work.module.add_submodule(path, fixed.eval())
    with work.module.graph.inserting_after(node):
        guarded = work.module.graph.call_module(path, (node,))
    guarded.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, guarded)
