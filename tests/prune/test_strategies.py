"""Who loses how many weights: each strategy against its rule, written out again here."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layer_collapse.prune.masks import Masks
from layer_collapse.prune.rounds import Guards, plan
from layer_collapse.prune.strategies import (
    STRATEGIES,
    EntropyGuided,
    GlobalMagnitude,
    PrunableLayer,
    UniformMagnitude,
    strategy,
)

SIZES = ((6, 20), (5, 20), (8, 10), (7, 30))
ENTROPIES = (0.9, 0.5, 0.7, 0.3)
NO_LIMIT = Guards(floor=1, max_emptied=100)


def layers_and_masks(
    seed: int, entropies=ENTROPIES, scales=(1.0, 0.7, 0.9, 1.3), caps=None, active=None
) -> tuple[list[PrunableLayer], Masks]:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"fc{i}.weight": nn.Parameter(torch.randn(*size, generator=generator) * scale)
        for i, (size, scale) in enumerate(zip(SIZES, scales, strict=True))
    }
    layers = [
        PrunableLayer(
            weight=name,
            rectifier=f"act{i}",
            entropy=entropies[i],
            entropy_active=(active or entropies)[i],
            alive=w.numel(),
            mean_magnitude=float(w.detach().double().abs().mean()),
            fan_in=w.shape[1],
            cap=w.numel() if caps is None else caps[i],
        )
        for i, (name, w) in enumerate(weights.items())
    ]
    return layers, Masks(weights)


def largest_remainder(wanted: list[float], caps: list[int], total: int) -> list[int]:
    counts = [min(cap, math.floor(share)) for share, cap in zip(wanted, caps, strict=True)]
    order = sorted(range(len(wanted)), key=lambda i: -(wanted[i] - math.floor(wanted[i])))
    while sum(counts) < min(total, sum(caps)):
        for i in order:
            if sum(counts) < total and counts[i] < caps[i]:
                counts[i] += 1
    return counts


def published_rule(entropy: list[float], weight: list[float], caps: list[int], total: int):
    """The rule of the paper with caps, by hand: one layer over its cap leaves at a time."""
    left, fixed = total, dict[int, int]()
    while True:
        open_ = [i for i in range(len(caps)) if entropy[i] > 0 and caps[i] > 0 and i not in fixed]
        if not open_ or left <= 0:
            return [fixed.get(i, 0) for i in range(len(caps))]
        importance = {i: entropy[i] * weight[i] for i in open_}
        ratio = {i: sum(importance.values()) / importance[i] for i in open_}
        exponent = {i: math.exp(ratio[i] - max(ratio.values())) for i in open_}
        wanted = {i: exponent[i] / sum(exponent.values()) * left for i in open_}
        worst = max(open_, key=lambda i: wanted[i] - caps[i])
        if wanted[worst] > caps[worst]:
            fixed[worst] = caps[worst]
            left -= caps[worst]
            continue
        counts = largest_remainder([wanted[i] for i in open_], [caps[i] for i in open_], left)
        fixed.update(zip(open_, counts, strict=True))
        return [fixed.get(i, 0) for i in range(len(caps))]


@pytest.mark.parametrize("fraction", [0.05, 0.4, 0.75, 0.95])
@pytest.mark.parametrize("caps", [None, (100, 60, 80, 3), (0, 100, 80, 210)])
@pytest.mark.parametrize("kind", ["all", "active", "fan-in"])
def test_entropy_guided_is_the_published_rule(fraction, caps, kind) -> None:
    active = (0.9, 0.8, 0.2, 0.6)
    layers, masks = layers_and_masks(1, caps=caps, active=active)
    chosen = {
        "all": EntropyGuided(),
        "active": EntropyGuided(mean="active"),
        "fan-in": EntropyGuided(fan_in_normalised=True),
    }[kind]
    got = plan(layers, fraction, chosen, masks, NO_LIMIT)
    total = round(fraction * sum(a * b for a, b in SIZES))
    magnitude = [
        layer.mean_magnitude * (math.sqrt(layer.fan_in) if kind == "fan-in" else 1)
        for layer in layers
    ]
    entropy = list(active if kind == "active" else ENTROPIES)
    expected = published_rule(entropy, magnitude, [layer.cap for layer in layers], total)
    assert list(got.values()) == expected
    assert sum(expected) == min(total, sum(layer.cap for layer in layers))


def test_entropy_guided_by_hand() -> None:
    """Two layers of 100 weights, importances 1 and 2: R = 3 and 1.5, so 1 : e^-1.5."""
    weights = {n: nn.Parameter(torch.ones(10, 10)) for n in ("a", "b")}
    layers = [
        PrunableLayer(n, n, h, h, 100, m, 10, 100) for n, h, m in (("a", 0.5, 2.0), ("b", 1.0, 2.0))
    ]
    share = 100 / (1 + math.exp(-1.5))
    assert 81 < share < 82
    assert plan(layers, 0.5, EntropyGuided(), Masks(weights), NO_LIMIT) == {"a": 82, "b": 18}


def test_layers_without_entropy_give_no_weights_and_count_for_nothing() -> None:
    layers, masks = layers_and_masks(0, entropies=(0.9, 0.0, 0.7, 0.3))
    total = round(0.5 * (120 + 80 + 210))
    counts = plan(layers, 0.5, EntropyGuided(), masks, NO_LIMIT)
    assert counts["fc1.weight"] == 0
    assert sum(counts.values()) == total
    for name in ("magnitude", "uniform"):
        assert sum(plan(layers, 0.5, strategy(name), masks, NO_LIMIT).values()) == total


def sorted_all(layers: list[PrunableLayer], masks: Masks) -> list[tuple[float, int, int]]:
    """Every alive candidate weight, smallest first, ties by tensor and index."""
    everything = []
    for tensor, layer in enumerate(layers):
        values = masks._parameters[layer.weight].detach().abs().flatten().tolist()
        alive = masks.bool_mask(layer.weight).flatten().tolist()
        everything += [
            (v, tensor, i) for i, (v, a) in enumerate(zip(values, alive, strict=True)) if a
        ]
    return sorted(everything)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("ties", [False, True])
def test_global_magnitude_is_one_stable_sort(fraction, ties) -> None:
    layers, masks = layers_and_masks(2)
    if ties:
        for layer in layers:
            parameter = masks._parameters[layer.weight]
            parameter.data.copy_((parameter * 2).round() / 2)
    total = round(fraction * sum(a * b for a, b in SIZES))
    expected = sorted_all(layers, masks)[:total]
    counts = plan(layers, fraction, GlobalMagnitude(), masks, NO_LIMIT)
    assert list(counts.values()) == [sum(e[1] == t for e in expected) for t in range(len(SIZES))]
    masks.prune_(counts)
    for tensor, layer in enumerate(layers):
        gone = (~masks.bool_mask(layer.weight)).flatten().nonzero().flatten().tolist()
        assert gone == sorted(i for _, t, i in expected if t == tensor)


@pytest.mark.parametrize("caps", [(10, 100, 80, 210), (0, 7, 80, 1), (120, 100, 80, 0)])
def test_global_magnitude_with_caps_takes_the_smallest_that_may_go(caps) -> None:
    """One pass over the sorted weights that skips a layer once it is at its cap."""
    layers, masks = layers_and_masks(3, scales=(0.1, 1.0, 0.5, 2.0), caps=caps)
    total = round(0.6 * sum(a * b for a, b in SIZES))
    taken = [0] * len(layers)
    for _, tensor, _ in sorted_all(layers, masks):
        if sum(taken) < total and taken[tensor] < caps[tensor]:
            taken[tensor] += 1
    counts = plan(layers, 0.6, GlobalMagnitude(), masks, NO_LIMIT)
    assert list(counts.values()) == taken


def test_uniform_takes_the_same_share_of_every_layer() -> None:
    layers, masks = layers_and_masks(4)
    assert list(plan(layers, 0.5, UniformMagnitude(), masks, NO_LIMIT).values()) == [
        60,
        50,
        40,
        105,
    ]
    # 0.33 of (120, 100, 80, 210) = (39.6, 33, 26.4, 69.3) of 168: remainders .5, 0, .35, .18
    counts = plan(layers, 0.33, UniformMagnitude(), masks, NO_LIMIT)
    wanted = [168 * layer.alive / 510 for layer in layers]
    assert list(counts.values()) == largest_remainder(wanted, [120, 100, 80, 210], 168)
    assert list(counts.values()) == [40, 33, 26, 69]
    capped, masks = layers_and_masks(4, caps=(0, 100, 80, 210))
    counts = plan(capped, 0.5, UniformMagnitude(), masks, NO_LIMIT)
    assert counts["fc0.weight"] == 0
    assert sum(counts.values()) == 255  # what a cap refuses comes from the others


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 50),
    fraction=st.floats(0.001, 0.999),
    entropies=st.lists(st.floats(1e-6, 1), min_size=4, max_size=4),
    caps=st.tuples(*(st.integers(0, a * b) for a, b in SIZES)),
)
def test_all_strategies_prune_the_same_total(seed, fraction, entropies, caps) -> None:
    layers, masks = layers_and_masks(seed, entropies=entropies, caps=caps)
    expected = min(round(fraction * 510), sum(caps))
    for name in STRATEGIES:
        counts = plan(layers, fraction, strategy(name), masks, NO_LIMIT)
        assert sum(counts.values()) == expected, name
        assert all(0 <= k <= cap for k, cap in zip(counts.values(), caps, strict=True)), name


@pytest.mark.parametrize("name", [*STRATEGIES])
@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_no_more_layers_are_emptied_than_allowed(name, limit) -> None:
    layers, masks = layers_and_masks(5)
    free = plan(layers, 0.999, strategy(name), masks, NO_LIMIT)
    counts = plan(layers, 0.999, strategy(name), masks, Guards(floor=4, max_emptied=limit))
    before = [layer for layer in layers if free[layer.weight] == layer.alive]
    after = [layer for layer in layers if counts[layer.weight] == layer.alive]
    before.sort(key=lambda layer: layer.entropy * layer.mean_magnitude)
    assert before
    assert len(after) <= limit
    for layer in before[limit:]:  # those that matter most keep the floor
        assert layer.alive - counts[layer.weight] >= 4
    if name == "entropy":
        assert len(before) == 3
        assert {layer.weight for layer in after} == {layer.weight for layer in before[:limit]}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_refuses_a_bad_fraction(fraction) -> None:
    layers, masks = layers_and_masks(0)
    with pytest.raises(ValueError, match=r"^fraction must be above 0 and below 1 \(got .*\)$"):
        plan(layers, fraction, EntropyGuided(), masks, Guards())


def test_refuses_no_candidates_and_unknown_names() -> None:
    with pytest.raises(ValueError, match="no rectifier is a candidate"):
        plan([], 0.5, EntropyGuided(), Masks({"w": nn.Parameter(torch.ones(2))}), Guards())
    expected = re.escape("unknown strategy 'egp'; choose from entropy, magnitude, uniform")
    with pytest.raises(ValueError, match=expected):
        strategy("egp")
    with pytest.raises(ValueError, match=r"mean must be 'all' or 'active' \(got 'some'\)"):
        EntropyGuided(mean="some")
    for bad in ({"floor": 0}, {"max_emptied": -1}):
        with pytest.raises(ValueError, match="expected floor >= 1 and max_emptied >= 0"):
            Guards(**bad)
    chosen = UniformMagnitude()
    assert strategy(chosen) is chosen
