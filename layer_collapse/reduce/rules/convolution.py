"""Two convolutions in a row into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..border import Border, best_border, border
from ..convolutions import ZEROS, Geometry, composed, geometry_of, merged
from ..float64 import call
from ..gate import ConstantBias, smallest_form
from ..layers import CONV, bias_of, scaled_columns, spatial_dims, with_tensors
from ..proof import Call
from ..ring import RingConv
from ..walk import above, free_path, passes_through, read_elsewhere
from ..work import Plan, Refused, Work
from ..zeros import is_constant

_POOLS = {
    "max pooling": (
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
    ),
    "average pooling": (
        *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    ),
}
_FLATTENS = (nn.Flatten, torch.flatten, "flatten", "view", "reshape")


def convolution(work: Work, node: fx.Node) -> Plan | None:
    """W = W2 * W1, taps of W1 d1 and of W2 s1 d2 apart; b = b2 + W2 b1 summed over all taps.

    Stride s1 s2, padding p1 + s1 p2, gcd(g1, g2) groups; the second layer's name stays. Where the
    second layer pads with zeros and the merged one would see computed values there, ``work.border``
    decides. Pooling between two layers is named as what keeps them apart.
    """
    second = work.called(node)
    if not isinstance(second, (nn.Linear, *CONV)):
        return None
    _name_pooling(work, node, second)
    if not isinstance(second, CONV):
        return None
    place, between = above(work, node)
    first = work.called(place)
    if not isinstance(first, CONV) or is_constant(first) or is_constant(second):
        return None
    for where, layer in ((place, first), (node, second)):
        if reason := work.obstacle(where):
            raise Refused(reason)
        if type(layer) not in CONV:
            raise Refused(f"{where.target!r} is a {type(layer).__name__}, not a plain convolution")
    if busy := read_elsewhere([place, *between]):
        raise Refused(f"the value of {busy.name!r} is used elsewhere")
    if work.dtypes[f"{place.target}.weight"] != work.dtypes[f"{node.target}.weight"]:
        raise Refused(f"{place.target!r} and {node.target!r} are stored in different dtypes")
    return _plan(work, (between or [place])[0], place, node, first, second)


def _plan(
    work: Work, leaves: fx.Node, place: fx.Node, node: fx.Node, first: nn.Module, second: nn.Module
) -> Plan:
    entrance = place.all_input_nodes[0]
    sizes = work.shape(entrance)[-spatial_dims(first) :]
    inner, outer = geometry_of(first), geometry_of(second)
    found = best_border(inner, outer, sizes)
    sent = bias_of(first)
    biased = sent is not None and bool(scaled_columns(second, sent).any())
    exact = not found.windows and not (found.bias and biased)
    ring = not exact and work.border == "ring" and outer.mode == ZEROS
    mapped = not exact and work.border == "biasmap" and not found.windows
    if not (exact or ring or mapped):  # before anything as large as the merged layer is made
        raise Refused(_reason(work, found, outer.mode, str(place.target), biased))
    mode = inner.mode if ring else found.mode
    if (reason := _too_much(composed(inner, outer, mode), sizes)) is not None:
        raise Refused(reason)
    whole = merged(first, second, mode)
    plan = Plan(
        name=str(place.target),
        detail=f"into {node.target}: {_shape(first)} and {_shape(second)} become {_shape(whole)}",
        sources=(entrance,),
        target=node,
        merges=True,
    )
    if exact:
        plan.modules[str(node.target)] = whole
        plan.becomes[leaves] = entrance
        plan.sized = found.other_windows or (biased and found.other_bias)
        if plan.sized:
            alike = border(
                inner, outer, _larger(composed(inner, outer, found.mode), sizes), found.mode
            )
            by_chance = alike.windows or (biased and alike.bias)  # a small image is all border
            plan.stepped = not by_chance
            plan.detail += (
                ", for this input size only"
                if by_chance
                else (", for input sizes on which the strides end as on this one")
            )
    elif ring:
        # Layers of their own: those in the graph lose their tensors when they leave it.
        corrected = RingConv(whole, with_tensors(first), with_tensors(second, bias=None))
        plan.becomes[node] = Call(str(node.target), corrected, entrance)
        plan.rule = "ring"
        plan.detail += " and strips along the border, where both stay"
    else:
        value = smallest_form(_image(second, sent, work.shape(place)))
        lone = Call(str(node.target), with_tensors(whole, bias=None), entrance)
        plan.becomes[node] = Call(free_path(work, "constant_bias"), ConstantBias(value), lone)
        plan.rule, plan.sized = "biasmap", True
        plan.detail += f" and a constant of shape {list(value.shape)}, for this input size only"
    return plan


def _too_much(whole: Geometry, sizes: Sequence[int]) -> str | None:
    """Why torch cannot pad an image as one layer must that pads for two, or None."""
    for size, padding in zip(sizes, map(max, whole.before, whole.after), strict=True):
        turns = {"circular": ("goes around", size), "reflect": ("turns back", size - 1)}
        how, most = turns.get(whole.mode, ("", padding))
        if padding > most:
            return (
                f"one layer would pad {size} pixels by {padding} in mode {whole.mode!r}, and torch "
                f"{how} once at most; fold with larger example inputs"
            )
    return None


def _larger(whole: Geometry, sizes: Sequence[int]) -> list[int]:
    """Sizes past every border on which the strides end as on these."""
    around = zip(sizes, whole.stride, whole.before, whole.after, whole.reach, strict=True)
    return [size + s * (1 + (b + a + r) // s) for size, s, b, a, r in around]


def _image(second: nn.Module, sent: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The second layer's answer to nothing but the first one's bias."""
    assert sent is not None
    spatial = shape[-spatial_dims(second) :]
    with torch.no_grad():
        given = sent.view(1, -1, *[1] * len(spatial)).expand(1, -1, *spatial)
        image: Tensor = call(second, [given])
    return image


def _reason(work: Work, found: Border, mode: str, first: str, biased: bool) -> str:
    share = 100 * (found.bias if biased else found.windows)
    wrong = f"{share:.{0 if share >= 10 else 1}f} % of the outputs would be wrong"
    if mode != ZEROS:
        return f"its {mode} padding would pad the input of {first!r} instead: {wrong}"
    if found.windows and work.border != "ring":
        return (
            f"its zero padding lies between it and {first!r}: {wrong} at the border "
            "(border='ring' corrects them)"
        )
    return f"its zero padding meets the bias of {first!r}: {wrong} at the border"


def _shape(conv: nn.Module) -> str:
    """Kernel size, stride and groups of a convolution, for the report."""
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    text = "x".join(map(str, conv.kernel_size))
    if any(s > 1 for s in conv.stride):
        text += " stride " + "x".join(map(str, conv.stride))
    return text if conv.groups == 1 else f"{text} in {conv.groups} groups"


def _name_pooling(work: Work, node: fx.Node, layer: nn.Module) -> None:
    """Refuse where pooling, or flattening, is all that stands between two layers."""
    blocks, place = list[str](), node.all_input_nodes[0]
    while len(place.all_input_nodes) >= 1 and len(place.users) == 1:
        kind = work.called(place)
        key = type(kind) if kind is not None else place.target
        pool = next((name for name, kinds in _POOLS.items() if key in kinds), None)
        if pool is not None:
            blocks.append(pool)
        elif key in _FLATTENS:
            blocks.append("flattening")
        elif not passes_through(work, place):
            break
        place = place.all_input_nodes[0]
    first = work.called(place)
    if not blocks or not isinstance(first, (nn.Linear, *CONV)):
        return
    name = next((b for b in blocks if b != "flattening"), "flattening")
    linear = "" if name == "max pooling" else " is linear, but it"
    raise Refused(f"{name}{linear} stands between {place.target!r} and it")
