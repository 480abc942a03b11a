"""Tracking and pruning under FSDP2's fully_shard, before and after; tensor parallel masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pool import Ranks
from spread import all_reduces, assert_equal, data, mine, net, refused, whole_masks, whole_weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from layer_collapse import (
    EntropyGuided,
    GlobalMagnitude,
    Guards,
    MaskedAdamW,
    MaskedSGD,
    Masks,
    Strategy,
    keep_pruned,
    linearize,
    scan,
    track,
)
from layer_collapse.prune.rounds import candidate_weights, prune_round

WORLD_SIZES = [2, 4]


def _shard(model: nn.Module, **options: Any) -> nn.Module:
    for name in ("first", "second"):
        fully_shard(model.get_submodule(name), **options)
    return fully_shard(model, **options)


def _optimizer(kind: str, model: nn.Module, masks: Masks) -> torch.optim.Optimizer:
    if kind == "sgd":
        return MaskedSGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3, masks=masks)
    if kind == "adamw":
        return MaskedAdamW(model.parameters(), 0.01, amsgrad=True, masks=masks)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    keep_pruned(optimizer, masks)
    return optimizer


def _train(model: nn.Module, optimizer: Any, x: Any, y: Any, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


# ---- tracking


def _tracks(before: bool) -> None:
    x, _ = data(40)
    model, alone = net(), net()
    classes = [type(module) for module in alone.modules()]
    with track(alone) as reference:
        alone(x)
        expected = reference.entropy()
    if before:
        tracker = track(model)
        _shard(model)
    else:
        tracker = track(_shard(model), example_inputs=x[:2])
    assert torch.equal(model(mine(x)), alone(mine(x)))
    assert tracker.entropy(dist.group.WORLD).rows == expected.rows
    tracker.pause()
    model(mine(x)).sum().backward()
    assert tracker.entropy(dist.group.WORLD).rows == expected.rows
    tracker.remove()
    sharded = [model, model.first, model.second]
    for module, original in zip(model.modules(), classes, strict=True):
        assert isinstance(module, original)
        assert isinstance(module, FSDPModule) == (module in sharded)
        order = [cls for cls in type(module).__mro__ if cls is not FSDPModule]
        assert order[-len(original.__mro__) :] == list(original.__mro__)
        assert len(order) == len(original.__mro__) + (module in sharded)
    assert torch.equal(model(mine(x)), alone(mine(x)))
    assert tracker.entropy(dist.group.WORLD).rows == expected.rows
    with track(model) as again:  # traced once more, with the hooks that tracing has to avoid
        model(mine(x)).sum().backward()
        assert again.entropy(dist.group.WORLD).rows == expected.rows


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("world", WORLD_SIZES)
def test_tracking_before_and_after_fully_shard(ranks: Ranks, world: int, before: bool) -> None:
    ranks(world, _tracks, before)


class _Flattening(nn.Module):
    """Where the neurons lie is only known from shapes, and a weight is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5)
        self.fc = nn.Linear(20, 20)
        self.tied = nn.Linear(20, 20)
        self.tied.weight = self.fc.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.flatten(self.norm(self.conv(x)), 1).relu()
        return self.tied(F.relu(self.fc(x)))


def _traces_with_shapes() -> None:
    x = torch.randn(4, 1, 4, 4)
    torch.manual_seed(0)
    model = _Flattening()
    alone = copy.deepcopy(model)
    fully_shard(model.conv)
    fully_shard(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    hooks = [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()]
    with track(alone, x) as expected, track(model, x) as tracker:
        assert tracker.sites == expected.sites
        assert "shared" in tracker.sites[1].why_not
    assert dict(model.named_parameters(remove_duplicate=False)) == parameters
    assert [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()] == hooks
    assert isinstance(model.conv, FSDPModule)


def test_a_sharded_model_is_traced_with_shapes_and_left_as_it_was(ranks: Ranks) -> None:
    ranks(2, _traces_with_shapes)


def _empties() -> None:
    """The emptied layer has its weights on one rank only; both must see that it is empty."""
    model = _shard(net())
    masks = Masks({"first.weight": model.first.weight})
    with track(model) as tracker:
        model(data(4)[0]).sum().backward()
        states = []
        for alive in (1, 0):
            masks.prune_({"first.weight": masks.alive("first.weight") - alive})
            states.append(tracker.entropy()["act"].state)
        assert states[0] != "empty"
        assert states[1] == "empty"


def test_a_layer_is_empty_when_all_its_shards_are(ranks: Ranks) -> None:
    ranks(4, _empties)


def _scans() -> None:
    x, _ = data(40)
    alone = net()
    masks = Masks(dict(alone.named_parameters()))
    masks.prune_({"first.weight": 117})
    model = net()
    model.load_state_dict(alone.state_dict())
    policy = MixedPrecisionPolicy(param_dtype=torch.float32)
    report = scan(_shard(model, mp_policy=policy), mine(x).split(5), group=dist.group.WORLD)
    assert report == scan(alone, x.split(5))
    assert report.zero_entropy == ["act"]
    assert linearize(alone, report).exact == ("act",)  # the gathered model is certified


def test_a_scan_of_a_sharded_model_certifies_the_gathered_one(ranks: Ranks) -> None:
    ranks(2, _scans)


# ---- pruning and training


def _costs() -> None:
    """What docs/large_scale.md says about communication and memory."""
    model = _shard(net())
    tracker = track(model)
    masks = Masks(dict(model.named_parameters()))
    model(data(4)[0]).sum().backward()
    tensors, neurons = 8, 13 + 9
    with all_reduces() as sizes:
        tracker.entropy(dist.group.WORLD)
    assert sizes == [2 + 3 * neurons, 1]  # act alone has a feeding layer
    assert sum(len(ledger) for ledger in tracker.state_dict().values()) == 2 * 6 + 3 * neurons
    digits = [tensors * 2048] * 3
    with all_reduces() as sizes:
        masks.shares(100)
    assert sizes == [tensors, tensors, *digits]
    with all_reduces() as sizes:
        masks.prune_(dict.fromkeys(masks.names, 1))
    assert sizes == [tensors, tensors, *digits]
    with torch.no_grad():
        model.first.weight.fill_(1.0)  # ties of which some stay: 9 x 13 indices are one digit
    with all_reduces() as sizes:
        masks.prune_({"first.weight": 5})
    assert sizes == [1, 1, 2048, 2048, 2048, 2048]
    for name, parameter in model.named_parameters():
        assert masks.words(name).numel() == -(-parameter.to_local().numel() // 32)


def test_costs_are_those_of_the_manual(ranks: Ranks) -> None:
    ranks(2, _costs)


def _trains(kind: str, early: bool) -> None:
    x, y = data(40)
    alone, model = net(), net()
    alone_masks = Masks(dict(alone.named_parameters()))
    if early:  # masks of the parameters before they are sharded move over
        masks = Masks(dict(model.named_parameters()))
        masks.prune_(masks.shares(100))
        _shard(model)
        masks.rebind(dict(model.named_parameters()))
    else:
        _shard(model)
        masks = Masks(dict(model.named_parameters()))
        masks.prune_(masks.shares(100))
    alone_masks.prune_(alone_masks.shares(100))
    assert_equal(whole_masks(masks), whole_masks(alone_masks))
    assert_equal(whole_weights(model), whole_weights(alone))
    alone_optimizer = _optimizer(kind, alone, alone_masks)
    optimizer = _optimizer(kind, model, masks)
    for _ in range(2):
        _train(model, optimizer, mine(x), mine(y))
        _train(alone, alone_optimizer, x, y)
        got, expected = whole_weights(model), whole_weights(alone)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)
        masks.check_()
        # From weights that are equal to the bit, the same go.
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                parameter.copy_(got[name])
        assert masks.shares(80) == alone_masks.shares(80)
        masks.prune_(masks.shares(80))
        alone_masks.prune_(alone_masks.shares(80))
        assert_equal(whole_masks(masks), whole_masks(alone_masks))
    # Whole words of pruned weights are skipped, unless somebody has touched them since.
    masks.prune_({"first.weight": masks.alive("first.weight")})
    _train(model, optimizer, mine(x), mine(y), steps=1)
    for touch in (lambda p: p.add_(1.0), lambda p: p.to_local().add_(1.0)):
        with torch.no_grad():
            touch(model.first.weight)
        _train(model, optimizer, mine(x), mine(y), steps=1)
        masks.check_()
    masks.check_ranks()
    for name, parameter in model.named_parameters():
        for key, state in optimizer.state[parameter].items():
            if key != "step":
                assert type(state) is type(parameter.data)
                assert not state.full_tensor()[~masks.bool_mask(name).full_tensor()].any()
    assert any(p.to_local().numel() == 0 for p in model.parameters()) == (
        dist.get_world_size() == 4 and dist.get_rank() == 3
    )


@pytest.mark.parametrize("kind", ["sgd", "adamw", "kept"])
@pytest.mark.parametrize(("world", "early"), [(2, True), (4, False)])
def test_masked_steps_on_shards(ranks: Ranks, world: int, early: bool, kind: str) -> None:
    ranks(world, _trains, kind, early)


def _rounds(strategy: Strategy) -> None:
    x, _ = data(40)
    alone, model = net(), fully_shard(net())
    alone_tracker, tracker = track(alone), track(model)
    alone_masks = Masks(candidate_weights(alone, alone_tracker.sites))
    masks = Masks(candidate_weights(model, tracker.sites))
    for _ in range(3):
        for part in (alone_tracker, tracker):
            part.reset()
        with torch.no_grad():  # leaves FSDP's gathered copies behind, which must not be read
            expected = alone(x)
            torch.testing.assert_close(model(mine(x)), mine(expected))
        counts = [
            prune_round(net_, bits, report, sites, 0.5, strategy, Guards(floor=4))
            for net_, bits, report, sites in (
                (alone, alone_masks, alone_tracker.entropy(), alone_tracker.sites),
                (model, masks, tracker.entropy(dist.group.WORLD), tracker.sites),
            )
        ]
        assert counts[0] == counts[1]
        assert_equal(whole_masks(masks), whole_masks(alone_masks))


@pytest.mark.parametrize("strategy", [EntropyGuided(), GlobalMagnitude()])
def test_rounds_are_those_of_one_process(ranks: Ranks, strategy: Strategy) -> None:
    ranks(4, _rounds, strategy)


def _tensor_parallel() -> None:
    """FSDP over tensor parallel: masks and steps; the ranks of a tensor-parallel row share data."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    x, y = data(40)
    alone, model = net(hidden=12), net(hidden=12)
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    masks, alone_masks = (Masks(dict(m.named_parameters())) for m in (model, alone))
    optimizer = _optimizer("adamw", model, masks)
    alone_optimizer = _optimizer("adamw", alone, alone_masks)
    row = mesh.get_local_rank("data")
    for k in (90, 90):
        for some in (masks, alone_masks):
            some.prune_(some.shares(k))
        assert_equal(whole_masks(masks), whole_masks(alone_masks))
        _train(model, optimizer, x[row::2], y[row::2])
        _train(alone, alone_optimizer, x, y)
        with torch.no_grad():
            for name, weight in whole_weights(model).items():
                torch.testing.assert_close(
                    weight, alone.get_parameter(name).data, rtol=1e-4, atol=1e-5
                )
                alone.get_parameter(name).copy_(weight)
        masks.check_()
        masks.check_ranks()


def test_fsdp_over_tensor_parallel(ranks: Ranks) -> None:
    ranks(4, _tensor_parallel)


def _split_activations() -> None:
    model = net(hidden=12)
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    x, _ = data(4)
    with track(model) as tracker:
        assert [site.neurons for site in tracker.sites] == [12, 9]
        with refused("rectifier 'act': expected 12 neurons in dim -1 of its input (got shape (4,"):
            model(x)
    with track(model, ignore=["act"]) as tracker:  # what is not split can be counted
        model(x)
        assert tracker.entropy()[":relu"].positions == 4


def test_split_activations_are_refused_by_name(ranks: Ranks) -> None:
    ranks(2, _split_activations)
