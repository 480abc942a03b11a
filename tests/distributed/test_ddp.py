"""Tracking and pruning in DistributedDataParallel: one answer on all ranks, and the right one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pool import Ranks
from spread import (
    all_reduces,
    assert_equal,
    data,
    mine,
    net,
    refused,
    whole_masks,
    whole_weights,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from layer_collapse import (
    EntropyGuided,
    GlobalMagnitude,
    Guards,
    MaskedSGD,
    Masks,
    Strategy,
    UniformMagnitude,
    scan,
    track,
)
from layer_collapse.measure.report import EntropyReport
from layer_collapse.prune.rounds import candidate_weights, prune_round


def _batches(samples: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Of this rank; ranks differ in the number of batches and the size of the last."""
    x, y = data(samples)
    return list(zip(mine(x).split(size), mine(y).split(size), strict=True))


def _same_everywhere(report: EntropyReport) -> None:
    reports: list = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report.to_dict())
    assert all(other == reports[0] for other in reports)


# ---- counts


def _counts_of_uneven_ranks(samples: int) -> None:
    model = DistributedDataParallel(net())
    tracker = track(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with model.join():
        for x, y in _batches(samples):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    states: list = [None] * dist.get_world_size()
    dist.all_gather_object(states, tracker.state_dict())
    with all_reduces() as sizes:
        report = tracker.entropy(dist.group.WORLD)
    assert len(sizes) == 1
    _same_everywhere(report)
    together = track(net())
    summed = {name: sum(state[name] for state in states) for name in states[0]}
    together.load_state_dict(summed)
    assert report.rows == together.entropy().rows
    assert [row.positions for row in report] == [samples, samples]
    assert tracker.entropy(dist.group.WORLD).rows == report.rows  # nothing is added twice
    own = len(mine(data(samples)[0]))
    assert [row.positions for row in tracker.entropy()] == [own, own]
    tracker.remove()


@pytest.mark.parametrize(("world", "samples"), [(2, 37), (4, 37), (4, 3)])
def test_counts_of_uneven_ranks_are_added_up_once(ranks: Ranks, world: int, samples: int) -> None:
    ranks(world, _counts_of_uneven_ranks, samples)


def _accumulates() -> None:
    x, y = data(24)
    model = DistributedDataParallel(net())
    tracker = track(model)
    masks = Masks(dict(model.module.named_parameters()))
    masks.prune_({"first.weight": 30})
    optimizer = MaskedSGD(model.parameters(), 0.1, masks=masks)
    share = len(mine(x))
    for step in range(2):
        parts = mine(x).split(4), mine(y).split(4)
        for i, (part, target) in enumerate(zip(*parts, strict=True)):
            loss = F.cross_entropy(model(part), target) / len(parts[0])
            if i + 1 < len(parts[0]):
                with model.no_sync():
                    model(part)  # not to be forgotten, nor counted for another rank
                    loss.backward()
            else:
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counted = tracker.entropy()["act"].positions
        assert counted == (step + 1) * (2 * share - 4)  # forwards without a backward count too
    masks.check_()
    masks.check_ranks()
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, whole_weights(model.module))
    for other in everyone:
        assert_equal(other, everyone[0])


def test_no_sync_and_gradient_accumulation(ranks: Ranks) -> None:
    ranks(2, _accumulates)


def _replaced_batch_norm() -> None:
    """torch trains SyncBatchNorm, and puts it into DDP, on GPUs only; it evaluates anywhere."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()
        )
        model[1].running_mean.normal_()
        return nn.Sequential(*model, nn.Linear(8, 3)).eval()

    x, _ = data()
    plain = build()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    with track(plain) as alone, track(synced) as tracker:
        plain(x)
        synced(mine(x))
        expected, report = alone.entropy(), tracker.entropy(dist.group.WORLD)
        assert report.rows == expected.rows
        for net_, sites in ((plain, alone.sites), (synced, tracker.sites)):
            masks = Masks(candidate_weights(net_, sites))
            masks.prune_where_("0.weight", torch.arange(8)[:, None].expand(8, 6) < 3)
            prune_round(net_, masks, expected, sites, 0.3, UniformMagnitude(), Guards(floor=1))
    assert_equal(dict(synced.state_dict()), dict(plain.state_dict()))
    assert not synced[1].running_var[:3].any()


def test_sync_batch_norm(ranks: Ranks) -> None:
    ranks(2, _replaced_batch_norm)


def _synced(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """What torch's kernels do on a GPU, for [N, C] on the CPU: statistics of all processes."""
    from torch.distributed.nn.functional import all_reduce

    count = all_reduce(torch.tensor(float(len(x))))
    mean = all_reduce(x.sum(0)) / count
    variance = all_reduce((x - mean).square().sum(0)) / count
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def _trains_synced() -> None:
    """The counts, the masks and the weights of one process that trains on all of the data."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(8)
        return nn.Sequential(
            nn.Linear(6, 8), norm, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        )

    x, y = data(40)
    alone, model = build(), nn.SyncBatchNorm.convert_sync_batchnorm(build())
    with refused("SyncBatchNorm layers only work with GPU modules"):
        DistributedDataParallel(model)
    with refused("SyncBatchNorm expected input tensor to be on GPU"):
        model(mine(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.SyncBatchNorm, "forward", _synced)
        patch.setattr(DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda *_: None)
        ddp = DistributedDataParallel(model)
        tracker, expected = track(ddp, fuse_bn=True), track(alone)
        assert tracker.fused == {}  # its statistics would be those of one process
        both = []
        for net_, inner, some, group in (
            (ddp, model, tracker, dist.group.WORLD),
            (alone, alone, expected, None),
        ):
            masks = Masks(candidate_weights(inner, some.sites))
            optimizer = MaskedSGD(net_.parameters(), 0.1, momentum=0.9, masks=masks)
            inputs, targets = (t if group is None else mine(t) for t in (x, y))
            for _ in range(2):
                some.reset()
                for _ in range(3):
                    optimizer.zero_grad()
                    F.cross_entropy(net_(inputs), targets).backward()
                    optimizer.step()
                report = some.entropy(group)
                prune_round(inner, masks, report, some.sites, 0.3, guards=Guards(floor=4))
            masks.check_ranks()
            both.append((report, whole_masks(masks), inner.state_dict()))
    (report, got_masks, state), (alone_report, alone_masks, alone_state) = both
    assert report.rows == alone_report.rows
    assert_equal(got_masks, alone_masks)
    for name, value in alone_state.items():
        if value.is_floating_point():  # the stand-in counts no batches
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def test_training_with_synced_batch_norms(ranks: Ranks) -> None:
    ranks(2, _trains_synced)


def _scalars() -> None:
    model = net()
    masks = Masks({"first.weight": model.first.weight})
    masks.prune_({"first.weight": 13})
    tracker = track(DistributedDataParallel(model))
    assert not [name for name in tracker.scalars(dist.group.WORLD) if "entropy" in name]
    model(mine(data()[0]))
    report = tracker.entropy(dist.group.WORLD)
    scalars = tracker.scalars(dist.group.WORLD, masks)
    assert scalars["entropy/act"] == report["act"].entropy
    assert scalars["entropy/mean"] == sum(row.entropy for row in report) / 2
    assert scalars["sparsity/first.weight"] == scalars["sparsity/all"] == 1 - 104 / 117
    assert all(type(value) is float and math.isfinite(value) for value in scalars.values())
    assert tracker.scalars()["entropy/act"] == tracker.entropy()["act"].entropy


def test_scalars(ranks: Ranks) -> None:
    ranks(2, _scalars)


# ---- masks


def _prunes_alike(strategy: Strategy) -> None:
    model = DistributedDataParallel(net())
    tracker = track(model)
    masks = Masks(candidate_weights(model, tracker.sites))
    optimizer = MaskedSGD(model.parameters(), 0.1, momentum=0.9, masks=masks)
    for round_ in range(3):
        tracker.reset()
        with model.join():
            for x, y in _batches(37):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        # With join, the ranks that ended early took no step: all go on from rank 0's weights.
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
        report = tracker.entropy(dist.group.WORLD)
        counts = prune_round(model, masks, report, tracker.sites, 0.4, strategy, Guards(floor=4))
        assert sum(counts.values()) > 0, round_
        told: list = [None] * dist.get_world_size()
        dist.all_gather_object(told, counts)
        assert told == [counts] * len(told), round_
        masks.check_ranks()
        masks.check_()
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, whole_masks(masks))
    for other in everyone:
        assert_equal(other, everyone[0])
    assert 0.5 < masks.sparsity() < 1


@pytest.mark.parametrize("strategy", [EntropyGuided(), GlobalMagnitude(), UniformMagnitude()])
def test_rounds_prune_the_same_weights_on_all_ranks(ranks: Ranks, strategy: Strategy) -> None:
    ranks(4, _prunes_alike, strategy)


def _differing_masks() -> None:
    model = net()
    masks = Masks(dict(model.named_parameters()))
    masks.prune_({"first.weight": 5, "head.bias": 1})
    masks.check_ranks()
    if dist.get_rank() == 2:
        masks.prune_({"second.weight": 1})
    with refused("masks: rank 2 differs from rank 0 in 'second.weight'; prune by"):
        masks.check_ranks()
    pair = dist.new_group([1, 2])
    if dist.get_rank() in (1, 2):
        with refused("masks: rank 2 differs from rank 1 in 'second.weight'"):
            masks.check_ranks(pair)
    names = {"stem.weight": model.stem.weight}
    if dist.get_rank() == 1:
        names = {"first.weight": model.first.weight}
    with refused("masks: rank 1 has other parameters than rank 0"):
        Masks(names).check_ranks()


def test_a_rank_with_other_masks_is_named_on_all(ranks: Ranks) -> None:
    ranks(3, _differing_masks)


# ---- scans


def _scans(samples: int) -> None:
    model = net()
    x, _ = data(samples)
    expected = scan(copy.deepcopy(model), x.split(5))
    report = scan(DistributedDataParallel(model).module, mine(x).split(4), group=dist.group.WORLD)
    assert report == expected
    assert report.certified
    assert report.samples == samples
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.head.bias[0] += 1
    with refused("the weights or buffers of rank 1 differ from those of rank 0"):
        scan(model, mine(x).split(4), group=dist.group.WORLD)
    dist.broadcast(model.head.bias.data, 0)
    with refused("hold no sample"):
        scan(model, [], group=dist.group.WORLD)


@pytest.mark.parametrize(("world", "samples"), [(2, 37), (4, 3)])
def test_a_scan_over_ranks_is_the_scan_of_all_data(ranks: Ranks, world: int, samples: int) -> None:
    ranks(world, _scans, samples)


def _constant_outputs() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.zeros_(model[2].weight)
    x, _ = data(8)
    report = scan(model, [mine(x)], group=dist.group.WORLD)
    assert report.cut
    assert report.cut_by == "all 8 samples get equal logits"
    assert scan(model, [x[:1]] if dist.get_rank() else [], group=dist.group.WORLD).cut is False
    # Equal logits on each rank, but not the same ones.
    torch.manual_seed(1)
    nn.init.normal_(model[2].weight)
    here = x[dist.get_rank()].expand(3, 6)
    assert scan(model, [here]).cut
    assert not scan(model, [here], group=dist.group.WORLD).cut


def test_a_cut_network_is_seen_over_all_ranks(ranks: Ranks) -> None:
    ranks(2, _constant_outputs)
