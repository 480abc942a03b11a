"""Moving the padding between two convolutions in front of the first one, before a fine-tune."""

from __future__ import annotations

import torch
from torch import fx, nn

from ..graph import BATCH_NORM, call_counts, shape_of, submodule
from .border import best_border
from .convolutions import ZEROS, composed, geometry_of, pad
from .float64 import call
from .gate import AffineGate
from .layers import CONV, DROPOUT, bias_of, scaled_columns, weight_of

_BETWEEN = (AffineGate, *BATCH_NORM, nn.Identity, *DROPOUT)


def move_padding(graph: fx.GraphModule, gate: fx.Node) -> tuple[str, str] | None:
    """Let the first of the two convolutions around a gate pad for both.

    Padding p1 + s1 p2 in front and none between: the second layer then reads what the first gives
    there, as a merged layer does, and so the function changes. Nothing moves where the two can be
    merged as they are, where others read what lies between, or where no layer pads that way.

    Args:
        graph: in evaluation mode; it is changed.
        gate: the call of an :class:`AffineGate`.

    Returns:
        Paths of the first and the second layer, or None.
    """
    above, below = _walk(graph, gate, up=True), _walk(graph, gate, up=False)
    if above is None or below is None:
        return None
    first, second = submodule(graph, above[-1]), submodule(graph, below[-1])
    counts = call_counts(graph)
    if first is None or second is None or any(counts[str(n.target)] > 1 for n in (*above, *below)):
        return None
    inner, outer = geometry_of(first), geometry_of(second)
    modes = {g.mode for g in (inner, outer) if g.padded}
    if not outer.padded or len(modes) > 1:
        return None
    whole = composed(inner, outer, modes.pop())
    if whole.before != whole.after or _exact(graph, above, first, second):
        return None
    pad(first, whole.before, whole.mode)
    pad(second, (0,) * outer.ndim, ZEROS)
    return str(above[-1].target), str(below[-1].target)


def _walk(graph: fx.GraphModule, gate: fx.Node, up: bool) -> list[fx.Node] | None:
    """Nodes from the gate to the next convolution, all of them with one reader; None without."""
    path = [gate]
    while True:
        if up and len(path[-1].all_input_nodes) == 1:
            path.append(path[-1].all_input_nodes[0])
        elif not up and len(path[-1].users) == 1:
            path.append(next(iter(path[-1].users)))
        else:
            return None
        kind = type(submodule(graph, path[-1]))
        if up and len(path[-1].users) != 1:
            return None
        if kind in CONV:
            return path
        if kind not in _BETWEEN:
            return None


def _exact(
    graph: fx.GraphModule, above: list[fx.Node], first: nn.Module, second: nn.Module
) -> bool:
    """Whether the two merge without error where they are."""
    inner, outer = geometry_of(first), geometry_of(second)
    shape = shape_of(above[-1].all_input_nodes[0])
    sizes = shape[-inner.ndim :] if shape else composed(inner, outer, outer.mode).large
    border = best_border(inner, outer, sizes)
    return not border.windows and not (border.bias and _sends(graph, above, first, second))


def _sends(
    graph: fx.GraphModule, above: list[fx.Node], first: nn.Module, second: nn.Module
) -> bool:
    """Whether the second layer reads anything where the first one reads zeros alone."""
    bias = bias_of(first)
    weight = weight_of(first)
    value = weight.new_zeros(len(weight)) if bias is None else bias
    value = value.view(1, -1, *[1] * geometry_of(first).ndim)
    with torch.no_grad():
        for node in reversed(above[:-1]):
            module = submodule(graph, node)
            assert module is not None
            value = call(module, [value])
    return bool(scaled_columns(second, value.flatten()).any())
