"""Magnitude selection over shards is the selection of one process, ties and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Ranks
from spread import assert_equal, refused, whole_masks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from layer_collapse import Masks
from layer_collapse.sharding import full, like_shards, local_part

_SHAPES = {
    "wide": (3, 40),
    "tall": (37, 2),
    "one": (1, 5),
    "cube": (5, 4, 3),
    "vector": (11,),
    "large": (53, 61),
}


def _weights(dtypes: list[torch.dtype], seed: int) -> dict[str, Tensor]:
    """Few different magnitudes, so that every cut falls among ties; zeros of both signs; inf."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for i, (name, shape) in enumerate(_SHAPES.items()):
        values = torch.randint(-6, 7, shape, generator=generator) / 4
        values.flatten()[:3] = torch.tensor([-0.0, torch.inf, 1e-40])
        if seed % 2:  # few ties
            values += torch.randn(shape, generator=generator) / 100
        weights[name] = values.to(dtypes[i % len(dtypes)])
    return weights


def _spread(
    weights: dict[str, Tensor], placements: list[Any], mesh: Any
) -> dict[str, nn.Parameter]:
    spread = {}
    for name, weight in weights.items():
        own = [
            Replicate() if not p.is_replicate() and p.dim >= weight.dim() else p for p in placements
        ]
        spread[name] = nn.Parameter(distribute_tensor(weight, mesh, own, src_data_rank=None))
    return spread


def _selects(mesh_shape: tuple[int, ...], placements: list[Any], dtypes: list[Any]) -> None:
    mesh = init_device_mesh("cpu", mesh_shape)
    for seed in range(4):
        weights = _weights(dtypes, seed)
        alone = Masks({name: nn.Parameter(w.clone()) for name, w in weights.items()})
        parameters = _spread(weights, placements, mesh)
        if seed == 3:  # what is not spread may stand beside what is
            parameters["tall"] = nn.Parameter(weights["tall"].clone())
        masks = Masks(parameters)
        while (alive := sum(map(alone.alive, alone.names))) > 0:
            assert [masks.alive(name) for name in masks.names] == [
                alone.alive(name) for name in alone.names
            ]
            assert masks.sparsity() == alone.sparsity()
            assert masks.is_dense == alone.is_dense
            for k in (0, alive // 3, alive - 1, alive):
                assert masks.shares(k) == alone.shares(k), k
            counts = alone.shares(min(alive, max(110, alive * 2 // 3)))
            alone.prune_(counts)
            masks.prune_(counts)
            assert_equal(whole_masks(masks), {n: alone.bool_mask(n) for n in alone.names})
            for name, parameter in parameters.items():
                pruned = weights[name].masked_fill(~alone.bool_mask(name), 0)
                assert torch.equal(full(parameter.detach()), pruned)
            masks.check_()
            masks.check_ranks()


_F32, _F64, _BF16 = [torch.float32], [torch.float64], [torch.bfloat16]
_MIXED = [torch.bfloat16, torch.float32, torch.float64, torch.float16]


@pytest.mark.parametrize(
    ("mesh", "placements", "dtypes"),
    [
        ((2,), [Shard(0)], _F32),
        ((2,), [Shard(1)], _F64),
        ((2,), [Shard(-1)], _MIXED),
        ((4,), [Shard(0)], _BF16),
        ((4,), [Shard(0)], _MIXED),
        ((2, 2), [Replicate(), Shard(0)], _F32),
        ((2, 2), [Shard(0), Shard(0)], _F32),
        ((2, 2), [Shard(0), Shard(1)], _F32),
        ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)], _F32),
        ((2, 2), [Replicate(), Replicate()], _F32),
    ],
    ids=str,
)
def test_selection_is_that_of_one_process(
    ranks: Ranks, mesh: tuple[int, ...], placements: list[Any], dtypes: list[torch.dtype]
) -> None:
    ranks(4 if len(mesh) == 2 else mesh[0], _selects, mesh, placements, dtypes)


def _refuses() -> None:
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.randn(5, 3)
    weight[4, 1] = torch.nan
    parameters = _spread({"fine": torch.randn(4), "broken": weight}, [Shard(0)], mesh)
    masks = Masks(parameters)
    before = whole_masks(masks)
    with refused("Masks.shares: alive weights must not be NaN (got NaN in 'broken')"):
        masks.shares(3)
    with refused("Masks.prune_: alive weights must not be NaN (got NaN in 'broken')"):
        masks.prune_({"fine": 1, "broken": 1})
    with refused("the count of 'fine' must lie between 0 and its 4 alive weights (got 5)"):
        masks.prune_({"fine": 5})
    with refused("k must lie between 0 and the 19 alive weights (got 20)"):
        masks.shares(20)
    assert_equal(whole_masks(masks), before)
    masks.prune_where_("broken", weight.isnan())  # pruned, a NaN is no trouble
    assert masks.alive("broken") == 14
    assert full(parameters["broken"].detach())[4, 1] == 0
    masks.prune_where_(
        "broken", distribute_tensor(weight > 1, mesh, [Shard(1)], src_data_rank=None)
    )
    assert torch.equal(full(masks.bool_mask("broken")), ~(weight.isnan() | (weight > 1)))
    masks.prune_(masks.shares(3))
    masks.prune_where_("fine", torch.arange(4) == 3)
    masks.check_()
    with torch.no_grad():
        parameters["fine"].fill_(7.0)  # on the process that holds it, and for all to see
    with refused("pruned weights must be 0.0 (got"):
        masks.check_()
    partial = nn.Parameter(like_partial(torch.randn(3), mesh))
    with refused("a parameter must be sharded or replicated over its device mesh"):
        Masks({"sum": partial}).alive("sum")


def like_partial(values: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(values, mesh, [Partial()])


def test_what_is_refused_is_refused_on_all_ranks(ranks: Ranks) -> None:
    ranks(2, _refuses)


def _moves() -> None:
    """Bits follow their weights from one way of spreading to any other."""
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    weight = torch.randn(7, 5)
    plain = nn.Parameter(weight.clone())
    masks = Masks({"w": plain})
    masks.prune_({"w": 11})
    expected = masks.bool_mask("w")
    ways = [(line, [Shard(0)]), (square, [Shard(1), Replicate()]), (line, [Shard(1)])]
    for mesh, placements in ways:
        spread = distribute_tensor(weight, mesh, placements, src_data_rank=None)
        masks.rebind({"w": nn.Parameter(spread)})
        assert torch.equal(full(masks.bool_mask("w")), expected)
        assert masks.words("w").numel() == -(-spread.to_local().numel() // 32)
        same = like_shards(local_part(expected, spread), spread)
        assert torch.equal(full(same), expected)
    masks.rebind({"w": plain})
    assert torch.equal(masks.bool_mask("w"), expected)


def test_masks_follow_their_parameters_to_other_shards(ranks: Ranks) -> None:
    ranks(4, _moves)


def _differs_in_a_replica() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    masks = Masks(_spread({"w": torch.randn(6, 2)}, [Replicate(), Shard(0)], mesh))
    masks.check_ranks()
    if dist.get_rank() == 3:
        masks.words("w").bitwise_and_(1)
    with refused("masks: rank 3 differs from rank 1 in 'w'"):
        masks.check_ranks()


def test_replicas_of_a_shard_are_compared(ranks: Ranks) -> None:
    ranks(4, _differs_in_a_replica)
