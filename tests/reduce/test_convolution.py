"""Merged convolutions against the two they came from: borders, groups, sizes, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from layer_collapse.reduce import ring
from layer_collapse.reduce.border import best_border
from layer_collapse.reduce.convolutions import geometry_of, merged
from layer_collapse.reduce.fold import FoldResult, fold
from layer_collapse.reduce.gate import AffineGate, ConstantBias, FixedSize
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
    found = best_border(geometry_of(first), geometry_of(second), sizes)
    windows, biased = found.windows, found.bias > 0 and first.bias is not None
    rules = made(result)
    if not windows and not biased:
        assert rules == ["convolution"] or "once at most" in reasons(result)
    elif rules == ["ring"]:
        assert (border, second.padding_mode) == ("ring", "zeros")
        assert result.report.after.depth == result.report.before.depth == 2
    elif rules[:1] == ["biasmap"]:  # a map that is uniform at this size is absorbed
        assert (border, windows) == ("biasmap", 0)
    else:
        assert "would be wrong" in reasons(result) or "once at most" in reasons(result)
        assert (
            border != "ring" or second.padding_mode != "zeros" or "once at most" in reasons(result)
        )
    if rules in (["convolution"], ["ring"]):
        whole = convolutions(result)[0]
        detail = result.report.folds[0].detail
        for other in range(1, 4):
            if "for input sizes" in detail or "for this input size only" in detail:
                break
            y = torch.randn(1, first.in_channels, *(n + other for n in sizes)).double()
            same(model, result, y)
        if rules == ["convolution"]:
            groups = math.gcd(first.groups, second.groups)
            assert whole.groups == groups
            assert whole.stride == tuple(
                a * b for a, b in zip(first.stride, second.stride, strict=True)
            )


# What must merge


def grid(*shape: int) -> Tensor:
    return torch.randn(2, *shape).double()


C = nn.Conv2d
EXACT = {
    "3x3 then 1x1": (C(4, 6, 3, padding=1), C(6, 5, 1), (4, 7, 6)),
    "3x3 stride 2 then 1x1 stride 2": (C(4, 6, 3, 2, 1), C(6, 5, 1, 2), (4, 9, 8)),
    "unpadded 3x3 then unpadded 3x3": (C(4, 6, 3), C(6, 5, 3), (4, 7, 6)),
    "padded 5x5 stride 3 then valid 3x3": (C(4, 6, 5, 3, 2), C(6, 5, 3, 2, "valid"), (4, 15, 17)),
    "1x1 then padded 3x3, no bias": (C(4, 6, 1, bias=False), C(6, 5, 3, padding=1), (4, 7, 6)),
    "padded 1x1 then padded 3x3, no bias": (
        C(4, 6, 1, padding=2, bias=False), C(6, 5, 3, padding=1), (4, 7, 6)),
    "padded strided 1x1 then padded 3x3, no bias": (
        C(4, 6, 1, 2, 1, bias=False), C(6, 5, 3, 2, padding=1), (4, 8, 7)),
    "full 3x3 then padded 3x3, no bias": (
        C(4, 6, 3, padding=2, bias=False), C(6, 5, 3, padding=1), (4, 7, 6)),
    "patches then padded 3x3, no bias": (
        C(3, 6, 4, 4, bias=False), C(6, 5, 3, padding=1), (3, 16, 12)),
    "circular then circular": (
        C(4, 6, 3, padding=1, padding_mode="circular"),
        C(6, 5, 5, padding="same", padding_mode="circular"), (4, 7, 6)),
    "circular same size, even kernels": (
        C(4, 6, 2, padding="same", padding_mode="circular"),
        C(6, 5, 4, padding="same", padding_mode="circular"), (4, 7, 6)),
    "circular patches then circular": (
        C(4, 6, 2, 2), C(6, 5, 3, padding=1, padding_mode="circular"), (4, 8, 6)),
    **{f"1x1 with bias then {mode}": (
        C(4, 6, 1), C(6, 5, 3, 2, padding=1, padding_mode=mode), (4, 7, 6)) for mode in MODES[1:]},
    "depthwise then pointwise": (C(6, 6, 3, padding=1, groups=6), C(6, 5, 1), (6, 7, 6)),
    "pointwise then depthwise, no bias": (
        C(5, 6, 1, bias=False), C(6, 12, 3, padding=1, groups=6), (5, 7, 6)),
    "groups 4 then 6": (C(12, 24, 3, groups=4), C(24, 6, 3, groups=6), (12, 7, 8)),
    "dilated then dilated": (C(2, 3, 3, dilation=2), C(3, 2, 3, dilation=4), (2, 15, 16)),
    "conv1d": (nn.Conv1d(4, 6, 5, padding=2), nn.Conv1d(6, 5, 3, 2), (4, 17)),
    "conv3d": (nn.Conv3d(2, 4, (1, 3, 3), padding=1), nn.Conv3d(4, 2, (3, 1, 2)), (2, 5, 6, 7)),
}  # fmt: skip


@pytest.mark.parametrize("border", ["refuse", "biasmap", "ring"])
@pytest.mark.parametrize("case", EXACT)
def test_exact_cases_merge(case: str, border: str) -> None:
    first, second, shape = EXACT[case]
    model, x = seeded(first, second), grid(*shape)
    result = fold(model, x, border=border)
    assert made(result) == ["convolution"]
    assert result.report.after.depth == 1
    same(model, result, x)
    if "patches" not in case:
        same(model, result, grid(shape[0], *(n + 3 for n in shape[1:])))
    else:
        assert "for input sizes" in result.report.folds[0].detail
        same(model, result, grid(shape[0], *(n + 4 for n in shape[1:])))


@pytest.mark.parametrize(
    ("first", "second", "kernel", "dilation"),
    [
        (C(2, 3, 3, dilation=2), C(3, 2, 1), (3, 3), (2, 2)),
        (C(2, 3, 1, stride=2), C(3, 2, 3, dilation=3), (3, 3), (6, 6)),
        (C(2, 3, 3, dilation=2), C(3, 2, 3, dilation=4), (7, 7), (2, 2)),
        (C(2, 3, (3, 1), dilation=(2, 1)), C(3, 2, (1, 3), dilation=(1, 2)), (3, 3), (2, 2)),
        (C(2, 3, 3, stride=2), C(3, 2, 3), (7, 7), (1, 1)),
        (C(2, 3, 1), C(3, 2, 1), (1, 1), (1, 1)),
    ],
)
def test_dilation_stays(first, second, kernel, dilation) -> None:  # type: ignore[no-untyped-def]
    model, x = seeded(first, second), grid(2, 15, 16)
    result = fold(model, x)
    (whole,) = convolutions(result)
    assert (whole.kernel_size, whole.dilation) == (kernel, dilation)
    same(model, result, x)


def test_names_layout_and_dtype_stay() -> None:
    model = nn.Sequential(C(4, 6, 3), nn.Dropout2d(), C(6, 5, 3)).eval()
    model = model.to(memory_format=torch.channels_last)
    model.requires_grad_(False)
    result = fold(model, torch.randn(2, 4, 9, 9))
    whole = result.model.get_submodule("2")
    assert type(whole) is C
    assert whole.weight.dtype == torch.float32
    assert whole.weight.is_contiguous(memory_format=torch.channels_last)
    assert not whole.weight.requires_grad
    assert repr(whole) == repr(C(4, 5, 5))
    assert "3x3 and 3x3 become 5x5" in result.report.folds[0].detail


# Borders


@pytest.mark.parametrize(
    ("pixels", "share"), [(112, 3.5), (28, 14), (14, 27), (8, 44), (4, 75), (2, 100)]
)
def test_share_of_wrong_outputs(pixels: int, share: float) -> None:
    first, second = C(2, 3, 3, padding=1), C(3, 2, 3, padding=1)
    model, x = seeded(first, second), grid(2, pixels, pixels)
    result = fold(model, x)
    assert made(result) == []
    assert f"{share:g} % of the outputs would be wrong" in reasons(result)
    with torch.no_grad():  # as it would have been
        wrong = (merged(first, second, "zeros")(x) - model(x)).abs().amax(dim=(0, 1)) > 1e-10
    assert 100 * float(wrong.double().mean()) == pytest.approx(share, rel=0.02)


def test_bias_map_for_one_size_only() -> None:
    model, x = seeded(C(4, 6, 1), nn.BatchNorm2d(6), C(6, 5, 3, 2, 1)), grid(4, 8, 7)
    result = fold(model, x)
    assert made(result) == ["batch norm", "biasmap"]
    assert result.report.after.depth == 1
    assert len(result.report.checked_sizes) == 3
    (bias,) = [m for m in result.model.children() if isinstance(m, ConstantBias)]
    assert bias.value.shape == (5, 4, 4)
    assert result.model.get_submodule("2").bias is None
    same(model, result, x)
    with pytest.raises(ValueError, match=r"folded for inputs of shape .* only"):
        result.model(grid(4, 12, 7))
    refused = fold(model, x, border="refuse")
    assert "meets the bias of '0': 62 % of the outputs" in reasons(refused)
    ringed = fold(model, x, border="ring")
    assert made(ringed) == ["batch norm", "ring"]
    same(model, ringed, grid(4, 12, 9))


def test_bias_that_nobody_reads_is_no_bias() -> None:
    first, second = C(4, 6, 1), C(6, 5, 3, padding=1)
    model = seeded(first, second)
    with torch.no_grad():
        first.bias[1:] = 0
        second.weight[:, 0] = 0
    assert "convolution" in made(fold(model, grid(4, 5, 5)))


RINGS = {
    "3x3 twice": (C(4, 6, 3, padding=1), C(6, 5, 3, padding=1), (4, 9, 8)),
    "strided": (C(4, 6, 3, 2, 1), C(6, 5, 5, 2, 2), (4, 13, 16)),
    "dilated groups": (
        C(4, 6, 3, padding=2, dilation=2, groups=2), C(6, 9, 3, padding=3, dilation=3, groups=3),
        (4, 12, 11)),
    "circular first": (
        C(4, 6, 3, padding=1, padding_mode="circular"), C(6, 5, 3, padding=1), (4, 6, 7)),
    "reflect first": (
        C(4, 6, 3, padding=2, padding_mode="reflect"), C(6, 5, 3, padding=1), (4, 6, 7)),
    "even same": (C(4, 6, 2, padding="same"), C(6, 5, 4, padding="same"), (4, 6, 7)),
    "one side": (C(4, 6, 3, padding=(0, 1)), C(6, 5, 3, padding=(1, 0)), (4, 6, 7)),
    "tiny": (C(4, 6, 3, padding=1), C(6, 5, 5, padding=2), (4, 1, 2)),
    "1d": (nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 5, 3, 3, padding=2), (4, 11)),
    "3d": (nn.Conv3d(2, 3, 3, padding=1), nn.Conv3d(3, 2, 3, 2, padding=1), (2, 4, 5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("case", RINGS)
def test_ring_is_exact_at_every_size(case: str, tmp_path: Path) -> None:
    first, second, shape = RINGS[case]
    model, x = seeded(first, second), grid(*shape)
    result = fold(model, x, border="ring")
    assert made(result) == ["ring"]
    assert result.report.after.depth == result.report.before.depth == 2
    for more in range(5):
        same(model, result, grid(shape[0], *(n + more for n in shape[1:])))
    same(model, result, x[0])  # without a batch
    save_folded(result.model, tmp_path / "ring.safetensors")
    loaded = load_folded(tmp_path / "ring.safetensors")
    assert torch.equal(loaded(x), result.model(x))


def test_ring_works_on_strips_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = C(4, 4, 3, padding=1), C(4, 4, 3, padding=1)
    model = seeded(first, second)
    result = fold(model, grid(4, 40, 40), border="ring")
    seen = list[int]()
    real = F.conv2d

    def counting(x: Tensor, *args: object, **options: object) -> Tensor:
        seen.append(x.shape[2] * x.shape[3])
        return real(x, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setitem(ring._CONV, 2, counting)
    result.model(grid(4, 40, 40))
    assert len(seen) == 8  # two layers, four sides
    assert sum(seen) < 40 * 40


def test_ring_in_float32_and_exported() -> None:
    model = nn.Sequential(C(4, 6, 3, padding=1), C(6, 5, 3, padding=1)).eval()
    x = torch.randn(2, 4, 9, 8)
    result = fold(model, x, border="ring")
    assert isinstance(result.model.get_submodule("1"), RingConv)
    program = torch.export.export(result.model, (x,))
    with torch.no_grad():
        assert torch.allclose(result.model(x), model(x), atol=1e-5)
        assert torch.allclose(program.module()(x), result.model(x), atol=1e-6)


# Batch norms and gates around them


def gate(channels: int, offsets: bool = True) -> AffineGate:
    scale = torch.tensor([1.0, 0.0, 0.1, 0.0, 1.0, 1.0])[:channels]
    offset = torch.tensor([0.0, 6.0, 0.0, 0.0, 0.0, 0.0])[:channels]
    return AffineGate(scale, offset if offsets else torch.zeros(channels))


def test_batch_norm_before_between_and_after() -> None:
    layers = (
        nn.BatchNorm2d(4), C(4, 6, 3), nn.BatchNorm2d(6), gate(6), C(6, 6, 3),
        nn.BatchNorm2d(6), gate(6), C(6, 5, 1), nn.BatchNorm2d(5),
    )  # fmt: skip
    model, x = seeded(*layers), grid(4, 9, 9)
    result = fold(model, x)
    assert [type(m) for m in result.model.children()] == [C]
    same(model, result, x)
    same(model, result, grid(4, 12, 11))
    assert {"batch norm", "gate", "neurons", "convolution", "forward"} == set(made(result))


def test_batch_norm_in_front_of_zero_padding_is_a_map() -> None:
    model, x = seeded(nn.BatchNorm2d(4), C(4, 6, 3, padding=1)), grid(4, 6, 7)
    result = fold(model, x)
    assert made(result) == ["biasmap"]
    assert {type(m) for m in result.model.children()} == {C, ConstantBias, FixedSize}
    same(model, result, x)
    for border in ("refuse", "ring"):
        refused = fold(model, x, border=border)
        assert made(refused) == []
        assert "border map" in reasons(refused, "forward")


def test_one_pixel_hides_the_border() -> None:
    """On 1x1 inputs the map looks like a bias; it holds for no other size."""
    model, x = seeded(nn.BatchNorm2d(4), C(4, 6, 3, padding=1)), grid(4, 1, 1)
    assert made(fold(model, x, border="refuse")) == []
    same(model, fold(model, x), x)
    assert len(fold(model, x).report.checked_sizes) == 3  # one sample more, no second size


def test_maps_move_on_so_that_everything_merges() -> None:
    """An inverted bottleneck: 1x1, depthwise 3x3, 1x1 become one 3x3 and one map."""
    layers = (
        C(4, 6, 1, bias=False), nn.BatchNorm2d(6), gate(6, False),
        C(6, 6, 3, 2, 1, groups=6, bias=False), nn.BatchNorm2d(6), gate(6),
        C(6, 4, 1, bias=False), nn.BatchNorm2d(4),
    )  # fmt: skip
    model, x = seeded(*layers), grid(4, 8, 7)
    result = fold(model, x)
    assert sorted(type(m).__name__ for m in result.model.children()) == [
        "ConstantBias",
        "Conv2d",
        "FixedSize",
    ]
    assert result.report.after.depth == 1
    same(model, result, x)


# What keeps two convolutions apart


def test_layers_that_must_not_change() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = C(4, 4, 1), C(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.conv(torch.tanh(self.conv(x))))

    class Twice(Shared):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.last(y) * torch.tanh(y)

    x = grid(4, 5, 5)
    assert "shared" in reasons(fold(Shared().double(), x))
    assert "used elsewhere" in reasons(fold(Twice().double(), x))
    for number in (0, 1):
        hooked = seeded(C(4, 4, 1), C(4, 4, 1))
        hooked[number].register_forward_hook(lambda *_: None)
        assert "hooks" in reasons(fold(hooked, x))
        parametrised = seeded(C(4, 4, 1), C(4, 4, 1))
        parametrizations.weight_norm(parametrised[number])
        assert "parametrisation" in reasons(fold(parametrised, x))
    tied = seeded(C(4, 4, 1), C(4, 4, 1))
    tied[1].weight = tied[0].weight
    assert "tied" in reasons(fold(tied, x))
    assert made(fold(seeded(C(4, 4, 1), nn.Tanh(), C(4, 4, 1)), x)) == []
    mixed = seeded(C(4, 4, 1), C(4, 4, 1))
    result = fold(mixed, x, without=["convolution"])
    assert made(result) == []


@pytest.mark.parametrize(
    ("pool", "name"),
    [
        (nn.MaxPool2d(2), "max pooling stands between '0' and it"),
        (nn.AdaptiveMaxPool2d(2), "max pooling"),
        (nn.AvgPool2d(2), "average pooling is linear, but it stands between '0' and it"),
        (nn.AdaptiveAvgPool2d(2), "average pooling"),
    ],
)
def test_pooling_is_named(pool: nn.Module, name: str) -> None:
    x = grid(4, 6, 6)
    assert name in reasons(fold(seeded(C(4, 4, 1), pool, C(4, 4, 1)), x))
    flat = seeded(C(4, 4, 1), nn.Dropout(), pool, nn.Flatten(), nn.Linear(4 * 4 * 1, 3))
    if pool(x).flatten(1).shape[1] == 16:
        assert name in reasons(fold(flat, x))


def test_functional_pooling_and_flattening_are_named() -> None:
    class Head(nn.Module):
        def __init__(self, pool: bool) -> None:
            super().__init__()
            self.conv, self.fc = C(4, 4, 1), nn.Linear(16, 3)
            self.pool = pool

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y = F.max_pool2d(y, 3) if self.pool else y
            return self.fc(y.flatten(1))

    assert "max pooling stands" in reasons(fold(Head(True).double(), grid(4, 6, 6)))
    assert "flattening is linear" in reasons(fold(Head(False).double(), grid(4, 2, 2)))


def test_circular_padding_goes_around_once_at_most() -> None:
    """Two layers may go around further than one of torch's can: 3 and 3 on 5 pixels."""
    pad = {"padding": 3, "padding_mode": "circular"}
    model = seeded(C(2, 3, 7, **pad), C(3, 2, 7, **pad))
    result = fold(model, grid(2, 5, 6))
    assert made(result) == []
    (refused,) = result.report.refusals
    assert (
        "would pad 5 pixels by 6 in mode 'circular', and torch goes around once" in refused.reason
    )
    with pytest.raises(RuntimeError, match="wrapping around more than once"):
        nn.functional.pad(grid(2, 5, 6), (6, 6, 6, 6), mode="circular")
    larger = fold(model, grid(2, 6, 6))
    assert made(larger) == ["convolution"]
    same(model, larger, grid(2, 6, 6))


def test_mixed_padding_modes_are_refused() -> None:
    model = seeded(
        C(4, 6, 3, padding=(1, 0), padding_mode="circular"),
        C(6, 5, 3, padding=(0, 1), padding_mode="reflect"),
    )
    assert "reflect padding would pad the input of '0'" in reasons(fold(model, grid(4, 6, 6)))


def test_unknown_border() -> None:
    with pytest.raises(ValueError, match="border must be one of"):
        fold(seeded(C(4, 4, 1)), grid(4, 5, 5), border="crop")
