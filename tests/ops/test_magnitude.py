"""Exact magnitude selection against a stable sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layer_collapse import _C
from layer_collapse.ops.magnitude import (
    magnitude_prune_,
    magnitude_prune_reference,
    magnitude_shares,
    magnitude_shares_reference,
)
from layer_collapse.ops.magnitude_digits import (
    choose_digit,
    magnitude_histogram,
    magnitude_histogram_reference,
)
from layer_collapse.ops.masked_step import unpack_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
VALUES = [0.0, -0.0, 1.0, -1.0, 1.0000001, 0.5, math.inf, -math.inf, 1e-40, -5e-324, 6e-8, 3e38]


def pack(alive):
    return torch.from_numpy(_C.pack_mask(alive.flatten().numpy()))


def alive_count(words):
    return _C.count_alive(words.numpy())


@st.composite
def weights_and_masks(draw):
    weights, masks = [], []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.sampled_from([0, 1, 31, 32, 33, 64, 200]))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
        weight = torch.randn(count, generator=generator, dtype=torch.float64)
        if draw(st.booleans()):  # few values: ties, zeros of both signs, denormals, infinities
            pool = torch.tensor(VALUES, dtype=torch.float64)
            weight = pool[torch.randint(len(pool), (count,), generator=generator)]
        weights.append(weight.to(draw(st.sampled_from(DTYPES))))
        sparsity = draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
        masks.append(pack(torch.rand(count, generator=generator) >= sparsity))
    return weights, masks


# the device is the same for all examples of a test
SAME_DEVICE = [HealthCheck.function_scoped_fixture]


@settings(max_examples=150, deadline=None, suppress_health_check=SAME_DEVICE)
@given(case=weights_and_masks(), fraction=st.floats(0, 1))
def test_shares_equal_a_stable_sort(case, fraction, device):
    weights, masks = case
    k = round(fraction * sum(map(alive_count, masks)))
    shares = magnitude_shares([w.to(device) for w in weights], [m.to(device) for m in masks], k)
    assert shares.dtype == torch.int64
    assert shares.tolist() == magnitude_shares_reference(weights, masks, k).tolist()


@settings(max_examples=150, deadline=None, suppress_health_check=SAME_DEVICE)
@given(case=weights_and_masks(), fraction=st.floats(0, 1))
def test_prune_equals_a_stable_sort(case, fraction, device):
    weights, masks = case
    twins = [words.clone() for words in masks]
    kept = [weight.clone() for weight in weights]
    counts = [round(fraction * alive_count(words)) for words in masks]
    expected = [alive_count(w) - c for w, c in zip(masks, counts, strict=True)]
    weights, masks = [w.to(device) for w in weights], [m.to(device) for m in masks]
    magnitude_prune_(weights, masks, counts)
    weights, masks = [w.cpu() for w in weights], [m.cpu() for m in masks]
    magnitude_prune_reference(weights, twins, counts)
    assert all(map(torch.equal, masks, twins))
    assert all(map(torch.equal, weights, kept))
    assert list(map(alive_count, masks)) == expected


@settings(max_examples=100, deadline=None, suppress_health_check=SAME_DEVICE)
@given(case=weights_and_masks(), pick=st.integers(0, 10**6), nan=st.booleans())
def test_histogram_equals_the_twin(case, pick, nan, device):
    weights, masks = case
    # which bucket a NaN falls into is up to how a device converts it
    if nan and device.type == "cpu" and weights[0].numel():
        weights[0].flatten()[0] = math.nan
    wide = any(w.dtype == torch.float64 for w in weights) or pick % 2 == 0
    there = [t.to(device) for t in weights], [t.to(device) for t in masks]
    prefix = torch.zeros(1, dtype=torch.int64)
    for digit in range(6 if wide else 3):
        ours = magnitude_histogram(*there, prefix.to(device), digit, wide).cpu()
        twin = magnitude_histogram_reference(weights, masks, prefix, digit, wide)
        assert torch.equal(ours, twin)
        counted = int(ours[:, :2048].sum())
        left = torch.tensor([1 + pick % max(counted, 1)])  # some digit that occurs
        prefix, _ = choose_digit(ours.sum(0), prefix, left, digit, wide)


def magnitudes_of(weights, masks):
    alive = [unpack_reference(m, w.shape) for w, m in zip(weights, masks, strict=True)]
    return torch.cat([w[a].double().abs() for w, a in zip(weights, alive, strict=True)])


@settings(max_examples=100, deadline=None)
@given(st.lists(weights_and_masks(), min_size=1, max_size=3), st.floats(0, 1))
def test_histograms_of_processes_add_up_to_the_selection_of_all_weights(shards, fraction):
    weights, masks = ([t for shard in shards for t in shard[i]] for i in range(2))
    alive = sum(map(alive_count, masks))
    if alive == 0:
        return
    k = max(1, round(fraction * alive))
    wide = any(w.dtype == torch.float64 for w in weights)
    prefix, left = torch.zeros(1, dtype=torch.int64), torch.tensor([k])
    below = [torch.zeros(len(own), dtype=torch.int64) for own, _ in shards]
    for digit in range(6 if wide else 3):
        own = [magnitude_histogram(*shard, prefix, digit, wide) for shard in shards]
        total = sum(h.sum(0) for h in own)  # the all-reduce
        if digit == 0:
            assert total[:2048].sum() == alive
        prefix, left = choose_digit(total, prefix, left, digit, wide)
        bucket = int(prefix) & (2047 if digit < (5 if wide else 2) else (255 if wide else 511))
        for sums, histogram in zip(below, own, strict=True):
            sums += histogram[:, :bucket].sum(1)
    bits = prefix if wide else prefix.to(torch.int32)
    kth = bits.view(torch.float64 if wide else torch.float32).double()
    every = magnitudes_of(weights, masks)
    assert kth == every.sort().values[k - 1]
    assert left == k - (every < kth).sum()
    # what a process takes: all below, and the ties that the earlier ones have left
    ties, shares = int(left), []
    for sums, histogram in zip(below, own, strict=True):
        for less, equal in zip(sums.tolist(), histogram[:, bucket].tolist(), strict=True):
            shares.append(less + min(ties, equal))
            ties -= min(ties, equal)
    assert shares == magnitude_shares(weights, masks, k).tolist()


def test_histogram_refuses():
    weights, none = [torch.ones(40)], [torch.empty(0, dtype=torch.int32)]
    zero = torch.zeros(1, dtype=torch.int64)
    for arguments, message in (
        (([], [], zero, 0, False), "weights must hold at least one tensor"),
        ((weights, none, zero, 3, False), r"digit must be 0 to 2 \(got 3\)"),
        ((weights, none, zero, -1, True), r"digit must be 0 to 5 \(got -1\)"),
        ((weights, none, zero.int(), 0, False), r"prefix must be one int64 \(got Int with 1"),
        ((weights, none, torch.zeros(2).long(), 0, False), r"got Long with 2 numbers"),
        (([torch.ones(2).double()], none, zero, 0, False), "wide must be true with a float64"),
        ((weights, [], zero, 0, False), "masks must hold one tensor per weight"),
    ):
        with pytest.raises(RuntimeError, match=f"^magnitude_histogram: .*{message}"):
            magnitude_histogram(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large(dtype, device):
    torch.manual_seed(0)
    weights = [torch.randn(300001).to(device, dtype), torch.randn(1000, 70).to(device, dtype)]
    masks = [pack(torch.rand(w.shape) > 0.3).to(device) for w in weights]
    for k in (1, 1000, 150000, sum(alive_count(words.cpu()) for words in masks)):
        shares = magnitude_shares(weights, masks, k)
        assert torch.equal(shares, magnitude_shares_reference(weights, masks, k))
        twins = [words.clone() for words in masks]
        ours = [words.clone() for words in masks]
        magnitude_prune_(weights, ours, shares.tolist())
        magnitude_prune_reference(weights, twins, shares.tolist())
        assert all(map(torch.equal, ours, twins))
    prefix = torch.zeros(1, dtype=torch.int64, device=device)
    histograms = magnitude_histogram(weights, masks, prefix, 0, True)
    assert torch.equal(histograms, magnitude_histogram_reference(weights, masks, prefix, 0, True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_by_logical_index_in_any_layout(dtype, device):
    torch.manual_seed(0)
    values = torch.randint(-3, 4, (8, 6, 3, 3)).to(device, dtype)
    expected = pack(torch.ones(values.shape, dtype=torch.bool)).to(device)
    magnitude_prune_reference([values], [expected], [200])
    layouts = [
        values,
        values.to(memory_format=torch.channels_last),
        torch.stack([values, values], -1)[..., 1],
    ]
    for weight in layouts:
        words = pack(torch.ones(values.shape, dtype=torch.bool)).to(device)
        magnitude_prune_([weight], [words], [200])
        assert torch.equal(words, expected)


def check_against_sort(weights, masks, k):
    """Shares and pruned masks; a sort of float32 keys, so that millions of weights are fast."""
    alive = [unpack_reference(m, w.shape).flatten() for w, m in zip(weights, masks, strict=True)]
    values = [w.flatten()[a].abs() for w, a in zip(weights, alive, strict=True)]
    chosen = torch.zeros(sum(map(len, values)), dtype=torch.bool)
    chosen[torch.sort(torch.cat(values), stable=True).indices[:k]] = True
    parts = chosen.split(list(map(len, values)))
    shares = magnitude_shares(weights, masks, k)
    assert shares.tolist() == [int(part.sum()) for part in parts]
    words = [mask.clone() for mask in masks]
    magnitude_prune_(weights, words, shares.tolist())
    for flags, part, mask in zip(alive, parts, words, strict=True):
        kept = flags.clone()
        kept[flags] = ~part
        assert torch.equal(mask, pack(kept))


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("share", [1e-6, 0.001, 0.5, 0.9, 1.0])
def test_sampled_selection(sparsity, share):
    """Enough weights that the range of the cut is guessed from a sample."""
    torch.manual_seed(0)
    count = 400_000 if sparsity == 0 else 4_000_000
    weights = [torch.randn(count - 7), 3 * torch.randn(7), 0.1 * torch.randn(count // 1000, 333)]
    masks = [pack(torch.rand(w.shape) >= sparsity) for w in weights]
    check_against_sort(weights, masks, max(1, int(share * sum(map(alive_count, masks)))))


def test_more_keys_inside_the_guess_than_may_be_kept():
    """Two neighbouring values: whatever is guessed at the border holds half a million and more."""
    torch.manual_seed(0)
    values = torch.tensor([1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))])
    weights = [values[torch.randint(2, (1_500_000,))] for _ in range(2)]
    masks = [pack(torch.ones(w.shape, dtype=torch.bool)) for w in weights]
    border = int(sum((w == 1).sum() for w in weights))
    for k in (border - 1, border, border + 1):
        check_against_sort(weights, masks, k)


@pytest.mark.parametrize("count", [300_000, 2_000_000])
def test_a_sample_that_misleads(count):
    """Large values exactly where key_sample.h draws, so that every guess is wrong."""
    torch.manual_seed(0)
    size = 32768
    part = count // size
    number = torch.arange(size, dtype=torch.int64).numpy().astype("uint64")
    drawn = number * part + ((number + 1) * 0x9E3779B97F4A7C15 >> 33) % part
    weight = torch.rand(count)
    weight[torch.from_numpy(drawn.astype("int64"))] += 5
    masks = [pack(torch.ones(count, dtype=torch.bool))]
    for k in (1, count // 2, count - size):
        check_against_sort([weight], masks, k)


def test_nan_among_many():
    weights = [torch.ones(300_000), torch.ones(300_000)]
    weights[1][123_456] = math.nan
    masks = [pack(torch.ones(w.shape, dtype=torch.bool)) for w in weights]
    with pytest.raises(RuntimeError, match=r"alive .* NaN in weights\[1\]\)"):
        magnitude_shares(weights, masks, 1000)
    masks[1] = pack(~weights[1].isnan())
    assert magnitude_shares(weights, masks, 300_001).tolist() == [300_000, 1]


def test_signed_zeros_tie():
    words = pack(torch.ones(3, dtype=torch.bool))
    magnitude_prune_([torch.tensor([0.0, -0.0, 0.0])], [words], [1])
    assert words.item() == 0b110


def test_ties_go_to_the_earlier_tensor():
    masks = [pack(torch.ones(2, dtype=torch.bool)) for _ in range(3)]
    weights = [torch.ones(2), torch.ones(2).double(), torch.ones(2).half()]
    assert magnitude_shares(weights, masks, 3).tolist() == [2, 1, 0]


def test_empty_mask_counts_all_as_alive():
    none = torch.empty(0, dtype=torch.int32)
    assert magnitude_shares([torch.arange(40.0), torch.ones(2)], [none, none], 3).tolist() == [2, 1]


def test_pruned_nan_is_ignored_and_alive_nan_refused(device):
    weights = [torch.ones(40, device=device), torch.ones(40, device=device)]
    weights[1][7] = math.nan
    masks = [pack(torch.ones(40, dtype=torch.bool)).to(device) for _ in range(2)]
    before = [words.clone() for words in masks]
    with pytest.raises(RuntimeError, match=r"^magnitude_shares: alive .* NaN in weights\[1\]\)"):
        magnitude_shares(weights, masks, 1)
    with pytest.raises(RuntimeError, match=r"^magnitude_prune_: alive .* NaN in weights\[1\]\)"):
        magnitude_prune_(weights, masks, [5, 1])
    assert all(map(torch.equal, masks, before))
    magnitude_prune_(weights, masks, [5, 0])
    masks[1] = pack(~weights[1].isnan().cpu()).to(device)
    assert magnitude_shares(weights, masks, 74).tolist() == [35, 39]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_of_any_payload_is_refused(dtype):
    bits, low = {
        torch.float32: (torch.int32, 0x7F800001),
        torch.float64: (torch.int64, 0x7FF0000000000001),
        torch.bfloat16: (torch.int16, 0x7F81),
        torch.float16: (torch.int16, 0x7C01),
    }[dtype]
    weight = torch.ones(5, dtype=dtype)
    weight.view(bits)[2] = low
    with pytest.raises(RuntimeError, match="NaN"):
        magnitude_shares([weight], [pack(torch.ones(5, dtype=torch.bool))], 1)


def test_refusals_change_nothing():
    weights = [torch.ones(40), torch.ones(40)]
    masks = [pack(torch.ones(40, dtype=torch.bool)) for _ in range(2)]
    before = [words.clone() for words in masks]
    none = torch.empty(0, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"counts\[1\] must lie between 0 and the 40 .*got 41"):
        magnitude_prune_(weights, masks, [3, 41])
    with pytest.raises(RuntimeError, match=r"counts\[0\] must lie between 0 and the 40 .*got -1"):
        magnitude_prune_(weights, masks, [-1, 4])
    with pytest.raises(RuntimeError, match=r"counts must hold one number per tensor \(got 1 for 2"):
        magnitude_prune_(weights, masks, [3])
    with pytest.raises(RuntimeError, match=r"masks\[1\] must have bits to clear"):
        magnitude_prune_(weights, [masks[0], none], [3, 3])
    with pytest.raises(RuntimeError, match=r"k must lie between 0 and the 80 alive.*got 81"):
        magnitude_shares(weights, masks, 81)
    with pytest.raises(RuntimeError, match=r"k must lie between 0 and the 80 alive.*got -1"):
        magnitude_shares(weights, masks, -1)
    with pytest.raises(RuntimeError, match=r"magnitude_shares: weights must hold at least one"):
        magnitude_shares([], [], 0)
    with pytest.raises(RuntimeError, match=r"weights\[0\] must be float32.*got Long"):
        magnitude_shares([torch.ones(40).long()], masks[:1], 1)
    with pytest.raises(RuntimeError, match=r"masks must hold one tensor per weight"):
        magnitude_shares(weights, masks[:1], 1)
    assert all(map(torch.equal, masks, before))


def test_several_threads_equal_one():
    torch.manual_seed(0)
    weights = [(torch.randn(n) * 50).round() for n in (600003, 0, 7, 90000)]
    masks = [pack(torch.rand(w.shape) > 0.2) for w in weights]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            words = [mask.clone() for mask in masks]
            shares = magnitude_shares(weights, words, 150000)
            magnitude_prune_(weights, words, shares.tolist())
            results.append([shares, *words])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_masks_version_moves():
    words = pack(torch.ones(40, dtype=torch.bool))
    version = words._version
    magnitude_prune_([torch.ones(40)], [words], [3])
    assert words._version > version


def test_opcheck(device):
    weights = [torch.randn(40, device=device, requires_grad=True), torch.randn(3, 5).double()]
    weights[1] = weights[1].to(device)
    masks = [pack(torch.rand(w.shape) > 0.3).to(device) for w in weights]
    ops = torch.ops.layer_collapse
    torch.library.opcheck(ops.magnitude_shares.default, (weights, masks, 9))
    prefix = torch.zeros(1, dtype=torch.int64, device=device)
    torch.library.opcheck(ops.magnitude_histogram.default, (weights, masks, prefix, 1, True))
    torch.library.opcheck(ops.magnitude_prune_.default, (weights, masks, [3, 2]))
    counts = torch.tensor([3, 2], device=device)
    torch.library.opcheck(ops.magnitude_prune_.on_device, (weights, masks, counts))
