"""Merged convolutions against the two they came from: borders, groups, sizes, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layer_collapse.reduce.convolutions import best_border, geometry_of
from layer_collapse.reduce.fold import FoldResult, fold
from layer_collapse.reduce.gate import AffineGate, ConstantBias
from layer_collapse.reduce.ring import RingConv
from layer_collapse.reduce.saving import load_folded, save_folded

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MODES = ("zeros", "circular", "reflect", "replicate")


def seeded(*layers: nn.Module) -> nn.Sequential:
    """Layers in a row, in float64, with statistics as after training."""
    model = nn.Sequential(*layers).double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def same(model: nn.Module, result: FoldResult, x: Tensor) -> None:
    with torch.no_grad():
        expected, got = model(x), result.model(x)
    assert got.shape == expected.shape
    scale = max(1.0, float(expected.abs().max()))
    assert float((got - expected).abs().max()) <= 1e-10 * scale


def convolutions(result: FoldResult) -> list[nn.Module]:
    return [m for m in result.model.children() if isinstance(m, (*CONV.values(), RingConv))]


def made(result: FoldResult) -> list[str]:
    return [f.rule for f in result.report.folds]


def reasons(result: FoldResult, rule: str = "convolution") -> str:
    return "; ".join(r.reason for r in result.report.refusals if r.rule == rule)


# Every combination


@st.composite
def layer(draw: st.DrawFn, dims: int, channels: tuple[int, int]) -> nn.Module:
    def each(*values: int) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(dims))

    into, out = channels
    groups = [g for g in range(1, into + 1) if not into % g and not out % g]
    stride, padding = each(1, 1, 2, 3), draw(st.sampled_from(["same", "valid", "none", "int"]))
    if padding == "same":
        stride = (1,) * dims
    return CONV[dims](
        *channels,
        each(1, 1, 2, 3),
        stride=stride,
        padding={"none": 0, "int": each(0, 1, 2)}.get(padding, padding),
        dilation=each(1, 1, 2),
        groups=draw(st.sampled_from(groups)),
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(MODES)),
    )


@st.composite
def pairs(draw: st.DrawFn) -> tuple[nn.Module, nn.Module, list[int]]:
    torch.manual_seed(draw(st.integers(0, 99)))
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    into, between, out = draw(
        st.sampled_from([(6, 6, 6), (4, 6, 2), (6, 12, 6), (1, 4, 4), (4, 8, 1)])
    )
    first, second = draw(layer(dims, (into, between))), draw(layer(dims, (between, out)))
    return first, second, [draw(st.integers(3, 9)) for _ in range(dims)]


def wrong_outputs(first: nn.Module, second: nn.Module, sizes: list[int]) -> tuple[float, bool]:
    """Share of wrong outputs if the two are merged all the same, from the outside; and any bias.

    The merged kernel is read off the two layers as impulse responses of their unpadded forms.
    """
    border = best_border(geometry_of(first), geometry_of(second), sizes)
    return border.windows, border.bias > 0 and first.bias is not None


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(pairs(), st.sampled_from(["refuse", "biasmap", "ring"]))
def test_merged_is_unmerged_or_refused(
    drawn: tuple[nn.Module, nn.Module, list[int]], border: str
) -> None:
    first, second, sizes = drawn
    model = seeded(first, second)
    x = torch.randn(2, first.in_channels, *sizes).double()
    try:
        model(x)
    except RuntimeError:
        assume(False)
    result = fold(model, x, border=border)
    same(model, result, x)
    windows, biased = wrong_outputs(first, second, sizes)
    rules = made(result)
    if not windows and not biased:
        assert rules == ["convolution"] or "does not run" in reasons(result)
    elif rules == ["ring"]:
        assert border == "ring" and second.padding_mode == "zeros"
        assert result.report.after.depth == result.report.before.depth == 2
    elif rules == ["biasmap"]:
        assert border == "biasmap" and not windows
    else:
        assert "would be wrong" in reasons(result) or "does not run" in reasons(result)
        assert border != "ring" or second.padding_mode != "zeros" or "not run" in reasons(result)
    if rules in (["convolution"], ["ring"]):
        whole = convolutions(result)[0]
        detail = result.report.folds[0].detail
        for other in range(1, 4):
            if "for input sizes" in detail:
                break
            y = torch.randn(1, first.in_channels, *(n + other for n in sizes)).double()
            same(model, result, y)
        if rules == ["convolution"]:
            groups = math.gcd(first.groups, second.groups)
            assert whole.groups == groups
            assert whole.stride == tuple(
                a * b for a, b in zip(first.stride, second.stride, strict=True)
            )
