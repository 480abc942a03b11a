"""What kernels are given by those who mean no good, or who know no better."""

from __future__ import annotations

import pytest
import torch
from conftest import GEOMETRIES, Kernels
from helpers import ALL_KINDS
from test_list_kernels import CPU, DTYPES, assert_near, lay_out, make_mask, pack, prune_
from test_rectify_kernels import check
from torch import Tensor

from layer_collapse.measure.rectifiers import KINDS
from layer_collapse.ops.rectify import new_ledger


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 6), (4, 0)], ids=str)
def test_a_bool_of_any_byte_is_true(kernels: Kernels, shape: tuple[int, ...]) -> None:
    bytes_ = torch.tensor([0, 2, 1, 255], dtype=torch.uint8)
    if len(shape) == 3:
        bytes_ = bytes_[:, None].expand(4, 5).contiguous()  # of bools this would make ones
    valid = bytes_.view(torch.bool)
    kernels.run_as(GEOMETRIES[1])
    check(kernels, KINDS["relu6"], torch.full(shape, 7.0), 1, valid)


@pytest.mark.parametrize("value", [7.0, -7.0, 2.0, float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_counter_overflows(kernels: Kernels, dtype: torch.dtype, value: float) -> None:
    """Every value adds to the same counter of its thread; a pair of halves has 16 bits for each."""
    kernels.run_as((0, 32))  # few threads, so that each counts much
    for shape in ((1, 1, 300_007), (40_000, 2, 3), (70_000, 8), (70_000, 3)):
        check(kernels, KINDS["relu6"], torch.full(shape, value, dtype=dtype), 1)


def misaligned(tensor: Tensor) -> Tensor:
    return lay_out(tensor, "misaligned")


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_of_a_step_lie_as_they_like(
    kernels: Kernels, dtype: torch.dtype, geometry: tuple[int, int]
) -> None:
    """One operand off its 16 bytes, or gradients in another order than their weights."""
    kernels.run_as(geometry)
    generator = torch.Generator().manual_seed(0)
    shape = (9, 7, 3, 5)
    words = make_mask(945, "some", generator)
    operands = [torch.randn(shape, generator=generator).abs().to(dtype) for _ in range(5)]
    for operand in (operands[0], *operands[2:]):
        CPU.apply_masks_([operand], [words])
    step = [torch.tensor(3.0)]
    for odd in range(7):
        both = []
        for ops in (kernels.ops, CPU):
            own = [misaligned(t) if i == odd else t.clone() for i, t in enumerate(operands)]
            if odd == 5:
                own[1] = lay_out(own[1], "channels_last")
            if odd == 6:
                own[1] = torch.stack([own[1], own[1]], -1)[..., 0]
            weights, grads, *state = ([t] for t in own)
            ops.masked_adamw_(
                weights, grads, *state, [words], step,
                1e-2, 0.9, 0.999, 1e-8, 1e-2, False, None, None, None,
            )  # fmt: skip
            ops.masked_sgd_(
                weights, grads, state[0], [words],
                0.1, 0.9, 0.0, 1e-2, False, False, False, None, None, None,
            )  # fmt: skip
            ops.apply_masks_(grads if odd < 6 else weights, [words])
            both.append(own)
        assert_near(*both, 64 if dtype == torch.float64 else 8)


def test_bits_beyond_the_weights_are_nobodys(kernels: Kernels) -> None:
    """The CPU refuses them; a kernel would have to wait to do so, and ignores them."""
    weight = torch.arange(1.0, 41.0)
    clean = pack(torch.ones(40, dtype=torch.bool))
    stray = clean.clone()
    stray[1] = -1
    (shares, info), (expected, told) = (
        kernels.ops.magnitude_shares([weight], [words], 12) for words in (stray, clean)
    )
    assert torch.equal(shares, expected)
    assert torch.equal(info, told)
    prune_(kernels.ops, [weight], [stray], [38])
    prune_(CPU, [weight], [clean], [38])
    assert stray[0] == clean[0]
    assert (stray[1] & 0xFF) == clean[1]
    kernels.ops.apply_masks_([weight], [stray])
    assert weight.nonzero().flatten().tolist() == [38, 39]


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda k: k.name)
def test_ledgers_of_another_shape_are_refused(kernels: Kernels, kind) -> None:
    ledger = new_ledger(kind, 4)
    for ledgers, kinds, message in (
        ([ledger], [99], r"kinds\[0\] must be 0 to 7"),
        ([ledger], [], r"one number per ledger \(got 0 for 1\)"),
        ([ledger[:-1]], [kind.code], r"ledgers\[0\] must be contiguous int64"),
        ([ledger.repeat(2)[::2]], [kind.code], r"ledgers\[0\] must be contiguous int64"),
        ([ledger.int()], [kind.code], r"ledgers\[0\] must be contiguous int64 .*got Int"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.ops.layer_entropies(ledgers, kinds)
