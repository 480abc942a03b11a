"""Merges that are faster only together.

A 1x1 and a depthwise convolution make a dense one that is slower than the two; with the 1x1 behind
them they may make one that is faster than all three.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from ..graph import BATCH_NORM, depth, record_shapes
from .gate import AffineGate, ConstantBias
from .layers import CONV
from .plan import Plan
from .region import extracted
from .storing import rounded
from .walk import only_user, passes_through
from .work import Work

#: Weighted layers in a chain, at most: an inverted bottleneck has three.
LONGEST = 4
_LAYERS = (nn.Linear, *CONV)
_BETWEEN = (AffineGate, ConstantBias, *BATCH_NORM)


def pays_with_more(work: Work, plan: Plan, fold_all: Callable[[Work], object]) -> bool:
    """Whether a merge that is slower by itself is faster together with those behind it.

    Tried on a copy of that part of the graph, in which everything is folded and which is then timed
    against the part as it is. If it is faster, ``work`` will make these merges.

    Args:
        plan: refused by ``work.attempt`` for being slower.
        fold_all: carries out all folds on the work that it is given.
    """
    layers = [plan.target]
    while len(layers) < LONGEST - 1:
        reader = _next_layer(work, layers[-1])
        if reader is None or work.obstacle(reader) is not None:
            return False
        layers.append(reader)
        paths = tuple(str(layer.target) for layer in layers)
        key = (plan.name, *paths)
        if key not in work.chains:
            work.chains[key] = _times(work, plan, reader, fold_all)
        times = work.chains[key]
        if times is not None and times[1] < times[0]:
            work.paying |= dict.fromkeys(paths[:-1]) | {paths[-1]: times}
            return True
    return False


def _next_layer(work: Work, node: fx.Node) -> fx.Node | None:
    """The weighted layer that alone reads a node, through what folds will take up."""
    reader = only_user(node)
    while reader is not None and (
        passes_through(work, reader) or type(work.called(reader)) in _BETWEEN
    ):
        reader = only_user(reader)
    return reader if reader is not None and type(work.called(reader)) in _LAYERS else None


@torch.no_grad()
def _times(
    work: Work, plan: Plan, end: fx.Node, fold_all: Callable[[Work], object]
) -> tuple[float, float] | None:
    """Milliseconds apart and merged; None where not everything up to ``end`` becomes one layer."""
    assert work.stopwatch is not None
    (entrance,) = plan.sources

    def part() -> fx.GraphModule:
        return extracted(
            work.module, end, [entrance], work.sizes(),
            lambda path, module: rounded(path, module, work.dtypes),
        )  # fmt: skip

    x = work.sample(entrance)
    apart, tried = part(), part()
    record_shapes(tried, [x])
    trial = Work(tried, work.border)
    fold_all(trial)
    merged = trial.finished()
    if depth(merged) != 1:
        return None
    return work.stopwatch(lambda: apart(x), lambda: merged(x))
