"""Gates in place of linear rectifiers: the same bits on the scanned data, or a refusal."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layer_collapse.measure.scan import scan
from layer_collapse.measure.tracker import track
from layer_collapse.prune.rounds import CutError
from layer_collapse.reduce.fold import fold
from layer_collapse.reduce.gate import AffineGate
from layer_collapse.reduce.linearize import linearize

FAR = 50.0  # a bias that no input outweighs


def samples(n: int = 64, width: int = 6) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(7))


class Net(nn.Module):
    """Two rectifiers with a way around each; ``bias`` forces the first one's neurons."""

    def __init__(self, act: nn.Module, bias: list[float], width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.fc1, self.act, self.fc2 = nn.Linear(width, len(bias)), act, nn.Linear(len(bias), width)
        self.fc3, self.head = nn.Linear(width, 5), nn.Linear(5, 3)
        self.other = nn.ReLU()
        with torch.no_grad():
            self.fc1.bias.copy_(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.fc2(self.act(self.fc1(x)))
        return self.head(self.other(self.fc3(x))) + branch[:, :3]


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def equal(a: Tensor, b: Tensor, act: nn.Module) -> bool:
    """Same bits; behind a smooth rectifier, whose kernel rounds a value by its place, 4 ulp."""
    if isinstance(act, nn.GELU | nn.SiLU | nn.Hardswish):
        return torch.allclose(a, b, rtol=0, atol=4 * 2**-23 * float(b.abs().max()))
    return same_bits(a, b)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def prelu(*slopes: float) -> nn.PReLU:
    module = nn.PReLU(len(slopes))
    with torch.no_grad():
        module.weight.copy_(torch.tensor(slopes))
    return module


ON, OFF = [FAR] * 4, [-FAR] * 4
BOTH = [FAR, -FAR, FAR, -FAR]
GATES = {
    "relu on": (nn.ReLU(), ON, [1, 1, 1, 1], [0] * 4),
    "relu off": (nn.ReLU(), OFF, [0] * 4, [0] * 4),
    "relu both": (nn.ReLU(), BOTH, [1, 0, 1, 0], [0] * 4),
    "relu in place": (nn.ReLU(inplace=True), BOTH, [1, 0, 1, 0], [0] * 4),
    "relu6": (nn.ReLU6(), [3.0, -FAR, FAR, -FAR], None, [0, 0, 6, 0]),
    "relu6 saturated": (nn.ReLU6(), ON, [0] * 4, [6] * 4),
    "leaky": (nn.LeakyReLU(0.25), BOTH, [1, 0.25, 1, 0.25], [0] * 4),
    "leaky default": (nn.LeakyReLU(), OFF, [0.01] * 4, [0] * 4),
    "prelu": (prelu(0.5, 0.25, -1.0, 2.0), BOTH, [1, 0.25, 1, 2], [0] * 4),
    "prelu one slope": (prelu(0.125), BOTH, [1, 0.125, 1, 0.125], [0] * 4),
    "hardswish": (nn.Hardswish(), BOTH, [1, 0, 1, 0], [0] * 4),
}


@pytest.mark.parametrize("case", [*GATES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_sided_layers_give_the_same_bits(case: str, dtype: torch.dtype) -> None:
    act, bias, scale, offset = GATES[case]
    model, x = Net(copy.deepcopy(act), bias).to(dtype), samples().to(dtype)
    if case == "relu6":  # inside 0..6 for these inputs
        with torch.no_grad():
            model.fc1.weight[0] *= 0.1
        scale = [1, 0, 0, 0]
    report = scan(model, list(x.split(20)), x[:3])
    assert report["act"].state == "one-sided"
    result = linearize(model, report, x[:3])
    assert (result.exact, result.approximate) == (("act",), ())
    gate = result.model.get_submodule("act")
    assert isinstance(gate, AffineGate)
    assert gate.scale.tolist() == pytest.approx(scale)
    assert gate.offset.tolist() == offset
    assert gate.scale.dtype == dtype
    got, expected = logits(result.model, x), logits(model, x)
    if case == "hardswish":  # z * 6 / 6 rounds: equal to the last bit or two
        torch.testing.assert_close(got, expected, rtol=4e-7, atol=2e-5)
    else:
        assert same_bits(got, expected)
    assert "neurons switch" in result.kept["other"]
    assert {k for k in result.model.state_dict() if "act" not in k} == {
        k for k in model.state_dict() if "act" not in k
    }


def test_values_at_the_edges_are_not_switches() -> None:
    """Zero is on the border: z in {0, +} is on, z in {0, -} and z = 0 are off."""
    model, x = Net(nn.ReLU(), [0.0] * 4), samples().abs()
    with torch.no_grad():
        model.fc1.weight.copy_(torch.tensor([1.0, -1.0, 0.0, 1.0]).view(4, 1) * torch.eye(4, 6))
        x[:20] = 0
    report = scan(model, [x], x)
    assert (report["act"].on, report["act"].off) == (2, 2)
    assert same_bits(logits(linearize(model, report, x).model, x), logits(model, x))


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ReLU(), nn.Hardswish()])
@pytest.mark.parametrize("functional", [False, True])
def test_empty_layers_give_the_same_bits(act: nn.Module, functional: bool) -> None:
    class Functional(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.fc1(x)
            if isinstance(act, nn.GELU):
                h = F.gelu(h, approximate=act.approximate)
            else:
                h = {nn.SiLU: F.silu, nn.ReLU: F.relu, nn.Hardswish: F.hardswish}[type(act)](h)
            return self.head(self.other(self.fc3(x))) + self.fc2(h)[:, :3]

    bias = [0.7, -0.9, 0.0, -5.0, 4.5]
    model, x = (Functional if functional else Net)(copy.deepcopy(act), bias), samples()
    with torch.no_grad():
        model.fc1.weight.zero_()
    report = scan(model, [x], x)
    name = report.rows[0].name
    if isinstance(act, nn.Hardswish):  # between -3 and 3 it is no line, only the layer is constant
        assert report[name].mixed
    assert report[name].state == "empty"
    result = linearize(model, report, x)
    assert name in result.exact
    assert equal(logits(result.model, x), logits(model, x), act)
    far = samples(9) * 100
    assert equal(logits(result.model, far), logits(model, far), act)  # a constant for any input


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU()])
def test_smooth_rectifiers_are_never_linear_by_their_signs(act: nn.Module) -> None:
    model, x = Net(act, ON), samples()
    report = scan(model, [x], x)
    assert report["act"].mixed == 0
    result = linearize(model, report, x)
    assert result.exact == ()
    assert result.kept["act"].endswith("is linear only where its layer is empty")
    with pytest.raises(ValueError, match=r"'act' cannot be linearised: (gelu|silu) is linear only"):
        linearize(model, report, x, names=["act"])


class ConvNet(nn.Module):
    def __init__(self, norm: str = "bn", act: nn.Module | None = None, after: str = "conv") -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm: nn.Module = {
            "bn": lambda: nn.BatchNorm2d(4),
            "gn": lambda: nn.GroupNorm(2, 4),
            "flat bn": lambda: nn.BatchNorm1d(4 * 25),
            "ln": lambda: nn.LayerNorm([4, 5, 5]),
        }[norm]()
        self.flat, self.after = norm == "flat bn" or after == "flat", after
        self.act = act or nn.ReLU()
        self.head = nn.Linear(100, 3)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 2.0)
            self.norm.bias.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h = self.norm(h.flatten(1) if isinstance(self.norm, nn.BatchNorm1d) else h)
        if self.after == "flat":
            h = h.flatten(1)
        return self.head(self.act(h).flatten(1)) + x.flatten(1)[:, :3]


def images() -> Tensor:
    return torch.randn(40, 2, 5, 5, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("after", ["conv", "flat"])
@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.LeakyReLU(0.3), prelu(0.1, 0.2, 0.3, 0.4), nn.GELU()]
)
@pytest.mark.parametrize("empty", [False, True])
def test_convolutions_with_norms_and_flattened_sites(
    after: str, act: nn.Module, empty: bool
) -> None:
    if isinstance(act, nn.PReLU) and after == "flat":
        act = prelu(0.3)  # slopes lie on dim 1, which is flattened
    model, x = ConvNet("bn", copy.deepcopy(act), after), images()
    model.train()(x)
    with torch.no_grad():
        model.norm.bias.copy_(torch.tensor(BOTH))
        if empty:
            model.conv.weight.zero_()
            model.norm.bias.copy_(torch.tensor([0.5, -0.5, 0.1, -2]))
    report = scan(model, [x[:30], x[30:]], x)
    linear = "mixed" if isinstance(act, nn.GELU) else "one-sided"
    assert report["act"].state == ("empty" if empty else linear)
    result = linearize(model, report, x)
    if isinstance(act, nn.GELU) and not empty:
        assert result.exact == ()
        return
    assert result.exact == ("act",)
    gate = result.model.get_submodule("act")
    assert len(gate.scale) == (100 if after == "flat" else 4)
    assert equal(logits(result.model, x), logits(model, x), act)


@pytest.mark.parametrize("norm", ["bn", "gn", "flat bn", "ln"])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU()])
def test_an_empty_layer_behind_any_norm_gives_the_same_bits_or_stays(
    norm: str, act: nn.Module
) -> None:
    """A norm with a bias per position makes an empty layer mixed; it must not become a gate."""
    model, x = ConvNet(norm, copy.deepcopy(act)), images()
    model.train()(x)
    with torch.no_grad():
        model.conv.weight.zero_()
    report = scan(model, [x], x)
    result = linearize(model, report, x)
    assert result.exact == (("act",) if norm in ("bn", "gn") else ())
    assert equal(logits(result.model, x), logits(model, x), act)


class Calls(nn.Module):
    """One module called twice, one method, one function and one in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.act = nn.ReLU()
        for number, fc in enumerate(self.fc):
            sign = torch.tensor([1.0, -1.0] * 3 if number != 1 else [0.01, -0.01] * 3)
            with torch.no_grad():
                fc.bias.copy_(FAR * sign)

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.fc[0](x))
        b = self.act(self.fc[1](x))
        c = self.fc[2](x).relu()
        d = F.leaky_relu(self.fc[3](x), 0.5)
        e = F.relu(self.fc[4](x), inplace=True)
        return x + a + 2 * b + 3 * c + 4 * d + 5 * e


def test_functional_and_shared_rectifiers_one_call_at_a_time() -> None:
    model, x = Calls(), samples()
    report = scan(model, [x], x)
    names = [row.name for row in report]
    assert names == ["act", "act#2", ":relu", ":leaky_relu", ":relu#2"]
    result = linearize(model, report, x)
    assert result.exact == ("act", ":relu", ":leaky_relu", ":relu#2")
    assert list(result.kept) == ["act#2"]
    assert same_bits(logits(result.model, x), logits(model, x))
    for name in result.exact:
        one = linearize(model, report, x, names=[name])
        assert one.exact == (name,)
        assert sum(isinstance(m, AffineGate) for m in one.model.modules()) == 1
        assert same_bits(logits(one.model, x), logits(model, x))
        assert one.kept["act#2"] == "not asked for"


def test_a_functional_prelu_is_kept_with_its_reason() -> None:
    class Slopes(Net):
        def forward(self, x: Tensor) -> Tensor:
            branch = self.fc2(F.prelu(self.fc1(x), self.slope))
            return self.head(self.other(self.fc3(x))) + branch[:, :3]

    model, x = Slopes(nn.Identity(), OFF), samples()
    model.slope = nn.Parameter(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    report = scan(model, [x], x)
    result = linearize(model, report, x)
    assert result.exact == ()
    assert result.kept[":prelu"] == "a functional PReLU has its slopes in the graph"
    assert same_bits(logits(result.model, x), logits(model, x))


def test_tolerance_replaces_by_identity_unless_never_on() -> None:
    model, x = Net(nn.ReLU(), [0.0, FAR, -FAR, 0.3]), samples()
    report = scan(model, [x], x)
    row = report["act"]
    assert (row.mixed, row.on, row.off) == (2, 1, 1)
    below, above = row.entropy - 1e-9, row.entropy
    assert linearize(model, report, x, tolerance=below, names=None).approximate == ()
    result = linearize(model, report, x, tolerance=above)
    assert result.approximate == ("act",)
    assert result.exact == ()
    gate = result.model.get_submodule("act")
    assert gate.scale.tolist() == [1, 1, 0, 1]
    assert gate.offset.tolist() == [0] * 4
    assert f"above the tolerance of {above}" in result.kept["other"]
    assert not same_bits(logits(result.model, x), logits(model, x))
    everything = linearize(model, report, x, tolerance=math.inf, names=["act", "other"])
    assert everything.approximate == ("act", "other")
    assert everything.kept == {}
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match=r"tolerance must be 0 bits or more \(got"):
            linearize(model, report, x, tolerance=bad)


def test_refusals() -> None:
    model, x = Net(nn.ReLU(), BOTH), samples()
    report = scan(model, [x], x)
    with track(model, x) as tracker:
        model(x)
        counted = tracker.entropy()
    with pytest.raises(ValueError, match="certify nothing"):
        linearize(model, counted, x)
    with pytest.raises(KeyError, match="no rectifier is called 'nope'; this model has: act, other"):
        linearize(model, report, x, names=["nope"])
    message = r"rectifier 'other' cannot be linearised: \d neurons switch .*; pass tolerance=BITS"
    with pytest.raises(ValueError, match=message):
        linearize(model, report, x, names=["act", "other"])
    with pytest.raises(ValueError, match="differ from those that were scanned; scan again"):
        linearize(Net(nn.ReLU(), ON), report, x)
    with torch.no_grad():
        model.head.bias[0] += 1e-7
    with pytest.raises(ValueError, match="differ from those that were scanned; scan again"):
        linearize(model, report, x)


def test_refuses_the_cut_the_unmeasured_and_the_nonfinite() -> None:
    model, x = Net(nn.ReLU(), BOTH), samples()
    report = scan(model, [x], x)
    with pytest.raises(CutError, match=r"the network is cut \(why\), so its zero entropies mean"):
        linearize(model, replace(report, cut=True, cut_by="why"), x)
    for state, reason in (
        ("unmeasured", "no data reached it"),
        ("nonfinite", "its input held NaN"),
    ):
        rows = tuple(replace(row, state=state) for row in report)
        result = linearize(model, replace(report, rows=rows), x, tolerance=math.inf)
        assert result.exact == result.approximate == ()
        assert set(result.kept.values()) == {reason}


def test_one_nan_in_the_data_is_no_certificate() -> None:
    model, x = Net(nn.ReLU(), BOTH), samples()
    x[5, 2] = math.nan
    report = scan(model, [x], x[6:])
    result = linearize(model, report, x[6:])
    assert result.exact == ()
    assert result.kept["act"] == "its input held NaN"


@pytest.mark.parametrize("training", [False, True])
def test_the_given_model_and_its_modes_stay(training: bool) -> None:
    class Frozen(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(super().forward(x))

    model, x = Frozen(), images()
    with torch.no_grad():
        model.norm.bias.copy_(torch.tensor(BOTH))
    model.train(training)
    model.norm.eval()  # fine-tuning with frozen statistics
    text, numbers = str(model), copy.deepcopy(model.state_dict())
    modes = {name: m.training for name, m in model.named_modules()}
    report = scan(model, [x], x)
    result = linearize(model, report, x)
    assert result.exact == ("act",)
    assert str(model) == text
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(v, numbers[k]) for k, v in model.state_dict().items())
    assert type(model.act) is nn.ReLU
    after = {name: m.training for name, m in result.model.named_modules()}
    assert all(after[name] == mode for name, mode in modes.items() if name != "act")
    with torch.no_grad():  # its weights are copies
        result.model.get_parameter("conv.weight").zero_()
    assert torch.equal(model.conv.weight, numbers["conv.weight"])


class Stack(nn.Module):
    """Three convolutions with rectifiers that are on throughout the data."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv1 = nn.Conv2d(3, 4, 3, 2, padding=1)
        self.norm, self.act1 = nn.BatchNorm2d(4), nn.ReLU()
        self.conv2 = nn.Conv2d(4, 5, 3, **{"padding": 1, **options})  # type: ignore[arg-type]
        self.act2, self.drop = nn.ReLU(), nn.Dropout(0.1)
        self.conv3 = nn.Conv2d(5, 2, 5, padding=2)
        with torch.no_grad():
            self.norm.bias.fill_(FAR)
            self.conv2.weight.abs_()
            self.conv2.bias.fill_(FAR)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm(self.conv1(x)))
        return self.conv3(self.drop(self.act2(self.conv2(x))))


def test_padding_moves_so_that_merging_is_exact() -> None:
    model = Stack().eval()
    x = torch.randn(8, 3, 9, 8, generator=torch.Generator().manual_seed(7))
    report = scan(model, [x])
    kept = linearize(model, report, x)
    assert kept.moved == ()
    assert [f.rule for f in fold(kept.model, x).report.folds if f.rule == "convolution"] == []
    moved = linearize(model, report, x, border="move")
    assert moved.exact == ("act1", "act2")
    assert set(moved.moved) == {("conv1", "conv2"), ("conv2", "conv3")}
    paddings = [moved.model.get_submodule(f"conv{i}").padding for i in (1, 2, 3)]
    assert paddings == [(1 + 2 * (1 + 2),) * 2, (0, 0), (0, 0)]
    assert model.conv1.padding == (1, 1)
    with torch.no_grad():
        before, after = kept.model.eval()(x), moved.model.eval()(x)
    assert after.shape == before.shape
    assert not torch.allclose(after, before)  # the border has changed
    result = fold(moved.model, x)
    assert [type(m) for m in result.model.children()] == [nn.Conv2d]
    with torch.no_grad():
        assert torch.allclose(result.model(x), after, rtol=1e-4, atol=1e-3)


def test_padding_stays_where_merging_is_exact() -> None:
    model = Stack(padding=0).eval()
    model.conv3 = nn.Conv2d(5, 2, 1)
    x = torch.randn(8, 3, 11, 11, generator=torch.Generator().manual_seed(7))
    moved = linearize(model, scan(model, [x]), x, border="move")
    assert moved.moved == ()
    assert "convolution" in [f.rule for f in fold(moved.model, x).report.folds]


def test_padding_stays_where_others_read_or_pad_otherwise() -> None:
    class Twice(Stack):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act1(self.norm(self.conv1(x)))
            return self.conv3(self.act2(self.conv2(y))) + y.mean()

    x = torch.randn(8, 3, 9, 8, generator=torch.Generator().manual_seed(7))
    for model in (Twice(), Stack(padding_mode="reflect")):
        moved = linearize(model.eval(), scan(model, [x]), x, border="move")
        pairs = {("conv2", "conv3")} if isinstance(model, Twice) else set()
        assert set(moved.moved) == pairs
    with pytest.raises(ValueError, match="border must be 'keep' or 'move'"):
        linearize(model, scan(model, [x]), x, border="crop")


def read_before(net: Net, x: Tensor) -> Tensor:
    hidden = net.fc1(x)
    view = hidden.flatten(1)
    return net.fc2(net.act(hidden)) + view.sum()


def read_after(net: Net, x: Tensor) -> Tensor:
    hidden = net.fc1(x)
    hidden.view(-1, 4).relu_()
    return net.fc2(hidden)


def scaled_in_place(net: Net, x: Tensor) -> Tensor:
    hidden = net.fc1(x)
    hidden.view(-1, 4).mul_(2)
    return net.fc2(net.act(hidden))


@pytest.mark.parametrize(
    ("forward", "kept", "shapes"),
    [
        (read_before, "act", True),
        (read_before, "act", False),
        (read_after, ":relu", True),
        (scaled_in_place, None, True),
    ],
)
def test_what_is_written_in_place_and_read_through_a_view_is_written_still(
    forward: Callable[[Net, Tensor], Tensor], kept: str | None, shapes: bool
) -> None:
    model = type("Views", (Net,), {"forward": forward})(nn.ReLU(inplace=True), BOTH)
    x = samples()
    result = linearize(model, scan(model, [x], x[:3]), x[:3] if shapes else None)
    assert same_bits(logits(result.model, x), logits(model, x))
    assert set(result.kept) == ({kept} if kept else set())
    assert all("reads through a view" in reason for reason in result.kept.values())
    if kept:
        folded = fold(result.model, x[:3]).model
        torch.testing.assert_close(logits(folded, x), logits(model, x), rtol=1e-5, atol=1e-4)


def test_the_ordinary_use_of_rectifiers_in_place_is_linearised() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten()),
        nn.Linear(64, 2),
    ).eval()
    with torch.no_grad():
        model[1].bias += FAR
    x = torch.randn(8, 3, 6, 6)
    assert linearize(model, scan(model, [x], x[:2]), x[:2]).exact == ("2",)
