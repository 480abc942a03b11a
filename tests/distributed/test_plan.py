"""The costs that ``layer-collapse plan`` states are those of small runs, to 10 % for bytes."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Ranks
from spread import all_reduces
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layer_collapse import MaskedAdamW, MaskedSGD, Masks, candidate_weights, plan, track
from layer_collapse.cli import main
from layer_collapse.plan import Job, costs
from layer_collapse.sharding import local

_WIDTH, _BLOCKS, _SAMPLES = 96, 3, 32


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class _Ops(TorchDispatchMode):
    """Bytes that our ops take and give, and the most that new tensors held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.moved, self.held, self.peak = dict[str, int](), 0, 0
        self._known = set[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func.namespace == "layer_collapse":
            read = sum(t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor))
            written = [
                value
                for value, argument in zip(args, func._schema.arguments, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            total = read + sum(t.nbytes for t in tree_leaves([written, outputs]))
            self.moved[func.overloadpacket.__name__] = (
                self.moved.get(func.overloadpacket.__name__, 0) + total
            )
        if not any(argument.alias_info for argument in func._schema.returns):
            for tensor in outputs:
                self._hold(tensor, tensor.nbytes)
        return result

    def _hold(self, tensor: Tensor, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(tensor, self._drop, size)

    def _drop(self, size: int) -> None:
        self.held -= size


@contextmanager
def _measured() -> Iterator[tuple[_Ops, list[int]]]:
    with all_reduces() as sizes, _Ops() as ops:
        yield ops, sizes


def _close(got: float, planned: float, within: float = 0.1) -> None:
    assert abs(got - planned) <= within * planned, (got, planned)


def _runs(kind: str, optimizer_kind: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(_Block() for _ in range(_BLOCKS)))
    params = sum(p.numel() for p in model.parameters())
    job = Job(
        params,
        dist.get_world_size(),
        sharded=int(kind == "fsdp"),
        rectifiers=_BLOCKS,
        neurons=4 * _WIDTH * _BLOCKS,
        masked=4 * _WIDTH**2 * _BLOCKS,
        positions=_SAMPLES,
        optimizer=optimizer_kind,
    )
    planned = costs(job)
    inner = model
    if kind == "fsdp":
        for block in model:
            fully_shard(block)
        fully_shard(model)
    elif job.ranks > 1:
        model = DistributedDataParallel(model)
    tracker = track(model)
    masks = Masks(candidate_weights(inner, tracker.sites))
    optimizer: Any = (
        MaskedAdamW(model.parameters(), 1e-3, masks=masks)
        if optimizer_kind == "adamw"
        else MaskedSGD(model.parameters(), 1e-3, 0.9, masks=masks)
    )
    x = torch.randn(_SAMPLES, _WIDTH)
    model(x).square().mean().backward()
    optimizer.step()

    _close(sum(ledger.nbytes for ledger in tracker.state_dict().values()), planned["count"].memory)
    with torch.no_grad(), _measured() as (ops, sizes):
        inner(x)
    activations = _SAMPLES * job.neurons * 4
    _close(ops.moved["rectify"] - 2 * activations, planned["count"].moved)
    assert not sizes

    with _measured() as (ops, sizes):
        tracker.entropy(dist.group.WORLD if job.ranks > 1 else None)
    assert len(sizes) == planned["entropy"].calls
    if sizes:
        _close(8 * sum(sizes), planned["entropy"].reduced)
        _close(ops.peak, planned["entropy"].peak, 0.5)  # also of the report

    with _measured() as (ops, sizes):
        masks.prune_(masks.shares(job.masked // 2))
    assert len(sizes) == planned["select"].calls
    _close(sum(ops.moved.values()), planned["select"].moved)
    if kind == "fsdp":
        _close(ops.peak, planned["select"].peak, 0.3)  # 6 or 8 histograms: all-reduce lets go late
        _close(8 * sum(sizes), planned["select"].reduced)

    model(x).square().mean().backward()
    with _measured() as (ops, sizes):
        optimizer.step()
    masked_step = f"masked_{optimizer_kind}_"
    _close(ops.moved[masked_step], planned["step"].moved)
    assert not sizes
    words = sum(masks.words(name).untyped_storage().nbytes() for name in masks.names)
    _close(words, planned["step"].memory)
    assert sum(local(p).numel() for p in model.parameters()) == params // (
        job.ranks if job.sharded else 1
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("fsdp", 4), ("ddp", 2), ("ddp", 1)])
def test_small_runs_cost_what_is_planned(
    ranks: Ranks, kind: str, world: int, optimizer: str
) -> None:
    ranks(world, _runs, kind, optimizer)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--params", "7e9", "--ranks", "256", "--json"]
    assert main(arguments) == 0
    shown = json.loads(capsys.readouterr().out)
    job = Job(7_000_000_000, 256)
    assert shown == {
        "job": asdict(job),
        "costs": {name: cost.to_dict() for name, cost in costs(job).items()},
    }
    assert shown["costs"]["select"]["steps"] == 2 * 255 * shown["costs"]["select"]["calls"]
    assert main(arguments[:-1]) == 0
    table = capsys.readouterr().out
    assert all(part in table for part in shown["costs"])
    for wrong, sentence in [
        (["--ranks", "0"], "plan: ranks must be 1 or more (got 0)"),
        (["--masked", "8e9"], "plan: masked must lie in 1 to 7000000000 (got 8000000000)"),
        (["--optimizer", "lion"], "optimizer must be sgd or adamw"),
    ]:
        assert main([*arguments, *wrong]) == 2
        assert sentence in capsys.readouterr().err


def test_the_formulas_are_few() -> None:
    assert len(Path(plan.__file__).read_text().splitlines()) <= 120
