"""Each rule on the smallest model that shows it, and each reason for which it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from layer_collapse.reduce.fold import FoldResult, fold
from layer_collapse.reduce.gate import AffineGate, ConstantBias

from .models import Way


def gate(scale: list[float], offset: list[float] | None = None, dim: int = 1) -> AffineGate:
    return AffineGate(
        torch.tensor(scale) * 1.0, torch.tensor(offset or [0.0] * len(scale)) * 1.0, dim
    )


def check(model: nn.Module, x: Tensor, border: str = "biasmap") -> FoldResult:
    """Fold in float64 and compare with the model itself."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    model, x = model.double(), x.double()
    result = fold(model, x, border=border)
    with torch.no_grad():
        expected, got = copy.deepcopy(model).eval()(x), result.model(x)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-10
    return result


def rules(result: FoldResult) -> list[str]:
    return [f.rule for f in result.report.folds]


def left(result: FoldResult) -> set[str]:
    return {name for name, module in result.model.named_modules() if not list(module.children())}


def reason(result: FoldResult, rule: str) -> str:
    found = [r.reason for r in result.report.refusals if r.rule == rule]
    assert len(found) == 1, result.report.refusals
    return found[0]


# Batch norm


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, eps=0.1), (3, 4)),
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6, affine=False), (3, 4, 5)),
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), (3, 4, 7, 7)),
        (nn.Conv2d(4, 4, 3, groups=4, padding_mode="circular", padding=1), nn.BatchNorm2d(4),
         (3, 4, 5, 5)),
        (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (3, 4, 4, 4, 4)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), (3, 4, 3, 3)),
        (nn.ConvTranspose1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), (3, 4, 3)),
        (nn.Conv2d(4, 6, 1), nn.SyncBatchNorm(6), (3, 4, 3, 3)),
    ],
)  # fmt: skip
def test_batch_norm_into_every_layer(layer: nn.Module, norm: nn.Module, shape) -> None:  # type: ignore[no-untyped-def]
    result = check(nn.Sequential(layer, nn.Dropout(0.1), norm, nn.ReLU()), torch.randn(shape))
    assert rules(result) == ["batch norm"]
    assert "2" not in left(result)
    assert result.model.get_submodule("0").bias is not None


def test_batch_norm_refusals() -> None:
    linear, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
    x = torch.randn(3, 4)
    nothing = nn.BatchNorm1d(4, track_running_stats=False)
    assert "no running statistics" in reason(check(nn.Sequential(linear, nothing), x), "batch norm")
    first = check(nn.Sequential(norm, nn.ReLU(), linear), x)
    assert "not a linear or convolutional layer" in reason(first, "batch norm")
    tokens = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3))  # normalises tokens, not features
    assert "its channels are not those" in reason(check(tokens, torch.randn(2, 3, 4)), "batch norm")
    used = Way(lambda s, x: (y := s.fc(x)) + s.norm(y), fc=linear, norm=norm)
    assert "used elsewhere" in reason(check(used, x), "batch norm")


# Gates


def test_gate_into_its_layer_and_identity_anywhere() -> None:
    way = Way(
        lambda s, x: s.tail(torch.sigmoid(s.one(torch.tanh(s.mix(s.fc(x)))))),
        fc=nn.Linear(3, 4),
        mix=gate([1, 0, 0, 0.1], [0, 0, 6, 0]),
        one=gate([1, 1, 1, 1]),
        tail=nn.Linear(4, 2),
    )
    result = check(way, torch.randn(5, 3))
    assert sorted(rules(result)) == ["gate", "gate", "neurons"]
    assert left(result) == {"fc", "tail"}


@pytest.mark.parametrize(
    ("before", "shape"),
    [
        (nn.LayerNorm(4), (2, 4)),
        (nn.BatchNorm1d(4), (2, 4)),
        (gate([2, 3, 4, 5], [1, 1, 1, 0]), (2, 4)),
        (nn.ConvTranspose2d(4, 4, 2, groups=2), (2, 4, 3, 3)),
    ],
)
def test_gate_into_other_layers_with_channels(before: nn.Module, shape) -> None:  # type: ignore[no-untyped-def]
    module = nn.Sequential(nn.Tanh(), before, gate([1, 0, 0.5, 0], [0, 0, 1, 6]), nn.Tanh())
    result = check(module, torch.randn(shape))
    assert rules(result) == ["gate"]
    assert result.model.get_submodule("1").__class__ is not nn.Identity
    assert "2" not in left(result)


def test_gate_behind_a_sum_goes_forward_where_it_can() -> None:
    def way(s, x):  # type: ignore[no-untyped-def]
        return s.out(s.gate(s.a(x) + torch.tanh(x)))

    scale, offset = [1.0, 0.0, 0.0, 0.1], [0.0, 0.0, 6.0, 0.0]
    for out in (nn.Conv2d(4, 2, 3), nn.Conv2d(4, 6, 3, groups=2)):
        model = Way(way, a=nn.Conv2d(4, 4, 1), gate=gate(scale, offset), out=out)
        assert rules(check(model, torch.randn(2, 4, 5, 5))) == ["forward"]
    padded = Way(way, a=nn.Conv2d(4, 4, 1), gate=gate(scale), out=nn.Conv2d(4, 2, 3, padding=1))
    assert rules(check(padded, torch.randn(2, 4, 5, 5))) == ["forward"]
    padded.gate.offset[1] = 6.0
    mapped = check(padded, torch.randn(2, 4, 5, 5))
    assert rules(mapped) == ["biasmap"]
    assert left(mapped) == {"a", "out", "constant_bias_0", "fixed_size_0"}
    refused = check(padded, torch.randn(2, 4, 5, 5), border="refuse")
    assert "border map" in reason(refused, "forward")
    assert "not a layer with weights" in reason(refused, "gate")
    assert "gate" in left(refused)


def test_gate_refusals() -> None:
    x = torch.randn(2, 3, 4)
    wrong = Way(lambda s, x: torch.tanh(s.g(s.fc(x))), fc=nn.Linear(4, 4), g=gate([1, 0, 2]))
    assert "no rows along dim 1" in reason(check(wrong, x), "gate")
    used = Way(
        lambda s, x: (y := s.fc(x)) * torch.tanh(s.g(y)),
        fc=nn.Linear(4, 4),
        g=gate([1, 0, 1, 0], dim=-1),
    )
    assert "used elsewhere" in reason(check(used, x), "gate")
    torch.manual_seed(0)
    written = Way(  # without the gate, tanh_ would write into fc's value, which is read later
        lambda s, x: (y := s.fc(x)) * torch.tanh(y) + s.g(y).add_(1.0) * y,
        fc=nn.Linear(4, 4),
        g=gate([1, 1, 1, 1], dim=-1),
    )
    assert "changed in place" in reason(check(written, x), "gate")


def _hook(*_: object) -> None:
    return None


def _twice(s, x):  # type: ignore[no-untyped-def]
    return s.fc(torch.tanh(s.g(s.fc(x))))


def _plain(s, x):  # type: ignore[no-untyped-def]
    return torch.tanh(s.g(s.fc(x)))


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


Doubling.__module__ = "torch.nn.doubling"  # a leaf for torch.fx, as quantised layers are


@pytest.mark.parametrize("obstacle", ["hook", "pre-hook", "parametrised", "shared", "tied",
                                      "read", "unknown"])  # fmt: skip
def test_layers_that_must_not_change(obstacle: str) -> None:
    fc = (Doubling if obstacle == "unknown" else nn.Linear)(4, 4)
    model = Way(_twice if obstacle == "shared" else _plain, fc=fc, g=gate([1, 0, 0.5, 0]))
    if obstacle == "hook":
        fc.register_forward_hook(_hook)
    if obstacle == "pre-hook":
        fc.register_forward_pre_hook(_hook)
    if obstacle == "parametrised":
        parametrizations.orthogonal(fc)
    if obstacle == "tied":
        model.other = nn.Linear(4, 4)
        model.other.weight = fc.weight
        model.way = lambda s, x: _plain(s, x) + s.other(x)
    if obstacle == "read":
        model.way = lambda s, x: _plain(s, x) @ s.fc.weight
    expected = {
        "hook": "has hooks",
        "pre-hook": "has hooks",
        "parametrised": "has a parametrisation",
        "shared": "called more than once",
        "tied": "is tied to another",
        "read": "also read by itself",
        "unknown": "Doubling",
    }
    result = check(model, torch.randn(2, 4))
    assert expected[obstacle] in reason(result, "gate")
    assert rules(result) == []
    assert "g" in left(result)


def test_tensor_subclasses_are_quantised_weights() -> None:
    class Packed(Tensor):
        def new_empty(self, *args: object, **kwargs: object) -> Packed:
            return super().new_empty(*args, **kwargs).as_subclass(Packed)  # type: ignore[no-any-return]

    model = nn.Sequential(nn.Linear(3, 3), gate([1, 0, 1]), nn.Tanh())
    result = fold(model, torch.randn(2, 3))
    assert rules(result) == ["gate"]
    packed = model[0].weight.detach().as_subclass(Packed)
    model[0]._parameters.pop("weight")
    model[0].register_buffer("weight", packed)
    assert "quantised (Packed)" in reason(fold(model, torch.randn(2, 3)), "gate")


# Linear after linear


def test_linear_chain_becomes_one_layer() -> None:
    model = nn.Sequential(
        nn.Linear(3, 12), nn.Dropout(0.5), nn.Identity(), nn.Linear(12, 5, bias=False),
        nn.Linear(5, 4), nn.Tanh(),
    )  # fmt: skip
    result = check(model, torch.randn(2, 7, 3))
    assert rules(result) == ["linear", "linear"]
    assert left(result) == {"4", "5"}
    assert result.model.get_submodule("4").in_features == 3
    assert result.report.after.depth == 1


def test_linear_refusals() -> None:
    def way(s, x):  # type: ignore[no-untyped-def]
        y = s.a(x)
        return s.b(y) + torch.tanh(y)

    used = Way(way, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert "used elsewhere" in reason(check(used, torch.randn(2, 4)), "linear")
    hooked = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    hooked[1].register_forward_hook(_hook)
    assert "has hooks" in reason(check(hooked, torch.randn(2, 4)), "linear")
    mixed = Way(lambda s, x: s.b(s.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert rules(check(mixed, torch.randn(2, 4))) == ["linear"]


# Neurons


def test_dead_neurons_leave_through_pools_and_flatten() -> None:
    convs = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 3, padding=1, groups=1)
    model = nn.Sequential(
        convs[0], nn.GELU(), convs[1], nn.PReLU(6), nn.Conv2d(6, 6, 3, groups=6, bias=False),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 16, 4), nn.PReLU(4),
        nn.Linear(4, 2),
    )  # fmt: skip
    with torch.no_grad():
        convs[0].weight[[1, 4]] = 0
        convs[0].bias[[1, 4]] = 0  # in front of zero padding only silent neurons can leave
        convs[1].weight[[0, 3]] = 0  # send act(bias), in front of no padding
        model[8].weight[2] = 0
    result = check(model, torch.randn(2, 3, 12, 12))
    assert rules(result) == ["neurons"] * 3
    get = result.model.get_submodule
    assert get("0").weight.shape == (3, 3, 3, 3)
    assert get("2").weight.shape == (4, 3, 3, 3)
    assert get("3").weight.shape == (4,)
    assert get("4").weight.shape == (4, 1, 3, 3)
    assert (get("4").groups, get("4").in_channels, get("4").out_channels) == (4, 4, 4)
    assert get("8").weight.shape == (3, 4 * 16)
    assert get("10").weight.shape == (2, 3)


def test_neurons_that_nobody_reads_leave() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[2].weight[:, [0, 5]] = 0
        model[0].weight[1] = 0
    result = check(model, torch.randn(4, 3))
    assert result.model.get_submodule("0").weight.shape == (3, 3)


def test_neurons_in_front_of_zero_padding_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 1
    result = check(model, torch.randn(2, 2, 5, 5))
    assert "border of zero padding" in reason(result, "neurons")
    model[2] = nn.Conv2d(3, 2, 3, padding=1, padding_mode="replicate")
    assert rules(check(model, torch.randn(2, 2, 5, 5))) == ["neurons"]


def test_one_pixel_hides_the_border_of_a_constant_branch() -> None:
    model = Way(
        lambda s, x: torch.tanh(x) + s.b(torch.relu(s.a(x))),
        a=nn.Conv2d(4, 4, 1),
        b=nn.Conv2d(4, 4, 3, padding=1),
    )
    with torch.no_grad():
        model.a.weight.zero_()
        model.a.bias.fill_(1.0)  # type: ignore[union-attr]
    result = check(model, torch.randn(2, 4, 1, 1))
    assert rules(result) == ["biasmap"]
    assert result.report.only_sizes == [[4, 1, 1]]


def test_a_border_before_the_pool_is_no_constant_of_the_neuron() -> None:
    """A mean over a border map depends on the image's size: it must not become a bias."""
    depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1), depthwise, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    )
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 1
    result = check(model, torch.randn(2, 2, 5, 5), border="refuse")
    x = torch.randn(1, 2, 9, 4).double()
    assert torch.allclose(result.model(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "pool", "reader", "shape"),
    [
        (nn.Linear(3, 8), nn.MaxPool1d(1), nn.Linear(8, 2), (4, 3)),
        (nn.Linear(3, 8), nn.AvgPool1d(2), nn.Linear(4, 2), (4, 5, 3)),
        (nn.Conv1d(3, 8, 1), nn.MaxPool2d(2), nn.Conv1d(4, 2, 1), (4, 3, 6)),
        (nn.Conv1d(3, 8, 1), lambda x: F.max_pool2d(x, 2), nn.Conv1d(4, 2, 1), (4, 3, 6)),
    ],
)
def test_pools_that_mix_neurons_stop_the_rule(layer, pool, reader, shape) -> None:  # type: ignore[no-untyped-def]
    """Pools of another rank than the value take its channels for a spatial dim."""
    model = Way(lambda s, x: s.b(F.relu(pool(s.a(x)))), a=layer, b=reader)
    if isinstance(pool, nn.Module):
        model.pool = pool
        model.way = lambda s, x: s.b(F.relu(s.pool(s.a(x))))
    with torch.no_grad():
        model.a.weight[1] = 0
    result = check(model, torch.randn(shape))
    assert rules(result) == []
    assert reason(result, "neurons").startswith("1 constant neurons stay")


# Constants


def test_constant_factor_becomes_a_gate() -> None:
    """Squeeze-and-excitation whose first layer has lost all its weights."""
    model = Way(
        lambda s, x: F.relu(
            (y := s.conv(x)) * torch.sigmoid(s.up(F.relu(s.down(y.mean((2, 3), keepdim=True)))))
        ),
        conv=nn.Conv2d(3, 4, 3),
        down=nn.Conv2d(4, 2, 1),
        up=nn.Conv2d(2, 4, 1),
    )
    nn.init.zeros_(model.down.weight)
    result = check(model, torch.randn(2, 3, 6, 6))
    assert rules(result) == ["constant", "gate"]
    assert left(result) == {"conv"}


def test_two_constants_on_one_stream_become_one() -> None:
    def way(s, x):  # type: ignore[no-untyped-def]
        x = torch.tanh(x)
        return torch.tanh(x + s.a(x) + s.b(x))

    model = Way(way, a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    nn.init.zeros_(model.a.weight)
    nn.init.zeros_(model.b.weight)
    result = check(model, torch.randn(2, 3))
    assert sorted(rules(result)) == ["absorb", "constant", "constant"]
    kept = [m for m in result.model.modules() if isinstance(m, ConstantBias)]
    assert len(kept) == 1
    torch.testing.assert_close(kept[0].value, model.a.bias.detach() + model.b.bias.detach())
    assert "stays as a module" in reason(result, "absorb")


def test_constant_is_not_absorbed_where_others_read() -> None:
    def way(s, x):  # type: ignore[no-untyped-def]
        x = s.stem(x)
        return (x + s.a(x)) * torch.tanh(x)

    model = Way(way, stem=nn.Linear(3, 3), a=nn.Linear(3, 3))
    nn.init.zeros_(model.a.weight)
    result = check(model, torch.randn(2, 3))
    assert "'stem' is used elsewhere" in reason(result, "absorb")


def test_constants_that_meet_other_operations_are_refused() -> None:
    model = Way(lambda s, x: torch.cat([s.a(x), x], 1), a=nn.Linear(3, 3))
    nn.init.zeros_(model.a.weight)
    result = check(model, torch.randn(2, 3))
    assert "'cat' uses its value" in reason(result, "constant")
    assert "a" in left(result)
    repeats = Way(lambda s, x: x.mean(1, keepdim=True) + s.a(x), a=nn.Linear(3, 3))
    nn.init.zeros_(repeats.a.weight)
    assert "repeats the other value" in reason(check(repeats, torch.randn(2, 3)), "constant")


def test_random_and_hooked_branches_are_not_constants() -> None:
    def way(s, x):  # type: ignore[no-untyped-def]
        return x + 1e-30 * torch.rand_like(s.a(x))

    model = Way(way, a=nn.Linear(3, 3))
    nn.init.zeros_(model.a.weight)
    assert rules(check(model, torch.randn(2, 3))) == []
    hooked = Way(lambda s, x: x + s.a(x), a=nn.Linear(3, 3))
    nn.init.zeros_(hooked.a.weight)
    hooked.a.register_forward_hook(_hook)
    assert "a" in left(check(hooked, torch.randn(2, 3)))


def test_position_embedding_and_attention_of_a_constant() -> None:
    """A constant through softmax and a parameter: still a constant, now one per position."""

    def way(s, x):  # type: ignore[no-untyped-def]
        c = s.a(x) + s.pos
        return s.stem(x) + torch.softmax(c @ c.transpose(1, 2), -1) @ c

    model = Way(way, stem=nn.Linear(3, 3), a=nn.Linear(3, 3))
    model.pos = nn.Parameter(torch.randn(1, 4, 3))
    nn.init.zeros_(model.a.weight)
    result = check(model, torch.randn(2, 4, 3))
    assert rules(result) == ["biasmap"]
    assert "pos" not in dict(result.model.named_parameters())
    assert result.model.get_submodule("constant_bias_0").value.shape == (4, 3)


def test_mean_over_a_border_map_holds_for_one_size() -> None:
    """One number per channel, yet another one for another image size."""

    def way(s, x):  # type: ignore[no-untyped-def]
        return s.stem(x) + s.padded(s.a(x)).mean((2, 3), keepdim=True)

    model = Way(
        way, stem=nn.Conv2d(2, 3, 1), a=nn.Conv2d(2, 2, 1), padded=nn.Conv2d(2, 3, 3, padding=1)
    )
    nn.init.zeros_(model.a.weight)
    result = check(model, torch.randn(2, 2, 5, 5))
    assert rules(result) == ["biasmap", "absorb"]
    assert left(result) == {"stem", "fixed_size_0"}
    assert result.report.only_sizes == [[2, 5, 5]]


def test_absorbing_passes_by_a_broadcast_summand() -> None:
    def way(s, x):  # type: ignore[no-untyped-def]
        return torch.tanh((s.one(x) + s.all(x)) + s.empty(x))

    model = Way(way, one=nn.Linear(3, 1), all=nn.Linear(3, 3), empty=nn.Linear(3, 3))
    nn.init.zeros_(model.empty.weight)
    result = check(model, torch.randn(2, 3))
    assert [f.detail for f in result.report.folds if f.rule == "absorb"] == ["into all"]
    assert result.report.refusals == []


def test_weights_that_the_dtype_cannot_hold_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh()).half().eval()
    with torch.no_grad():
        model[0].weight.fill_(100.0)
        model[1].running_var.fill_(1e-6)
        model[1].eps = 0.0
    result = fold(model, torch.full((2, 4), 1e-3, dtype=torch.float16))  # 1e5 > 65504
    assert "relative error of inf is above 2e-03" in reason(result, "batch norm")


def test_folded_weights_are_no_views() -> None:
    model = nn.Sequential(nn.Linear(3, 6), gate([1, 0, 0, 1, 1, 1]), nn.Linear(6, 3), nn.Tanh())
    tokens = Way(lambda s, x: torch.tanh(s.a(x) + s.b(x)), a=model, b=nn.Linear(3, 3))
    model[1].channel_dim = 2
    nn.init.zeros_(tokens.b.weight)
    for tensor in check(tokens, torch.randn(2, 4, 3)).model.state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
