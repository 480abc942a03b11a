"""Magnitude selection that waits for nothing: what there is to refuse is told in a tensor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layer_collapse import _C
from layer_collapse.ops.magnitude import (
    check_selection,
    magnitude_prune_,
    magnitude_prune_ex_,
    magnitude_shares,
    magnitude_shares_ex,
)
from layer_collapse.ops.masked_step import apply_masks_, unpack_reference


def case(device: torch.device, nan: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator) for n in (500, 0, 37)]
    if nan:
        weights[2][5] = math.nan
    masks = [torch.from_numpy(_C.pack_mask(torch.ones(w.numel()).bool().numpy())) for w in weights]
    return [w.to(device) for w in weights], [m.to(device) for m in masks]


def test_shares_are_counts_without_a_look_at_them(device: torch.device) -> None:
    weights, masks = case(device)
    shares, info = magnitude_shares_ex(weights, masks, 100)
    assert shares.device.type == info.device.type == device.type
    twins = [words.clone() for words in masks]
    versions = [words._version for words in masks]
    told = magnitude_prune_ex_(weights, masks, shares)
    assert [words._version for words in masks] > versions
    check_selection("magnitude_shares", info)
    check_selection("magnitude_prune_", told)
    assert info.tolist() == [[100, 537, -1]]
    counts = magnitude_shares(weights, twins, 100).tolist()
    assert told.tolist() == [
        [n, w.numel() if n else 0, -1] for n, w in zip(counts, weights, strict=True)
    ]
    magnitude_prune_(weights, twins, counts)
    assert all(map(torch.equal, masks, twins))


@pytest.mark.parametrize("k", [-1, 538])
def test_k_out_of_range_selects_nothing(device: torch.device, k: int) -> None:
    weights, masks = case(device)
    before = [words.clone() for words in masks]
    shares, info = magnitude_shares_ex(weights, masks, k)
    assert shares.tolist() == [0, 0, 0]
    assert info.tolist() == [[k, 537, -1]]
    with pytest.raises(RuntimeError, match=rf"^magnitude_shares: k .* 0 and the 537 .*got {k}\)$"):
        check_selection("magnitude_shares", info)
    magnitude_prune_ex_(weights, masks, shares)
    assert all(map(torch.equal, masks, before))


def test_one_refused_count_leaves_every_mask(device: torch.device) -> None:
    weights, masks = case(device)
    before = [words.clone() for words in masks]
    for counts in ([10, 0, 38], torch.tensor([10, 0, 38], device=device)):
        info = magnitude_prune_ex_(weights, masks, counts)
        with pytest.raises(RuntimeError, match=r"counts\[2\] must lie between 0 and the 37 alive"):
            check_selection("magnitude_prune_", info)
        with pytest.raises(RuntimeError, match=r"counts\[2\] .*got 38\)$"):
            magnitude_prune_(weights, masks, counts)
    assert all(map(torch.equal, masks, before))


def test_nan_is_told(device: torch.device) -> None:
    weights, masks = case(device, nan=True)
    before = [words.clone() for words in masks]
    shares, info = magnitude_shares_ex(weights, masks, 9)
    assert (shares.tolist(), info.tolist()) == ([0, 0, 0], [[9, 537, 2]])
    told = magnitude_prune_ex_(weights, masks, [9, 0, 1])
    assert told.tolist() == [[9, 500, -1], [0, 0, -1], [1, 37, 2]]
    assert all(map(torch.equal, masks, before))
    with pytest.raises(RuntimeError, match=r"^magnitude_prune_: alive .* NaN in weights\[2\]\)"):
        check_selection("magnitude_prune_", told)
    check_selection("magnitude_prune_", magnitude_prune_ex_(weights, masks, [9, 0, 0]))


def test_wrong_counts_are_refused_at_once() -> None:
    weights, masks = case(torch.device("cpu"))
    for counts in (torch.zeros(2).long(), torch.zeros(3), torch.zeros(6).long()[::2]):
        with pytest.raises(RuntimeError, match=r"counts must be contiguous int64 of shape \[3\]"):
            magnitude_prune_(weights, masks, counts)
    none = [torch.empty(0, dtype=torch.int32)] * 3
    with pytest.raises(RuntimeError, match=r"masks\[0\] must have bits to clear"):
        magnitude_prune_(weights, none, torch.zeros(3).long())
    with pytest.raises(RuntimeError, match=r"weights must hold at least one tensor"):
        magnitude_prune_ex_([], [], [])


def test_a_whole_pruning_compiles_into_one_graph(device: torch.device) -> None:
    def prune(weights: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        shares, info = magnitude_shares_ex(weights, masks, 100)
        told = magnitude_prune_ex_(weights, masks, shares)
        apply_masks_(weights, masks)
        return info, told

    torch._dynamo.reset()
    both = [case(device) for _ in range(2)]
    fast = torch.compile(prune, fullgraph=True, backend="aot_eager")
    for got, expected in zip(fast(*both[0]), prune(*both[1]), strict=True):
        assert torch.equal(got, expected)
    for got, expected in zip(both[0][0] + both[0][1], both[1][0] + both[1][1], strict=True):
        assert torch.equal(got, expected)
    dead = [~unpack_reference(m, w.shape) for w, m in zip(*both[0], strict=True)]
    assert sum(int(d.sum()) for d in dead) == 100
    assert not any(w[d].any() for w, d in zip(both[0][0], dead, strict=True))
