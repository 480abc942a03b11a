"""AMP, torch.compile, activation checkpointing and function transforms under DDP and FSDP2."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pool import Ranks
from spread import Net, assert_equal, data, mine, net, refused, whole_masks, whole_weights
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from layer_collapse import MaskedAdamW, MaskedSGD, Masks, keep_pruned, track
from layer_collapse.sharding import full

KINDS = ["ddp", "fsdp"]
every_kind = pytest.mark.parametrize("kind", KINDS)
worlds = pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])


def _spread(kind: str, model: nn.Module, **options: Any) -> Any:
    if kind == "ddp":
        return DistributedDataParallel(model)
    for name in ("first", "second"):
        fully_shard(model.get_submodule(name), **options)
    return fully_shard(model, **options)


def _inner(model: Any) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _masks(model: Any) -> Masks:
    masks = Masks({n: p for n, p in _inner(model).named_parameters() if p.dim() > 1})
    masks.prune_(masks.shares(100))
    return masks


def _optimizer(name: str, model: nn.Module, masks: Masks) -> Any:
    if name == "sgd":
        return MaskedSGD(model.parameters(), 0.1, 0.9, weight_decay=0.1, masks=masks)
    if name == "adamw":
        return MaskedAdamW(model.parameters(), 0.01, weight_decay=0.1, masks=masks)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    keep_pruned(optimizer, masks)
    return optimizer


def _check(model: Any, masks: Masks, optimizer: Any, state: bool = True) -> None:
    """Pruned weights are zero, and their state; ranks agree."""
    masks.check_()
    masks.check_ranks()
    for name in masks.names:
        for key, value in optimizer.state[_inner(model).get_parameter(name)].items():
            if key != "step" and state:
                assert not full(value)[~full(masks.bool_mask(name))].any()


def _positions(tracker: Any) -> set[int]:
    return {row.positions for row in tracker.entropy(dist.group.WORLD)}


# ---- mixed precision


def _autocast(kind: str, name: str, dtype: torch.dtype) -> None:
    x, y = data(40)
    model = _spread(kind, net())
    tracker, masks = track(model), _masks(model)
    optimizer = _optimizer(name, model, masks)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(5):
        if step == 3:
            masks.prune_(masks.shares(30))
        before = whole_weights(_inner(model))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(mine(x)), mine(y))
        # Only one rank overflows by itself; the averaged gradients tell all of them.
        overflows = step in (1, 3)
        huge = 1e38 if overflows and dist.get_rank() == 0 else 1.0
        scaler.scale(loss * huge).backward()
        scaler.step(optimizer)
        scaler.update()
        after = whole_weights(_inner(model))
        assert all(map(torch.equal, before.values(), after.values())) == overflows, step
        _check(model, masks, optimizer, state=name != "kept" or not overflows)
    assert scaler.get_scale() == 2.0**6
    assert _positions(tracker) == {5 * 40}


@worlds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [pytest.param("sgd", marks=pytest.mark.slow), "adamw", "kept"])
@every_kind
def test_autocast_and_steps_that_overflow(
    ranks: Ranks, world: int, kind: str, name: str, dtype: torch.dtype
) -> None:
    ranks(world, _autocast, kind, name, dtype)


def _half(kind: str, name: str) -> None:
    """All in bfloat16; for FSDP also with float32 master weights, its mixed precision."""
    x, y = data(40)
    policies: list[dict[str, Any]] = [{"pure": True}]
    if kind == "fsdp":
        mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=True)
        policies.append({"pure": False, "mp_policy": mixed})
    for policy in policies:
        pure = policy.pop("pure")
        model = _spread(kind, net().bfloat16() if pure else net(), **policy)
        tracker, masks = track(model), _masks(model)
        optimizer = _optimizer(name, model, masks)
        for _ in range(3):
            optimizer.zero_grad()
            out = model(mine(x).bfloat16())
            assert out.dtype == torch.bfloat16
            F.cross_entropy(out.float(), mine(y)).backward()
            optimizer.step()
            _check(model, masks, optimizer)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if pure else torch.float32}
        assert _positions(tracker) == {3 * 40}


@worlds
@pytest.mark.parametrize("name", ["sgd", "adamw", "kept"])
@every_kind
def test_bfloat16_parameters_and_master_weights(
    ranks: Ranks, world: int, kind: str, name: str
) -> None:
    ranks(world, _half, kind, name)


# ---- torch.compile


def _steps(model: Any, optimizer: Any, step: Any, masks: Masks) -> dict[str, Tensor]:
    x, y = data(40)
    for turn in range(4):
        if turn == 2:
            masks.prune_(masks.shares(40))
        optimizer.zero_grad()
        F.cross_entropy(model(mine(x)), mine(y)).backward()
        step()
    return whole_weights(_inner(model))


def _compiled_step(kind: str, name: str) -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = _spread(kind, net())
        masks = _masks(model)
        optimizer = _optimizer(name, model, masks)
        step = optimizer.step
        if compiled:
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        results.append(_steps(model, optimizer, step, masks))
        _check(model, masks, optimizer)
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value)


@worlds
@pytest.mark.parametrize("name", [pytest.param("sgd", marks=pytest.mark.slow), "adamw"])
@every_kind
def test_compiled_steps(ranks: Ranks, world: int, kind: str, name: str) -> None:
    ranks(world, _compiled_step, kind, name)


def _compiled_forward(kind: str, inside: bool) -> None:
    """Compiled inside of the wrapper (each part for itself) or around it."""
    torch._dynamo.reset()
    x, y = data(40)
    results = []
    for compiled in (False, True):
        model: Any = net()
        tracker = track(model)
        if inside:
            if compiled:
                model.compile(fullgraph=kind == "ddp", backend="aot_eager")
            model = _spread(kind, model)
            run = model
        else:
            model = _spread(kind, model)
            run = torch.compile(model, backend="aot_eager") if compiled else model
        masks = _masks(model)
        optimizer = _optimizer("sgd", model, masks)
        for turn in range(3):
            if turn == 1:
                tracker.pause()
            optimizer.zero_grad()
            F.cross_entropy(run(mine(x)), mine(y)).backward()
            optimizer.step()
            tracker.resume()
        assert _positions(tracker) == {2 * 40}
        report = tracker.entropy(dist.group.WORLD)
        _check(model, masks, optimizer)
        results.append((whole_weights(_inner(model)), [row.entropy for row in report]))
        tracker.remove()
    for key, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][key], value)
    assert results[0][1] == pytest.approx(results[1][1], abs=0.02)


@worlds
@pytest.mark.parametrize("inside", [True, False])
@every_kind
def test_compiled_forwards(ranks: Ranks, world: int, kind: str, inside: bool) -> None:
    ranks(world, _compiled_forward, kind, inside)


# ---- activation checkpointing, transforms, copies


class _Replayed(Net):
    """The block is replayed in the backward pass."""

    def __init__(self, use_reentrant: bool | None) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.use_reentrant = use_reentrant

    def block(self, x: Tensor) -> Tensor:
        return x + self.second(self.act(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.use_reentrant is None or isinstance(x, torch.fx.Proxy):
            x = self.block(x)
        else:
            x = checkpoint(self.block, x, use_reentrant=self.use_reentrant)
        return self.head(torch.relu(x))


def _replays(kind: str, use_reentrant: bool, compiled: bool) -> None:
    torch._dynamo.reset()
    x, y = data(40)
    weights = []
    for kept in (None, use_reentrant):
        model = _spread(kind, _Replayed(kept))
        tracker, masks = track(model), _masks(model)
        optimizer = _optimizer("adamw", model, masks)
        run = torch.compile(model, backend="aot_eager") if compiled and kept is not None else model
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(run(mine(x)), mine(y)).backward()
            optimizer.step()
        assert _positions(tracker) == {3 * 40}
        _check(model, masks, optimizer)
        weights.append(whole_weights(_inner(model)))
        tracker.remove()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value)


@worlds
@pytest.mark.parametrize(
    ("use_reentrant", "compiled"), [(True, False), (True, True), (False, False), (False, True)]
)
@every_kind
def test_checkpointing_counts_once(
    ranks: Ranks, world: int, kind: str, use_reentrant: bool, compiled: bool
) -> None:
    ranks(world, _replays, kind, use_reentrant, compiled)


def _transforms() -> None:
    """On the module inside of DDP; FSDP's own hooks know no function transforms."""
    x, y = data(40)
    model = DistributedDataParallel(net())
    plain = net()
    tracker = track(model)
    values = {name: p.detach() for name, p in plain.named_parameters()}

    def loss(parameters: dict[str, Tensor], module: nn.Module) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(module, parameters, mine(x)), mine(y))

    got = torch.func.grad(loss)(values, model.module)
    assert_equal(got, torch.func.grad(loss)(values, plain))
    assert _positions(tracker) == {40}
    with pytest.raises(RuntimeError, match=r"cannot run under torch\.func\.vmap"):
        torch.func.vmap(model.module)(mine(x))


@worlds
def test_transforms_of_the_module_inside(ranks: Ranks, world: int) -> None:
    ranks(world, _transforms)


def _copies(kind: str) -> None:
    x, y = data(40)
    file = {name: value.clone() for name, value in net().state_dict().items()}
    model = _spread(kind, net())
    tracker, masks = track(model), _masks(model)
    optimizer = _optimizer("adamw", model, masks)
    inner = _inner(model)
    if kind == "ddp":
        average = AveragedModel(inner)
        twin = copy.deepcopy(inner)
        for other in (average.module, twin):
            moved = masks.clone()
            moved.rebind(dict(other.named_parameters()))
            moved.check_()
            moved.check_ranks()
            other(mine(x))
    optimizer.zero_grad()
    F.cross_entropy(model(mine(x)), mine(y)).backward()
    optimizer.step()
    assert _positions(tracker) == {40}  # copies count in ledgers of their own
    # What was saved before loads, and the masks can be applied to it.
    if kind == "ddp":
        inner.load_state_dict(file)
    else:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        copied = {name: value.clone() for name, value in file.items()}
        set_model_state_dict(inner, copied, options=StateDictOptions(full_state_dict=True))
    masks.apply_()
    _check(model, masks, optimizer)
    kept = whole_masks(masks)
    for name, value in whole_weights(inner).items():
        expected = file[name].clone()
        if name in kept:
            expected[~kept[name]] = 0
        assert torch.equal(value, expected)


def _averages_of_shards() -> None:
    """torch refuses to copy a sharded model by name: copy it first, tracked or not, shard both."""
    x, y = data(40)
    model = net()
    tracker = track(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    alone = [AveragedModel(net(), multi_avg_fn=get_ema_multi_avg_fn(0.5)), net()]
    _spread("fsdp", model)
    _spread("fsdp", average.module)
    with refused("FSDP does not support deepcopy"):
        copy.deepcopy(model)
    masks, alone_masks = _masks(model), _masks(alone[1])
    optimizer, alone_optimizer = (
        _optimizer("adamw", m, k) for m, k in ((model, masks), (alone[1], alone_masks))
    )
    for _ in range(3):
        for some, step, batch in ((model, optimizer, mine), (alone[1], alone_optimizer, _all)):
            step.zero_grad()
            F.cross_entropy(some(batch(x)), batch(y)).backward()
            step.step()
        average.update_parameters(model)
        alone[0].update_parameters(alone[1])
    of_average = masks.clone()
    of_average.rebind(dict(average.module.named_parameters()))
    masks.prune_(masks.shares(60))
    average.update_parameters(model)  # which remembers weights from before
    of_average.load_state_dict(masks.state_dict())
    of_average.check_()
    of_average.check_ranks()
    assert_equal(whole_masks(of_average), whole_masks(masks))
    average(mine(x))  # counts in ledgers of its own
    assert _positions(tracker) == {3 * 40}
    alone_masks.prune_(alone_masks.shares(60))
    alone[0].update_parameters(alone[1])
    expected = whole_weights(alone[0].module)
    for name, value in whole_weights(average.module).items():
        mask = whole_masks(masks).get(name, torch.tensor(True))
        torch.testing.assert_close(value, expected[name] * mask, rtol=1e-3, atol=1e-4)


def _all(values: Tensor) -> Tensor:
    return values


@worlds
def test_averages_of_shards(ranks: Ranks, world: int) -> None:
    ranks(world, _averages_of_shards)


@worlds
@every_kind
def test_copies_and_plain_checkpoints(ranks: Ranks, world: int, kind: str) -> None:
    ranks(world, _copies, kind)
