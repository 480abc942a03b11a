"""Masked steps and magnitude selection of csrc/cuda, run on the CPU, against the CPU ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import GEOMETRIES, Kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layer_collapse import _C
from layer_collapse.ops.magnitude import check_selection

CPU = torch.ops.layer_collapse
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NONE = torch.empty(0, dtype=torch.int32)


def shares_of(ops: Any, weights: list[Tensor], masks: list[Tensor], k: int) -> Tensor:
    shares, info = ops.magnitude_shares(weights, masks, k)
    check_selection("magnitude_shares", info)
    return shares


def prune_(ops: Any, weights: list[Tensor], masks: list[Tensor], counts: list[int]) -> None:
    info = ops.magnitude_prune_.default(weights, masks, counts)
    check_selection("magnitude_prune_", info)


def pack(alive: Tensor) -> Tensor:
    return torch.from_numpy(_C.pack_mask(alive.flatten().numpy()))


def make_mask(count: int, kind: str, generator: torch.Generator) -> Tensor:
    """Of `count` bits: none, all, some at random, or whole words dead and alive."""
    if kind == "none":
        return NONE
    alive = torch.rand(count, generator=generator) >= {"all": 0.0, "some": 0.5, "few": 0.97}.get(
        kind, 0
    )
    if kind == "words":
        words = torch.rand((count + 31) // 32, generator=generator) < 0.3
        alive = words.repeat_interleave(32)[:count]
    return pack(alive)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with another alignment or order of memory."""
    if layout == "misaligned":
        base = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        view = base[1:].view(tensor.shape)
    elif layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        view = torch.empty_like(tensor.permute(3, 1, 0, 2).contiguous()).permute(2, 1, 3, 0)
    else:
        return tensor.contiguous()
    return view.copy_(tensor)


SHAPES = ((1,), (31,), (32,), (33,), (5, 3, 2, 2), (130,), (16, 8, 3, 3), (2, 4100), (0,))


def tensors_of(
    dtype: torch.dtype, layout: str, lists: int, seed: int
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """`lists` lists of tensors of all SHAPES in one layout, and a mask for each shape."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ("none", "all", "some", "few", "words")
    result: list[list[Tensor]] = [[] for _ in range(lists)]
    masks = []
    for i, shape in enumerate(SHAPES):
        one_layout = layout if len(shape) == 4 or layout == "misaligned" else "plain"
        for values in result:
            fresh = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            values.append(lay_out(fresh, one_layout))
        masks.append(make_mask(result[0][-1].numel(), kinds[(i + seed) % len(kinds)], generator))
    return result, masks


def assert_near(got: list[Tensor], expected: list[Tensor], ulps: int) -> None:
    """Equal to rounding of numbers about 1, which all operands are; zero at the same places."""
    for one, other in zip(got, expected, strict=True):
        assert one.stride() == other.stride()
        info = torch.finfo(one.dtype)
        torch.testing.assert_close(
            one, other, rtol=ulps * info.eps, atol=ulps * info.eps, equal_nan=True
        )
        assert torch.equal(one == 0, other == 0)


LAYOUTS = ("plain", "misaligned", "channels_last", "transposed")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sgd(kernels: Kernels, dtype: torch.dtype, layout: str) -> None:
    options = [
        # momentum, dampening, weight_decay, nesterov, maximize, first_step, scale
        (0.0, 0.0, 0.0, False, False, False, None),
        (0.0, 0.0, 1e-2, False, True, False, 1024.0),
        (0.9, 0.1, 1e-2, False, False, True, None),
        (0.9, 0.0, 0.0, True, False, False, 3.0),
    ]
    for seed, (momentum, damp, decay, nesterov, maximize, first, scale) in enumerate(options):
        kernels.run_as(GEOMETRIES[seed])
        (params, grads, buffers), masks = tensors_of(dtype, layout, 3, seed)
        CPU.apply_masks_(params, masks)
        if not first:
            CPU.apply_masks_(buffers, masks)
        buffers = buffers if momentum else []
        both = []
        for ops in (kernels.ops, CPU):
            own = [[t.clone() for t in group] for group in (params, buffers)]
            grad_scale = None if scale is None else torch.tensor(scale)
            rate = (None, torch.tensor(0.5), torch.tensor([0.3], dtype=torch.float64))[seed % 3]
            found = torch.zeros((), dtype=torch.float64)
            ops.masked_sgd_(
                own[0], grads, own[1], masks,
                0.1, momentum, damp, decay, nesterov, maximize, first, grad_scale, found, rate,
            )  # fmt: skip
            both.append(own)
        for got, expected in zip(*both, strict=True):
            assert_near(got, expected, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw(kernels: Kernels, dtype: torch.dtype, layout: str) -> None:
    for seed, (amsgrad, maximize, scale) in enumerate(
        [(False, False, None), (True, False, 512.0), (False, True, 3.0)]
    ):
        kernels.run_as(GEOMETRIES[seed])
        (params, grads, averages, squares, maxima), masks = tensors_of(dtype, layout, 5, seed)
        squares = [s.square_() for s in squares]
        maxima = [m.square_() for m in maxima] if amsgrad else []
        for state in (params, averages, squares, maxima):
            if state:
                CPU.apply_masks_(state, masks)
        steps = [
            torch.tensor(float(1 + 7 * i), dtype=(torch.float32, torch.float64)[i % 2])
            for i in range(len(params))
        ]
        both = []
        for ops in (kernels.ops, CPU):
            own = [[t.clone() for t in group] for group in (params, averages, squares, maxima)]
            grad_scale = None if scale is None else torch.tensor(scale)
            rate = (None, torch.tensor(0.5), torch.tensor([0.3], dtype=torch.float64))[seed]
            ops.masked_adamw_(
                own[0], grads, *own[1:], masks, steps,
                1e-2, 0.9, 0.999, 1e-8, 1e-2, maximize, grad_scale, None, rate,
            )  # fmt: skip
            both.append(own)
        for got, expected in zip(*both, strict=True):
            # 1 - beta^t has few digits left for small t, on either side
            assert_near(got, expected, 64 if dtype == torch.float64 else 8)


def test_found_inf_leaves_all_unchanged(kernels: Kernels) -> None:
    (params, grads, buffers), masks = tensors_of(torch.float32, "plain", 3, 0)
    own = [t.clone() for t in params]
    kernels.ops.masked_sgd_(
        own, grads, buffers, masks,
        0.1, 0.9, 0.0, 0.0, False, False, False, None, torch.ones(1), None,
    )  # fmt: skip
    assert all(map(torch.equal, own, params))
    steps = [torch.ones(()) for _ in params]
    kernels.ops.masked_adamw_(
        own, grads, buffers, buffers, [], masks, steps,
        0.1, 0.9, 0.99, 1e-8, 0.0, False, None, torch.ones(1), None,
    )  # fmt: skip
    assert all(map(torch.equal, own, params))


def test_a_warp_of_dead_words_touches_no_weight(kernels: Kernels) -> None:
    """NaN gradients and weights of pruned words are neither used nor replaced."""
    weights = torch.full((4096,), torch.nan)
    kept = weights.clone()
    mask = torch.zeros(128, dtype=torch.int32)
    ops = kernels.ops
    ops.masked_sgd_(
        [weights], [kept], [], [mask], 0.1, 0.0, 0.0, 0.0, False, False, False, None, None, None
    )
    assert weights.isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_masks(kernels: Kernels, dtype: torch.dtype, layout: str) -> None:
    for seed, geometry in enumerate(GEOMETRIES):
        kernels.run_as(geometry)
        (tensors,), masks = tensors_of(dtype, layout, 1, seed)
        tensors[2].fill_(torch.nan)
        own = [t.clone() for t in tensors]
        kernels.ops.apply_masks_(own, masks)
        CPU.apply_masks_(tensors, masks)
        for got, expected in zip(own, tensors, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_more_tensors_than_one_table_holds(kernels: Kernels) -> None:
    kernels.run_as(GEOMETRIES[1])
    torch.manual_seed(0)
    weights = [torch.randn(40 + i % 3) for i in range(150)]
    masks = [pack(torch.rand(w.shape) < 0.5) for w in weights]
    own = [w.clone() for w in weights]
    kernels.ops.apply_masks_(own, masks)
    CPU.apply_masks_(weights, masks)
    assert all(map(torch.equal, own, weights))
    k = sum(_C.count_alive(m.numpy()) for m in masks) // 2
    got = kernels.ops.magnitude_shares(weights, masks, k)
    assert all(map(torch.equal, got, CPU.magnitude_shares(weights, masks, k)))
    counts = got[0].tolist()
    own, expected = ([m.clone() for m in masks] for _ in range(2))
    prune_(kernels.ops, weights, own, counts)
    prune_(CPU, weights, expected, counts)
    assert all(map(torch.equal, own, expected))


@st.composite
def weights_and_masks(draw):
    weights, masks = [], []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.sampled_from([0, 1, 31, 33, 64, 1500]))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
        weight = torch.randn(count, generator=generator, dtype=torch.float64)
        if draw(st.booleans()):  # ties, zeros of both signs, denormals, infinities
            pool = torch.tensor(
                [0.0, -0.0, 1.0, -1.0, 0.5, torch.inf, -torch.inf, 1e-40, 6e-8], dtype=torch.float64
            )
            weight = pool[torch.randint(len(pool), (count,), generator=generator)]
        weights.append(
            lay_out(
                weight.to(draw(st.sampled_from(DTYPES))),
                draw(st.sampled_from(("plain", "misaligned"))),
            )
        )
        kind = draw(st.sampled_from(["all", "some", "few", "words"]))
        masks.append(make_mask(count, kind, generator))
    return weights, masks


@settings(max_examples=60, deadline=None)
@given(weights_and_masks(), st.floats(0, 1), st.sampled_from(GEOMETRIES))
def test_selection(kernels: Kernels, case, fraction: float, geometry: tuple[int, int]) -> None:
    weights, masks = case
    kernels.run_as(geometry)
    alive = [_C.count_alive(words.numpy()) for words in masks]
    k = round(fraction * sum(alive))
    for got, expected in zip(
        kernels.ops.magnitude_shares(weights, masks, k),
        CPU.magnitude_shares(weights, masks, k),
        strict=True,
    ):
        assert torch.equal(got, expected)
    counts = [round(fraction * count) for count in alive]
    own, on_device, expected = ([words.clone() for words in masks] for _ in range(3))
    told = CPU.magnitude_prune_.default(weights, expected, counts)
    assert torch.equal(kernels.ops.magnitude_prune_.default(weights, own, counts), told)
    assert all(map(torch.equal, own, expected))
    numbers = torch.tensor(counts)
    assert torch.equal(kernels.ops.magnitude_prune_.on_device(weights, on_device, numbers), told)
    assert all(map(torch.equal, on_device, expected))


@settings(max_examples=40, deadline=None)
@given(weights_and_masks(), st.booleans(), st.booleans(), st.sampled_from(GEOMETRIES))
def test_histograms(kernels: Kernels, case, nan: bool, wide: bool, geometry) -> None:
    weights, masks = case
    kernels.run_as(geometry)
    if nan and weights[0].numel():
        weights[0][0] = torch.nan
    wide = wide or any(w.dtype == torch.float64 for w in weights)
    prefix = torch.zeros(1, dtype=torch.int64)
    for digit in range(6 if wide else 3):
        got = kernels.ops.magnitude_histogram(weights, masks, prefix, digit, wide)
        assert torch.equal(got, CPU.magnitude_histogram(weights, masks, prefix, digit, wide))
        most = got[:, :2048].sum(0).argmax()  # a digit that occurs
        bits = min(11, (63 if wide else 31) - 11 * digit)
        prefix = (prefix << bits) | most


def test_selection_of_other_strides_and_dense_masks(kernels: Kernels) -> None:
    torch.manual_seed(0)
    base = torch.randint(-3, 4, (8, 6, 3, 4)).float()
    for weight in (
        base.to(memory_format=torch.channels_last),
        base[:, ::2],
        base.permute(3, 1, 0, 2),
    ):
        own, expected = (pack(torch.ones(weight.shape, dtype=torch.bool)) for _ in range(2))
        prune_(kernels.ops, [weight], [own], [100])
        prune_(CPU, [weight], [expected], [100])
        assert torch.equal(own, expected)
        assert torch.equal(
            *(shares_of(ops, [weight, base], [NONE, NONE], 300) for ops in (kernels.ops, CPU))
        )


@pytest.mark.parametrize("k", [-1, 41])
def test_k_out_of_range_is_refused(kernels: Kernels, k: int) -> None:
    weight, words = torch.arange(40.0), pack(torch.ones(40, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=f"k must lie between 0 and the 40 alive .*got {k}"):
        shares_of(kernels.ops, [weight], [words], k)
    kept = words.clone()
    with pytest.raises(RuntimeError, match=r"counts\[1\] must lie between 0 and the 40 alive"):
        prune_(kernels.ops, [weight, weight], [words, words.clone()], [3, k])
    assert torch.equal(words, kept)


def test_nan_among_alive_weights_is_refused_and_nothing_changes(kernels: Kernels) -> None:
    clean, dirty = torch.arange(40.0), torch.arange(40.0)
    dirty[7] = torch.nan
    masks = [pack(torch.ones(40, dtype=torch.bool)) for _ in range(2)]
    kept = [words.clone() for words in masks]
    with pytest.raises(RuntimeError, match=r"NaN in weights\[1\]"):
        shares_of(kernels.ops, [clean, dirty], masks, 5)
    with pytest.raises(RuntimeError, match=r"NaN in weights\[1\]"):
        prune_(kernels.ops, [clean, dirty], masks, [5, 5])
    assert all(map(torch.equal, masks, kept))
    prune_(kernels.ops, [clean, dirty], masks, [5, 0])  # NaN is left alone
    dirty_alive = torch.ones(40, dtype=torch.bool)
    dirty_alive[7] = False
    assert shares_of(kernels.ops, [dirty], [pack(dirty_alive)], 5).tolist() == [5]


def test_bad_arguments_are_refused(kernels: Kernels) -> None:
    weight = torch.ones(40)
    with pytest.raises(RuntimeError, match=r"masks\[0\] must be int32"):
        kernels.ops.apply_masks_([weight], [torch.ones(2)])
    with pytest.raises(RuntimeError, match=r"masks\[0\] must be contiguous of shape \[2\]"):
        kernels.ops.apply_masks_([weight], [torch.ones(3, dtype=torch.int32)])
    with pytest.raises(RuntimeError, match=r"must be dense, without gaps"):
        kernels.ops.apply_masks_([torch.ones(4, 6)[:, ::2]], [NONE])
    with pytest.raises(RuntimeError, match=r"masks\[0\] must have bits to clear"):
        prune_(kernels.ops, [weight], [NONE], [1])
    with pytest.raises(RuntimeError, match=r"masks\[0\] must have bits to clear"):
        kernels.ops.magnitude_prune_.on_device([weight], [NONE], torch.zeros(1).long())
    for counts in (torch.zeros(2).long(), torch.zeros(1)):
        with pytest.raises(RuntimeError, match=r"counts must be contiguous int64 of shape \[1\]"):
            kernels.ops.magnitude_prune_.on_device([weight], [pack(weight > 0)], counts)
