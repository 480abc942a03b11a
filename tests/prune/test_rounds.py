"""A round prunes what the plan says, and the guards hold whatever is asked."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layer_collapse.graph import trace
from layer_collapse.measure.scan import scan
from layer_collapse.measure.sites import find_sites
from layer_collapse.prune.masks import Masks
from layer_collapse.prune.rounds import (
    CutError,
    Guards,
    candidate_weights,
    prunable_layers,
    prune_round,
    reset_dead_batch_norms,
)
from layer_collapse.prune.strategies import STRATEGIES, strategy


def data(*shape: int, seed: int = 0) -> list[Tensor]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return [x[: len(x) // 2], x[len(x) // 2 :]]


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 3))


class Residual(nn.Module):
    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.ModuleList(nn.Linear(8, 12) for _ in range(blocks))
        self.act = nn.ModuleList(nn.ReLU() for _ in range(blocks))
        self.back = nn.ModuleList(nn.Linear(12, 8) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for fc, act, back in zip(self.fc, self.act, self.back, strict=True):
            x = x + back(act(fc(x)))
        return x


def prepared(model: nn.Module, batches: list[Tensor]):
    sites = find_sites(trace(model, batches[0]))
    return sites, Masks(candidate_weights(model, sites)), scan(model, batches, batches[0])


def everything(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", [*STRATEGIES])
def test_prunes_what_it_returns_and_nothing_else(name) -> None:
    model, batches = Residual(), data(40, 8)
    sites, masks, report = prepared(model, batches)
    assert masks.names == tuple(f"fc.{i}.weight" for i in range(4))
    before = everything(model)
    counts = prune_round(model, masks, report, sites, 0.5, strategy(name), Guards())
    assert sum(counts.values()) == round(0.5 * 4 * 96)
    for key, value in model.state_dict().items():
        if key not in counts:
            assert torch.equal(value, before[key]), key
            continue
        order = before[key].abs().flatten().sort(stable=True).indices
        gone = torch.zeros(96, dtype=torch.bool)
        gone[order[: counts[key]]] = True
        assert torch.equal(value, torch.where(gone.view_as(value), 0.0, before[key]))
        assert masks.alive(key) == 96 - counts[key]
    report = scan(model, batches, batches[0])
    again = prune_round(model, masks, report, sites, 0.5, strategy(name), Guards())
    assert sum(again.values()) == round(0.5 * 2 * 96)  # of those alive, not of all


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    fraction=st.floats(0.05, 0.9999),
    rounds=st.integers(1, 4),
    floor=st.integers(1, 12),
    name=st.sampled_from([*STRATEGIES]),
    seed=st.integers(0, 20),
)
def test_a_sequential_network_keeps_its_floor(widths, fraction, rounds, floor, name, seed) -> None:
    batches = data(16, 5, seed=seed)
    model = mlp(5, *widths, seed=seed)
    sites, masks, report = prepared(model, batches)
    first = {weight: masks.alive(weight) for weight in masks.names}
    for _ in range(rounds):
        if report.cut:  # too narrow: dead before any pruning, or by the signs that are left
            with pytest.raises(CutError):
                prune_round(model, masks, report, sites, fraction, strategy(name), Guards(floor))
            break
        prune_round(model, masks, report, sites, fraction, strategy(name), Guards(floor, 9))
        for weight, alive in first.items():
            assert masks.alive(weight) >= min(alive, floor), weight
        report = scan(model, batches, batches[0])
        assert not any(row.state == "empty" for row in report)


@pytest.mark.parametrize("name", [*STRATEGIES])
def test_a_wide_sequential_network_is_not_cut_in_many_rounds(name) -> None:
    model, batches = mlp(10, 24, 24, 24), data(200, 10)
    sites, masks, report = prepared(model, batches)
    for _ in range(8):
        prune_round(model, masks, report, sites, 0.95, strategy(name), Guards(floor=40))
        report = scan(model, batches, batches[0])
        assert not report.cut
    assert {masks.alive(weight) for weight in masks.names} == {40}


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_few_layers_are_emptied_per_round(limit) -> None:
    model, batches = Residual(), data(40, 8)
    sites, masks, report = prepared(model, batches)
    empty = 0
    for _ in range(4):
        guards = Guards(floor=5, max_emptied=limit)
        prune_round(model, masks, report, sites, 0.99, strategy("entropy"), guards)
        report = scan(model, batches, batches[0])
        now = sum(row.state == "empty" for row in report)
        assert now - empty <= limit
        empty = now
    assert (empty > 0) == (limit > 0)


def test_the_feeding_layer_of_two_readers_is_no_candidate() -> None:
    """Emptied, it would take the other reader with it: a way around the rectifier is none."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act, self.head = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)
            self.first, self.alone = nn.Linear(6, 6), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x + self.alone(self.first(x)))
            return self.head(h + self.act(h))

    torch.manual_seed(0)
    model, batches = Both(), data(40, 6)
    sites, masks, report = prepared(model, batches)
    assert [site.candidate for site in sites] == [True, False]
    assert "'fc'" in sites[1].why_not
    for _ in range(3):
        prune_round(model, masks, report, sites, 0.99, strategy("entropy"), Guards(1, 9))
        report = scan(model, batches, batches[0])
        assert not report.cut


def refused(model: nn.Module, batches: list[Tensor], message: str, fraction: float = 0.5) -> None:
    sites, masks, report = prepared(model, batches)
    before = everything(model)
    with pytest.raises(ValueError, match=message) as caught:
        prune_round(model, masks, report, sites, fraction, strategy("entropy"), Guards())
    assert "\n" not in str(caught.value)
    assert masks.is_dense
    assert all(
        torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in everything(model).items()
    )


def test_refuses_nan() -> None:
    model = Residual()
    model.fc[1].weight.data[0, 0] = math.nan
    refused(model, data(20, 8), "rectifier 'act.1' saw NaN, so")
    model = Residual()
    model.fc[1].weight.data[0, 0] = math.inf
    model.fc[1].weight.data[0, 1] = 1.0
    refused(model, data(20, 8), "not finite|saw NaN")


def test_refuses_the_unmeasured() -> None:
    model, batches = Residual(), data(20, 8)
    sites, masks, report = prepared(model, batches)
    rows = tuple(replace(r, state="unmeasured") if r.name == "act.2" else r for r in report)
    with pytest.raises(ValueError, match=r"rectifier 'act\.2' saw no data, so"):
        prune_round(
            model, masks, replace(report, rows=rows), sites, 0.5, strategy("uniform"), Guards()
        )
    assert masks.is_dense


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, math.nan])
def test_refuses_a_bad_fraction(fraction) -> None:
    refused(Residual(), data(20, 8), "fraction must be above 0 and below 1", fraction)


def test_refuses_where_there_is_no_candidate() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.a(x) + self.b(x))

    model, batches = Sum(), data(20, 4)
    sites = find_sites(trace(model, batches[0]))
    assert candidate_weights(model, sites) == {}
    masks = Masks({"a.weight": model.a.weight})
    report = scan(model, batches, batches[0])
    with pytest.raises(ValueError, match="no rectifier is a candidate"):
        prune_round(model, masks, report, sites, 0.5, strategy("entropy"), Guards())
    assert masks.is_dense


def test_refuses_a_cut_network() -> None:
    model, batches = mlp(8, 6), data(20, 8)
    with torch.no_grad():
        model[0].weight.zero_()
    sites, masks, report = prepared(model, batches)
    assert report.cut
    with pytest.raises(CutError, match=r"the network is cut \(.*\): its output is constant"):
        prune_round(model, masks, report, sites, 0.5, strategy("entropy"), Guards())
    assert masks.is_dense


def test_prunable_layers_say_what_they_are() -> None:
    model, batches = Residual(), data(40, 8)
    _, masks, report = prepared(model, batches)
    masks.prune_({"fc.1.weight": 90})
    layers = prunable_layers(model, masks, report, Guards(floor=10))
    weight = model.fc[1].weight.detach()
    alive = weight[weight != 0].abs().double().mean()
    assert [layer.alive for layer in layers] == [96, 6, 96, 96]
    assert layers[1].mean_magnitude == pytest.approx(float(alive), rel=1e-12)
    assert [layer.cap for layer in layers] == [96, 6, 96, 96]  # each has a way around
    assert {layer.fan_in for layer in layers} == {8}
    assert [layer.entropy for layer in layers] == [row.entropy for row in report]
    plain = mlp(8, 12, 5)
    _, masks, report = prepared(plain, batches)
    layers = prunable_layers(plain, masks, report, Guards(floor=70))
    assert [layer.cap for layer in layers] == [96 - 70, 0]  # 60 weights are below the floor


class Conv(nn.Module):
    def __init__(self, bias: bool, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(2, 6, 3, bias=bias)
        self.flat = nn.Flatten() if flat else nn.Identity()
        self.bn = nn.BatchNorm1d(6 * 16) if flat else nn.BatchNorm2d(6)
        self.act = nn.ReLU()
        self.head = nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.bn(self.flat(self.conv(x)))).flatten(1))


def trained_statistics(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.bn.weight.uniform_(0.5, 2)
        model.bn.bias.uniform_(-1, 1)
    model.train()
    for x in data(64, 2, 6, 6, seed=9):
        model(3 * x + 1)
    return model.eval()


@pytest.mark.parametrize("bias", [False, True])
def test_evaluation_sees_beta_behind_a_dead_filter(bias) -> None:
    model = trained_statistics(Conv(bias))
    x = data(8, 2, 6, 6)[0]
    sites = find_sites(trace(model, x))
    masks = Masks(candidate_weights(model, sites))
    dead = torch.tensor([True, False, True, False, False, True])
    pruned = dead.view(6, 1, 1, 1).expand(6, 2, 3, 3).contiguous()
    masks.prune_where_("conv.weight", pruned)
    stale = copy.deepcopy(model)
    assert reset_dead_batch_norms(model, sites) == ["bn"]
    with torch.no_grad():
        z = model.bn(model.conv(x))
        old = stale.bn(stale.conv(x))
        fresh = copy.deepcopy(model)  # what training would see: the statistics of this batch
        fresh_z = fresh.bn.train()(fresh.conv(x))
    beta = model.bn.bias.detach().view(1, 6, 1, 1).expand_as(z)
    torch.testing.assert_close(z[:, dead], beta[:, dead])
    torch.testing.assert_close(z[:, dead], fresh_z[:, dead])
    assert torch.equal(z[:, ~dead], old[:, ~dead])  # the living keep their statistics
    assert not torch.allclose(old[:, dead], beta[:, dead])
    model.train()(x)  # num_batches_tracked and the layer itself stay usable


def test_batch_norms_that_need_nothing_are_left_alone() -> None:
    model = trained_statistics(Conv(True))
    x = data(8, 2, 6, 6)[0]
    sites = find_sites(trace(model, x))
    before = everything(model)
    assert reset_dead_batch_norms(model, sites) == []  # no dead filter
    assert unchanged(model, before)
    bare = Conv(True)
    bare.bn = nn.BatchNorm2d(6, track_running_stats=False)
    with torch.no_grad():
        bare.conv.weight.zero_()
    assert reset_dead_batch_norms(bare, find_sites(trace(bare, x))) == []
    plain = mlp(8, 6)
    with torch.no_grad():
        plain[0].weight[0] = 0
    assert reset_dead_batch_norms(plain, find_sites(trace(plain, data(8, 8)[0]))) == []


def test_a_norm_over_something_else_than_the_neurons_is_not_touched() -> None:
    """Batch norm over flattened images has 16 statistics per filter."""
    model = trained_statistics(Conv(True, flat=True))
    x = data(8, 2, 6, 6)[0]
    with torch.no_grad():
        model.conv.weight[:2] = 0
    sites = find_sites(trace(model, x))
    before = everything(model)
    assert reset_dead_batch_norms(model, sites) == []
    assert unchanged(model, before)


def test_a_round_resets_the_batch_norms() -> None:
    class Branch(Conv):
        def forward(self, x: Tensor) -> Tensor:
            return self.head((x[:, :1, 1:5, 1:5] + self.act(self.bn(self.conv(x)))).flatten(1))

    model, batches = trained_statistics(Branch(False)), data(16, 2, 6, 6)
    sites, masks, report = prepared(model, batches)
    prune_round(model, masks, report, sites, 0.99, strategy("uniform"), Guards(1, 9))
    dead = ~model.conv.weight.detach().flatten(1).any(1)
    assert 4 <= int(dead.sum()) < 6
    assert not model.bn.running_mean[dead].any()
    assert not model.bn.running_var[dead].any()
    assert model.bn.running_var[~dead].all()
