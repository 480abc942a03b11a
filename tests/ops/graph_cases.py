"""What ops do in a CUDA graph: cases for the harness on a CPU and for a GPU.

Inputs are such that an op calls none of torch's kernels but to fill with zeros, which the harness
does not replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from helpers import ALL_KINDS, SLOPE, sample
from torch import Tensor

from layer_collapse import _C
from layer_collapse.measure.rectifiers import KINDS, Kind
from layer_collapse.ops.rectify import COUNT, FLAGS, HEADER, LIVE, POSITIONS, new_ledger

CPU = torch.ops.layer_collapse
#: What torch computes, with kernels of its own.
SMOOTH = ("gelu", "gelu_tanh", "silu")
#: The seed whose weights hold a NaN, or whose gradients overflowed.
BAD_SEED = 2

#: Results of a call, and the tensors that it may have written.
Outcome = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Case:
    name: str
    #: all tensors that the op reads or writes, on the CPU, with the values of a seed (0 to 3)
    make: Callable[[int], list[Tensor]]
    #: calls the op, of whichever namespace, on such tensors
    call: Callable[[Any, list[Tensor]], Outcome]
    #: that a float may be off by, relative and absolute
    tolerance: float = 0.0

    def __str__(self) -> str:
        return self.name


def assert_replayed(case: Case, got: Outcome, seed: int) -> None:
    """The outcome of a replay is that of the CPU op on the values of a seed."""
    expected = case.call(CPU, case.make(seed))
    for one, other in zip([*got[0], *got[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(
            one.cpu(), other, rtol=case.tolerance, atol=case.tolerance, equal_nan=True
        )


def rectify_case(kind: Kind, shape: tuple[int, ...], masked: bool, inplace: bool) -> Case:
    slope = SLOPE if kind.name == "leaky_relu" else 0.0

    def make(seed: int) -> list[Tensor]:
        ledger = new_ledger(kind, shape[1])
        ledger[FLAGS] = (COUNT | LIVE, COUNT, 0, COUNT | LIVE)[seed]
        ledger[POSITIONS] = 1000 * seed
        ledger[HEADER:] = 100 * seed
        generator = torch.Generator().manual_seed(seed)
        valid = torch.rand(shape[0], *shape[2:], generator=generator) < 0.7
        slopes = torch.rand(shape[1], generator=generator) + seed
        return [sample(*shape, seed=seed), ledger, valid, slopes]

    def call(ops: Any, tensors: list[Tensor]) -> Outcome:
        x, ledger, valid, slopes = tensors
        weight = slopes if kind.name == "prelu" else None
        rest = (ledger, kind.code, 1, slope, weight, valid if masked else None)
        live = ledger[2:4].view(torch.float64)  # sums of doubles, in an order of their own
        words = [ledger[:2], live, ledger[4:]]
        if inplace:
            ops.rectify_(x, *rest)
            return [], [x, *words]
        return [ops.rectify(x, *rest)], words

    name = f"rectify{'_' * inplace} {kind.name} {list(shape)}"
    return Case(name, make, call, 1e-6 if kind.name == "hardswish" else 1e-12)


def rectify_cases() -> Iterator[Case]:
    for kind in ALL_KINDS:
        if kind.name not in SMOOTH:
            for inplace in (False, True):
                yield rectify_case(kind, (3, 5, 40), True, inplace)
                yield rectify_case(kind, (300, 8), False, inplace)


def entropies_case() -> Case:
    kinds = [KINDS["relu"], KINDS["relu6"]]

    def make(seed: int) -> list[Tensor]:
        ledgers = [new_ledger(kind, 7) for kind in kinds]
        for kind, ledger in zip(kinds, ledgers, strict=True):
            x = sample(5 * seed, 7, seed=seed).nan_to_num()
            CPU.rectify(x, ledger, kind.code, 1, 0.0, None, None)
        return ledgers

    def call(ops: Any, ledgers: list[Tensor]) -> Outcome:
        return list(ops.layer_entropies(ledgers, [kind.code for kind in kinds])), []

    return Case("layer_entropies", make, call, 1e-12)


def random_words(count: int, generator: torch.Generator) -> Tensor:
    alive = torch.rand(count, generator=generator) < 0.6
    alive[32:64] = False
    return torch.from_numpy(_C.pack_mask(alive.numpy()))


SIZES = (1, 33, 130, 1152, 8200, 0)
LISTS = 7


def make_step(seed: int) -> list[Tensor]:
    """Weights, gradients, three kinds of state, masks and steps; then grad_scale, found_inf and
    lr_scale."""
    generator = torch.Generator().manual_seed(seed)
    lists = [[torch.randn(n, generator=generator) for n in SIZES] for _ in range(5)]
    masks = [random_words(n, generator) for n in SIZES]
    for state in lists[2:]:
        for tensor in state:
            tensor.abs_()
    for state in (lists[0], *lists[2:]):
        CPU.apply_masks_(state, masks)
    steps = [torch.tensor(1.0 + seed + i) for i in range(len(SIZES))]
    scale, found = torch.tensor(2.0**seed), torch.tensor(float(seed == BAD_SEED))
    rate = torch.tensor(0.5 + 0.25 * seed)
    return [*(t for group in lists for t in group), *masks, *steps, scale, found, rate]


def split_step(tensors: list[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
    size = len(SIZES)
    lists = [tensors[i * size : (i + 1) * size] for i in range(LISTS)]
    return lists, tensors[LISTS * size :]


def call_sgd(ops: Any, tensors: list[Tensor]) -> Outcome:
    (params, grads, buffers, _, _, masks, _), scalars = split_step(tensors)
    options = (0.1, 0.9, 0.0, 1e-2, True, False, False)
    ops.masked_sgd_(params, grads, buffers, masks, *options, *scalars)
    return [], [*params, *buffers]


def call_adamw(ops: Any, tensors: list[Tensor]) -> Outcome:
    (params, grads, averages, squares, maxima, masks, steps), scalars = split_step(tensors)
    options = (1e-2, 0.9, 0.999, 1e-8, 1e-2, False)
    ops.masked_adamw_(params, grads, averages, squares, maxima, masks, steps, *options, *scalars)
    return [], [*params, *averages, *squares, *maxima]


def make_selection(seed: int) -> list[Tensor]:
    """Four weights, with many ties, and their masks; the bad seed has a NaN."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (5000, 0, 70, 3)
    weights = [torch.randn(n, generator=generator).mul(9).round() for n in sizes]
    masks = [random_words(n, generator) for n in sizes]
    masks[2] = torch.from_numpy(_C.pack_mask(torch.ones(70, dtype=torch.bool).numpy()))
    masks[3].fill_(0b111)
    if seed == BAD_SEED:
        weights[2][5] = torch.nan
    return [*weights, *masks]


def call_pruning(ops: Any, tensors: list[Tensor]) -> Outcome:
    """A global pruning: nothing of it is known to the host."""
    weights, masks = tensors[:4], tensors[4:]
    shares, refused = ops.magnitude_shares(weights, masks, 1000)
    also = ops.magnitude_prune_.on_device(weights, masks, shares)
    ops.apply_masks_(weights, masks)
    return [shares, refused, also], tensors


def call_prune(ops: Any, tensors: list[Tensor]) -> Outcome:
    counts = [900, 0, 9, 2]
    return [ops.magnitude_prune_.default(tensors[:4], tensors[4:], counts)], tensors[4:]


def call_histogram(ops: Any, tensors: list[Tensor]) -> Outcome:
    *both, prefix = tensors
    return [ops.magnitude_histogram(both[:4], both[4:], prefix, 1, False)], []


CASES = (
    *rectify_cases(),
    entropies_case(),
    Case("masked_sgd_", make_step, call_sgd, 1e-6),
    Case("masked_adamw_", make_step, call_adamw, 1e-6),
    Case("global pruning", make_selection, call_pruning),
    Case("magnitude_prune_", make_selection, call_prune),
    Case(
        "magnitude_histogram",
        lambda seed: [*make_selection(seed), torch.tensor([1030 + seed])],
        call_histogram,
    ),
)
