"""Dead channels leave whatever a real network puts behind a layer; what must stay has a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layer_collapse.reduce.fold import FoldResult, fold
from layer_collapse.reduce.gate import AffineGate

from .models import Way, lively


class Dense(nn.Module):
    """DenseNet: norm, rectifier, 1x1, norm, rectifier, 3x3, beside what was read."""

    example = (2, 3, 8, 8)

    def __init__(self, growth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.layers = nn.ModuleList()
        width = 6
        for _ in range(3):
            self.layers.append(
                nn.Sequential(
                    nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 8, 1, bias=False),
                    nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, growth, 3, padding=1, bias=False),
                )
            )  # fmt: skip
            width += growth
        self.norm = nn.BatchNorm2d(width)
        self.transition = nn.Conv2d(width, 5, 1, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        x = F.avg_pool2d(self.transition(F.relu(self.norm(torch.cat(found, 1)))), 2)
        return self.head(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))


class Squeeze(nn.Module):
    """SqueezeNet: squeeze 1x1, expand 1x1 beside 3x3."""

    example = (2, 3, 9, 9)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2)
        self.squeeze = nn.ModuleList([nn.Conv2d(6, 4, 1), nn.Conv2d(12, 4, 1)])
        self.one = nn.ModuleList([nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)])
        self.three = nn.ModuleList([nn.Conv2d(4, 7, 3, padding=1) for _ in range(2)])
        self.last = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2, ceil_mode=True)
        for squeeze, one, three in zip(self.squeeze, self.one, self.three, strict=True):
            y = F.relu(squeeze(x))
            x = torch.cat([F.relu(one(y)), F.relu(three(y))], dim=1)
        return F.adaptive_avg_pool2d(self.last(x), 1).flatten(1)


class ResNet(nn.Module):
    """Two stages of basic blocks: an identity and a shortcut with stride."""

    example = (2, 3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.blocks = nn.ModuleList([self._block(6, 6, 1), self._block(6, 8, 2)])
        self.short = nn.Sequential(nn.Conv2d(6, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 3)

    def _block(self, width: int, out: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.blocks[0](x))
        y = self.blocks[1](x)
        y += self.short(x)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(F.relu(y), 1), 1))


class Inverted(nn.Module):
    """MobileNetV2 with squeeze-and-excitation: expand, depthwise, scale, project, add."""

    example = (2, 3, 8, 8)

    def __init__(self, excite: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, 2, 1)
        self.expand = nn.Sequential(nn.Conv2d(5, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.depth = nn.Sequential(
            nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6()
        )
        self.fc1, self.fc2 = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project = nn.Sequential(nn.Conv2d(12, 5, 1, bias=False), nn.BatchNorm2d(5))
        self.head = nn.Linear(5, 3)
        self.excite = excite

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depth(self.expand(x))
        if self.excite:
            scale = self.fc2(F.relu(self.fc1(y.mean((2, 3), keepdim=True))))
            y = y * torch.sigmoid(scale)
        x = x + self.project(y)
        return self.head(x.mean([2, 3]))


class Plain(Inverted):
    """MobileNetV2 as it was."""

    def __init__(self) -> None:
        super().__init__(excite=False)


class ResNeXt(nn.Module):
    """1x1, grouped 3x3, 1x1 beside the identity."""

    example = (2, 3, 7, 7)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.reduce = nn.Sequential(nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.group = nn.Sequential(
            nn.Conv2d(12, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.widen = nn.Conv2d(8, 6, 1)
        self.head = nn.Conv2d(6, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.widen(self.group(self.reduce(x)))))


NETWORKS = (Dense, Squeeze, ResNet, Inverted, Plain, ResNeXt)


def silence(model: nn.Module, share: float, seed: int) -> None:
    """Take the weights of random rows, most of them with a bias that sends nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and name != "head":
                off = torch.rand(len(layer.weight), generator=generator) < share
                layer.weight[off] = 0
                if layer.bias is not None:
                    layer.bias[off & (torch.rand(len(off), generator=generator) < 0.5)] = 0
            if isinstance(layer, nn.BatchNorm2d):
                off = torch.rand(len(layer.weight), generator=generator) < share
                layer.bias[off] = -layer.bias[off].abs()


#: Rules that would take away the layers whose channels a test looks at.
MERGES = ("convolution", "residual", "forward")


def check(model: nn.Module, x: Tensor | None = None, without: Sequence[str] = ()) -> FoldResult:
    """Fold in float64; equal to the model at two sizes, borders included."""
    model = model.double().eval()
    x = torch.randn(model.example) if x is None else x  # type: ignore[arg-type]
    result = fold(model, x.double(), without=without)
    sizes = [x.double()]
    if x.ndim == 4:
        sizes.append(torch.randn(1, x.shape[1], x.shape[2] + 3, x.shape[3] + 6).double())
    tried = {tuple(shape[2:]) for shapes in result.report.checked_sizes for shape in shapes}
    if result.report.only_sizes or len(tried) < 2:
        del sizes[1:]  # the model takes one size only, or the folded one does
    for sample in sizes:
        with torch.no_grad():
            expected, got = copy.deepcopy(model)(sample), result.model(sample)
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
    return result


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def reasons(result: FoldResult) -> str:
    return " / ".join(r.reason for r in result.report.refusals if r.rule == "neurons")


@settings(max_examples=60, deadline=None)
@given(
    network=st.sampled_from(NETWORKS),
    share=st.sampled_from([0.1, 0.3, 0.6]),
    seed=st.integers(0, 10_000),
)
def test_random_dead_channels(network: Callable[[], nn.Module], share: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = lively(network())
    silence(model, share, seed)
    result = check(model)
    if any(r.rule == "cut" for r in result.report.refusals):
        return
    layers = [m for m in result.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    silent = sum(int((m.weight.flatten(1) == 0).all(1).sum()) for m in layers)
    assert "relative error" not in reasons(result)
    assert not silent or reasons(result)  # what is dead leaves, or is told why it stays
    norms = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    removed = any(f.rule == "neurons" for f in result.report.folds)
    assert (parameters(result.model) < parameters(model)) == (norms or removed)


def dead(layer: nn.Module, *rows: int) -> None:
    with torch.no_grad():
        layer.weight[list(rows)] = 0  # type: ignore[index]
        if layer.bias is not None:
            layer.bias[list(rows)] = 0  # type: ignore[index]


def ready(network: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return lively(network())


def shape(result: FoldResult, name: str) -> tuple[int, ...]:
    return tuple(result.model.get_submodule(name).weight.shape)


def test_dense_net_loses_them_in_every_concatenation() -> None:
    model = ready(Dense)
    dead(model.stem, 1, 2)
    dead(model.layers[0][5], 0)
    dead(model.layers[1][5], 3)
    dead(model.layers[1][2], 4, 5)
    for module in model.modules():  # what a dead channel sends must not meet a border
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, -1.0)
            nn.init.zeros_(module.running_mean)
    result = check(model)
    assert shape(result, "stem") == (4, 3, 3, 3)
    assert shape(result, "layers.0.5") == (3, 8, 3, 3)
    assert shape(result, "layers.1.5") == (3, 6, 3, 3)
    assert shape(result, "layers.0.2") == (8, 4, 1, 1)
    assert shape(result, "layers.1.2") == (6, 4 + 3, 1, 1)
    assert shape(result, "layers.2.2") == (8, 4 + 3 + 3, 1, 1)
    assert shape(result, "transition") == (5, 4 + 3 + 3 + 4, 1, 1)
    assert shape(result, "norm") == (14,)
    assert reasons(result) == ""


def test_a_value_without_a_channel_left_leaves_the_concatenation() -> None:
    model = ready(Dense)
    dead(model.layers[1][5], 0, 1, 2, 3)
    result = check(model)
    names = {name for name, _ in result.model.named_modules()}
    assert not names & {"layers.1.0", "layers.1.2", "layers.1.5"}
    assert shape(result, "layers.2.2") == (8, 6 + 4, 1, 1)
    squeeze = ready(Squeeze)
    dead(squeeze.one[0], *range(5))
    result = check(squeeze)
    assert "one.0" not in dict(result.model.named_modules())
    assert shape(result, "squeeze.1") == (4, 7, 1, 1)


def test_squeeze_net_keeps_what_its_border_needs() -> None:
    model = ready(Squeeze)
    dead(model.one[0], 0, 4)
    dead(model.three[0], 1)
    dead(model.squeeze[0], 2)
    with torch.no_grad():
        model.three[0].bias[1] = 1.0  # sends 1 into a 1x1 convolution: into its bias
        model.squeeze[1].weight[3] = 0
        model.squeeze[1].bias[3] = 2.0  # sends 2 into a padded 3x3 one: stays
    result = check(model)
    assert shape(result, "squeeze.0") == (3, 6, 1, 1)
    assert shape(result, "three.0") == (6, 3, 3, 3)
    assert shape(result, "squeeze.1") == (4, 9, 1, 1)
    assert "border of zero padding in 'three.1'" in reasons(result)


def test_a_stream_loses_a_channel_that_is_dead_in_every_summand() -> None:
    model = ready(ResNet)
    for norm in (model.bn, model.blocks[0][4], model.blocks[1][4], model.short[1]):
        nn.init.constant_(norm.bias, -1.0)
        nn.init.zeros_(norm.running_mean)
    dead(model.stem, 0, 3)
    dead(model.blocks[0][3], 0, 2)  # 0 in both summands; 2 and 3 in one of them
    dead(model.blocks[1][3], 5)
    dead(model.short[0], 5, 6)
    result = check(model)
    assert shape(result, "stem") == (5, 3, 3, 3)
    assert shape(result, "blocks.0.0") == (6, 5, 3, 3)
    assert shape(result, "blocks.0.3") == (5, 6, 3, 3)
    assert shape(result, "short.0") == (7, 5, 1, 1)
    assert shape(result, "blocks.1.3") == (7, 8, 3, 3)
    assert shape(result, "head") == (3, 7)
    assert "not constant where" in reasons(result)


@pytest.mark.parametrize("where", ["expand", "depth"])
def test_squeeze_and_excitation_loses_both_factors(where: str) -> None:
    model = ready(Inverted)
    dead(model.get_submodule(where)[0], 1, 7)
    for norm in (model.expand[1], model.depth[1]):
        nn.init.constant_(norm.bias, -1.0)  # relu6 sends zero, whatever the other factor is
        nn.init.zeros_(norm.running_mean)
    result = check(model)
    for name in ("expand.0", "depth.0", "fc2"):
        assert shape(result, name)[0] == 10
    assert shape(result, "fc1")[1] == shape(result, "project.0")[1] == 10


def test_a_factor_that_varies_keeps_its_channel() -> None:
    model = ready(Inverted)
    dead(model.depth[0], 1)
    with torch.no_grad():
        model.depth[1].bias[1], model.depth[1].running_mean[1] = 1.0, 0.0  # one times sigmoid(...)
    result = check(model)
    assert shape(result, "depth.0")[0] == 12
    assert "not constant where 'project.0' reads them" in reasons(result)
    dead(model.fc2, 1)  # now both factors are constant
    assert shape(check(model), "depth.0")[0] == 11


def test_constants_of_constants() -> None:
    """Rows that are constant as all that they read is: the proof must not make that random."""
    model = ready(Inverted)
    dead(model.depth[0], *range(12))
    with torch.no_grad():
        model.depth[1].bias[::2] = 1.0
        model.depth[1].running_mean.zero_()
    result = check(model)
    assert not any("relative error" in r.reason for r in result.report.refusals)


def test_a_factor_of_dead_channels_alone_serves_every_size() -> None:
    model = ready(Inverted)
    dead(model.fc2, *range(12))  # the factor is 0.5, for all channels
    result = check(model)
    assert not {"fc1", "fc2"} & {name for name, _ in result.model.named_modules()}
    assert result.report.only_sizes is None


def test_grouped_convolutions_lose_equal_counts_or_whole_groups() -> None:
    model = ready(ResNeXt)
    for norm in (model.reduce[1], model.group[1]):
        nn.init.constant_(norm.bias, -1.0)
        nn.init.zeros_(norm.running_mean)
    equal = copy.deepcopy(model)
    dead(equal.reduce[0], 0, 4, 5, 7, 11)  # groups of 3: one, two, one, one
    result = check(equal)
    assert shape(result, "group.0") == (8, 2, 3, 3)
    assert result.model.get_submodule("group.0").groups == 4
    assert "groups of 'group.0' would be left unequal" in reasons(result)
    whole = copy.deepcopy(model)
    dead(whole.reduce[0], 3, 4, 5)
    result = check(whole)  # what the group gives is constant, as all that it reads is
    assert shape(result, "group.0") == (6, 3, 3, 3)
    assert result.model.get_submodule("group.0").groups == 3
    assert shape(result, "widen") == (6, 6, 1, 1)
    one = copy.deepcopy(model)
    dead(one.group[0], 0)
    result = check(one)
    assert shape(result, "group.0") == (8, 3, 3, 3)
    assert "groups of 'group.0' would be left unequal" in reasons(result)


class Tokens(nn.Module):
    """One block with attention behind a LayerNorm, channels last as in ConvNeXt."""

    example = (2, 3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return self.head((x + self.down(F.relu(self.up(x)))).mean(1))


def test_attention_and_layer_norm_read_every_channel() -> None:
    model = ready(Tokens)
    dead(model.qkv, 0)
    dead(model.proj, 1)
    dead(model.stem, 1)
    dead(model.down, 1)
    dead(model.up, 3, 4)
    result = check(model)
    assert shape(result, "qkv") == (24, 8)
    assert shape(result, "up") == (14, 8)
    assert "'norm' normalises over all channels" in reasons(result)
    assert "(chunk) mixes or regroups them" in reasons(result)


def _sized(s, x):  # type: ignore[no-untyped-def]
    y = s.a(x)
    return s.b(y.reshape(y.shape[0], y.shape[1], -1).mean(2))


def _summed(s, x):  # type: ignore[no-untyped-def]
    y = s.a(x)
    n, c, *_ = y.size(0), y.size(1)
    return s.b(y.mean((2, 3)) / c + n)


@pytest.mark.parametrize(
    ("forward", "reader", "expected"),
    [
        (_sized, nn.Linear(4, 2), "reads their number"),
        (_summed, nn.Linear(4, 2), "reads their number"),
        (lambda s, x: torch.tanh(s.a(x)), nn.Identity(), "an output of the network"),
        (lambda s, x: s.b(torch.softmax(s.a(x), 1)), nn.Conv2d(4, 2, 1), "(softmax) mixes"),
        (lambda s, x: s.b(s.a(x)), nn.ConvTranspose2d(4, 2, 1), "(ConvTranspose2d) needs them all"),
        (lambda s, x: s.b(s.a(x)), nn.Linear(6, 2), "'b' mixes what lies beside them"),
        (lambda s, x: s.b(s.a(x) + x), nn.Conv2d(4, 2, 1), "(add) mixes or regroups them"),
        (lambda s, x: s.b(s.a(x).roll(1, 1)), nn.Conv2d(4, 2, 1), "(roll) mixes or regroups them"),
    ],
)  # fmt: skip
def test_what_must_stay_has_a_reason(forward, reader: nn.Module, expected: str) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = Way(forward, a=nn.Conv2d(4, 4, 1), b=reader)
    dead(model.a, 2)
    result = check(model, torch.randn(3, 4, 6, 6), MERGES)
    assert shape(result, "a") == (4, 4, 1, 1)
    assert expected in reasons(result)
    assert not any(f.rule == "neurons" for f in result.report.folds)


def test_sizes_beside_the_channels_do_not_hold_them() -> None:
    def forward(s, x):  # type: ignore[no-untyped-def]
        y = s.a(x)
        n, _, height, width = y.shape
        return s.b(y.view(n, -1, height * width).mean(2) / y.size(-1))

    model = Way(forward, a=nn.Conv2d(4, 4, 1), b=nn.Linear(4, 2))
    dead(model.a, 2)
    result = check(model, torch.randn(3, 4, 6, 6))
    assert (shape(result, "a"), shape(result, "b")) == ((3, 4, 1, 1), (2, 3))


def test_layers_that_must_not_change_hold_their_channels_only() -> None:
    model = ready(Dense)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, -1.0)
            nn.init.zeros_(module.running_mean)
    dead(model.layers[0][5], 0)
    dead(model.stem, 1)
    model.stem.register_forward_hook(lambda *_: None)
    result = check(model)
    assert shape(result, "stem")[0] == 6
    assert shape(result, "layers.0.5")[0] == 3
    assert "'stem' has hooks" in reasons(result)


def test_a_gate_behind_a_sum_makes_its_channels_constant() -> None:
    scale = torch.tensor([1.0, 0.0, 1.0, 0.0])
    model = Way(
        lambda s, x: s.out(s.gate(s.a(x) + s.b(x))),
        a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(3, 4, 1),
        gate=AffineGate(scale, 2 * (1 - scale), 1), out=nn.Conv2d(4, 2, 3),
    )  # fmt: skip
    x = torch.randn(2, 3, 7, 7).double()
    result = fold(model.double(), x, without=MERGES)
    assert shape(result, "a")[0] == shape(result, "b")[0] == 2
    assert torch.allclose(result.model(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shaped", "leave"),
    [
        (lambda y: y.view(-1, 6 * 4 * 4), False),
        (lambda y: torch.reshape(y, (y.size(0), 96)), False),
        (lambda y: y.view(y.size(0), 6, -1).flatten(1), False),
        (lambda y: y.view(y.size(0), -1), True),
        (lambda y: y.flatten(1), True),
    ],
)
def test_sizes_that_are_written_out_keep_channels_and_are_named(
    shaped: Callable[[Tensor], Tensor], leave: bool
) -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.act, self.fc = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Linear(96, 4)
            with torch.no_grad():
                self.conv.weight[2:4] = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(shaped(self.act(self.conv(x))))

    report = fold(Viewed().eval(), torch.randn(2, 3, 6, 6)).report
    assert [f.rule for f in report.folds] == (["neurons"] if leave else [])
    reasons = [r.reason for r in report.refusals if r.rule == "neurons"]
    told = "writes out their number; write flatten(1) instead"
    assert all(told in reason for reason in reasons)
    assert bool(reasons) is not leave
