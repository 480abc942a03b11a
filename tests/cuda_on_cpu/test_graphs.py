"""Kernels as a CUDA graph holds them: what an op launches, replayed on other data.

An op that read the device, that let a kernel read the host, or whose counters were not what they
must be at a second start would give other results than the CPU op. Torch's own kernels are not part
of these graphs: inputs are such that an op calls none but to fill with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import GEOMETRIES, Kernels
from helpers import ALL_KINDS, SLOPE, sample
from test_list_kernels import CPU, make_mask, tensors_of
from torch import Tensor

from layer_collapse.measure.rectifiers import KINDS, Kind
from layer_collapse.ops.rectify import COUNT, FLAGS, HEADER, LIVE, POSITIONS, new_ledger

#: What torch computes, with kernels of its own.
SMOOTH = ("gelu", "gelu_tanh", "silu")
#: All tensors that an op reads or writes, in any order, with a seed's values.
Make = Callable[[int], list[Tensor]]
#: Calls the op; its results, and which of the tensors it may have written.
Call = Callable[[Any, list[Tensor]], tuple[list[Tensor], list[Tensor]]]


def check(kernels: Kernels, make: Make, call: Call, tolerance: float = 0.0) -> None:
    given = make(0)
    before = [t.clone() for t in given]
    with kernels.capture():
        got, written = call(kernels.ops, given)
    for one, other in zip(given, before, strict=True):  # nothing has run
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    for seed in (1, 2, 3):
        twins = make(seed)
        for one, other in zip(given, twins, strict=True):
            one.copy_(other)
        kernels.replay()
        expected, expected_written = call(CPU, twins)
        for one, other in zip([*got, *written], [*expected, *expected_written], strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "kind", [k for k in ALL_KINDS if k.name not in SMOOTH], ids=lambda k: k.name
)
def test_rectify(kernels: Kernels, kind: Kind, inplace: bool) -> None:
    kernels.run_as(GEOMETRIES[1])
    slope = SLOPE if kind.name == "leaky_relu" else 0.0
    for shape, masked in (((3, 5, 40), True), ((300, 8), False)):

        def make(seed: int, shape: tuple[int, ...] = shape) -> list[Tensor]:
            ledger = new_ledger(kind, shape[1])
            ledger[FLAGS] = (COUNT | LIVE, COUNT, 0, COUNT | LIVE)[seed]
            ledger[POSITIONS] = 1000 * seed
            ledger[HEADER:] = 100 * seed
            valid = torch.rand(shape[0], *shape[2:]) < 0.7
            slopes = torch.rand(shape[1]) + seed
            return [sample(*shape, seed=seed), ledger, valid, slopes]

        def call(
            ops: Any, tensors: list[Tensor], masked: bool = masked
        ) -> tuple[list[Tensor], list[Tensor]]:
            x, ledger, valid, slopes = tensors
            weight = slopes if kind.name == "prelu" else None
            rest = (ledger, kind.code, 1, slope, weight, valid if masked else None)
            if inplace:
                ops.rectify_(x, *rest)
                return [], [x, ledger]
            return [ops.rectify(x, *rest)], [ledger]

        # the live words are doubles, whose sums go in another order
        check(kernels, make, as_doubles(call), 1e-6 if kind.name == "hardswish" else 1e-12)


def as_doubles(call: Call) -> Call:
    """The live words of the ledger that a call writes last, as the numbers that they are."""

    def called(ops: Any, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        got, (*written, ledger) = call(ops, tensors)
        live = ledger[2:4].view(torch.float64)
        return got, [*written, ledger[:2], live, ledger[4:]]

    return called


def test_layer_entropies(kernels: Kernels) -> None:
    kernels.run_as(GEOMETRIES[0])
    kinds = [KINDS["relu"], KINDS["relu6"]]

    def make(seed: int) -> list[Tensor]:
        ledgers = [new_ledger(kind, 7) for kind in kinds]
        for kind, ledger in zip(kinds, ledgers, strict=True):
            CPU.rectify(torch.randn(5 * seed, 7) * 5, ledger, kind.code, 1, 0.0, None, None)
        return ledgers

    def call(ops: Any, ledgers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return list(ops.layer_entropies(ledgers, [kind.code for kind in kinds])), []

    check(kernels, make, call, 1e-12)


def make_step(seed: int) -> list[Tensor]:
    """Weights, gradients, three kinds of state, masks, steps, scale and found_inf of a step."""
    lists, masks = tensors_of(torch.float32, "plain", 5, seed % 2)
    masks = [make_mask(w.numel(), "some", torch.Generator().manual_seed(seed)) for w in lists[0]]
    for state in lists[2:]:
        for tensor in state:
            tensor.abs_()
    for state in (lists[0], *lists[2:]):
        CPU.apply_masks_(state, masks)
    steps = [torch.tensor(1.0 + seed + i) for i in range(len(masks))]
    scale, found = torch.tensor(2.0**seed), torch.tensor(float(seed == 2))
    return [*(t for group in lists for t in group), *masks, *steps, scale, found]


def split_step(tensors: list[Tensor]) -> tuple[list[list[Tensor]], Tensor, Tensor]:
    *rest, scale, found = tensors
    size = len(rest) // 7
    return [rest[i : i + size] for i in range(0, len(rest), size)], scale, found


def test_masked_sgd(kernels: Kernels) -> None:
    kernels.run_as(GEOMETRIES[2])

    def call(ops: Any, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        (params, grads, buffers, _, _, masks, _), scale, found = split_step(tensors)
        options = (0.1, 0.9, 0.0, 1e-2, True, False, False)
        ops.masked_sgd_(params, grads, buffers, masks, *options, scale, found)
        return [], [*params, *buffers]

    check(kernels, make_step, call, 1e-6)


def test_masked_adamw(kernels: Kernels) -> None:
    kernels.run_as(GEOMETRIES[3])

    def call(ops: Any, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        (params, grads, averages, squares, maxima, masks, steps), scale, found = split_step(tensors)
        state = (averages, squares, maxima)
        options = (1e-2, 0.9, 0.999, 1e-8, 1e-2, False)
        ops.masked_adamw_(params, grads, *state, masks, steps, *options, scale, found)
        return [], [*params, *averages, *squares, *maxima]

    check(kernels, make_step, call, 1e-6)


def make_selection(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(n, generator=generator).mul(9).round() for n in (5000, 0, 70, 3)]
    if seed == 2:
        weights[2][5] = torch.nan
    kinds = ("some", "all", "words", "all")
    masks = [make_mask(w.numel(), k, generator) for w, k in zip(weights, kinds, strict=True)]
    if seed == 2:
        masks[2].fill_(-1)[-1].bitwise_and_(0x3F)
    return [*weights, *masks]


def test_global_pruning_stays_on_the_device(kernels: Kernels) -> None:
    """Shares, prune and apply in one graph; with NaN among the weights nothing changes."""
    kernels.run_as(GEOMETRIES[0])

    def call(ops: Any, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        weights, masks = tensors[:4], tensors[4:]
        shares, refused = ops.magnitude_shares(weights, masks, 1000)
        also = ops.magnitude_prune_.on_device(weights, masks, shares)
        ops.apply_masks_(weights, masks)
        return [shares, refused, also], tensors

    check(kernels, make_selection, call)
    nan = make_selection(2)
    (shares, refused, _), _ = call(CPU, nan)
    assert shares.tolist() == [0] * 4
    assert refused[0, 2] == 2
    assert all(map(torch.equal, nan[4:], make_selection(2)[4:]))


def test_prune_by_numbers(kernels: Kernels) -> None:
    kernels.run_as(GEOMETRIES[4])

    def call(ops: Any, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [ops.magnitude_prune_.default(tensors[:4], tensors[4:], [900, 0, 9, 2])], tensors[4:]

    check(kernels, make_selection, call)


def test_histogram(kernels: Kernels) -> None:
    kernels.run_as(GEOMETRIES[1])

    def make(seed: int) -> list[Tensor]:
        return [*make_selection(seed), torch.tensor([1000 + seed])]

    def call(ops: Any, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        *both, prefix = tensors
        return [ops.magnitude_histogram(both[:4], both[4:], prefix, 1, False)], []

    check(kernels, make, call)
