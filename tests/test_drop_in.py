"""Tracking and masks inside what training jobs already use: AMP, torch.compile, averaged copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from layer_collapse import MaskedAdamW, MaskedSGD, Masks, keep_pruned, track

aten = torch.ops.aten

_X = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
_Y = torch.arange(24) % 3


class Net(nn.Module):
    """A module, a shared module and a functional rectifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.head(F.gelu(x + self.act(self.second(x))))


Kept = Callable[[nn.Module, Masks], torch.optim.Optimizer]


def _kept_adamw(model: nn.Module, masks: Masks) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    keep_pruned(optimizer, masks)
    return optimizer


OPTIMIZERS: dict[str, Kept] = {
    "sgd": lambda m, k: MaskedSGD(m.parameters(), 0.05, 0.9, weight_decay=0.1, masks=k),
    "adamw": lambda m, k: MaskedAdamW(m.parameters(), 0.01, weight_decay=0.1, masks=k),
    "kept": _kept_adamw,
}
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)


def job(
    kind: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Net, Masks, Any]:
    """A model with half of its matrices pruned."""
    model = Net().to(device, dtype)
    masks = Masks({name: p for name, p in model.named_parameters() if p.dim() > 1})
    masks.prune_(masks.shares(200))
    return model, masks, OPTIMIZERS[kind](model, masks)


def backward(model: nn.Module, optimizer: Any, x: Tensor = _X, scale: float = 1.0) -> None:
    optimizer.zero_grad()
    device = next(model.parameters()).device
    loss = F.cross_entropy(model(x.to(device)).float(), _Y[: len(x)].to(device))
    (loss * scale).backward()


def assert_pruned(model: nn.Module, masks: Masks, optimizer: Any) -> None:
    assert 0 < masks.sparsity() < 1
    masks.check_()
    for name in masks.names:
        for key, state in optimizer.state[model.get_parameter(name)].items():
            if key != "step":
                assert not state[~masks.bool_mask(name)].any()


def assert_same(model: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


def snapshot(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# ---- mixed precision


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_step_that_overflows(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    model, masks, optimizer = job(kind, device=device)
    x, y = _X.to(device), _Y.to(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, growth_interval=3)
    with track(model) as tracker:
        for step in range(8):
            if step == 5:
                masks.prune_(masks.shares(40))
            before = snapshot(model)
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss * (1e38 if step in (0, 4, 5) else 1.0)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            masks.check_()
            if kind != "kept" or step not in (0, 4, 5):  # its hook runs after steps that are taken
                assert_pruned(model, masks, optimizer)
            same = all(map(torch.equal, before, snapshot(model)))
            assert same == (step in (0, 4, 5)), step
        assert {row.positions for row in tracker.entropy()} == {8 * 24}
    assert scaler.get_scale() < 2.0**8


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_half_a_word(kind: str, dtype: torch.dtype) -> None:
    model, masks, optimizer = job(kind, dtype)
    x = _X.to(dtype)
    with track(model) as tracker:
        before = snapshot(model)
        for _ in range(5):
            backward(model, optimizer, x)
            optimizer.step()
            assert_pruned(model, masks, optimizer)
        assert not any(map(torch.equal, before, snapshot(model)))
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {row.positions for row in tracker.entropy()} == {5 * 24}


@every_optimizer
def test_master_weights(kind: str) -> None:
    """A bfloat16 model whose float32 copy is stepped: masks belong to the copy."""
    model = Net().bfloat16()
    master, masks, optimizer = job(kind)
    for _ in range(5):
        with torch.no_grad():
            for half, full in zip(model.parameters(), master.parameters(), strict=True):
                half.copy_(full)
        for name in masks.names:
            assert not model.get_parameter(name)[~masks.bool_mask(name)].any()
        model.zero_grad()
        F.cross_entropy(model(_X.bfloat16()).float(), _Y).backward()
        for half, full in zip(model.parameters(), master.parameters(), strict=True):
            assert half.grad is not None
            full.grad = half.grad.float()
        optimizer.step()
        assert_pruned(master, masks, optimizer)


# ---- torch.compile


@pytest.fixture
def dynamo() -> Iterator[Any]:
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_compiled_step_is_the_eager_one(
    dynamo: Any, kind: str, backend: str, device: torch.device
) -> None:
    model, masks, optimizer = job(kind, device=device)
    eager, eager_masks, eager_optimizer = job(kind, device=device)
    step = torch.compile(optimizer.step, fullgraph=True, backend=backend)

    def both(fast: bool = True) -> None:
        for net, some, take in (
            (model, optimizer, step if fast else optimizer.step),
            (eager, eager_optimizer, eager_optimizer.step),
        ):
            backward(net, some)
            take()
        assert_same(model, eager)
        assert_pruned(model, masks, optimizer)

    for _ in range(3):
        both()
    compiled = graphs()
    assert compiled == 2  # the first step makes the state
    for some in (masks, eager_masks):
        some.prune_(some.shares(60))  # the state of the newly pruned is stale now
    both()
    with torch.no_grad():
        for net in (model, eager):
            net.first.weight.add_(0.5)  # revived from outside
    both()
    both(fast=False)  # eager steps in between see what compiled ones did
    both()
    assert graphs() == compiled


@pytest.mark.filterwarnings("ignore:Detected call of")  # as of torch.optim's own, compiled
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(("rate", "seen"), [(torch.tensor, [1, 2, 2, 2]), (float, [1, 2, 3, 4])])
def test_a_compiled_step_under_a_schedule(
    dynamo: Any, kind: str, rate: Callable[[float], Any], seen: list[int]
) -> None:
    """A rate that is a tensor is read by one graph; every number is another graph."""
    model, masks, optimizer = job(kind)
    eager, _, eager_optimizer = job(kind)
    for some in (optimizer, eager_optimizer):
        some.param_groups[0]["lr"] = rate(0.05) if some is optimizer else 0.05
    # A schedule puts a function of its own around step, which torch.compile does not trace.
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(some, 0.5) for some in (optimizer, eager_optimizer)
    ]
    for expected in seen:
        before = snapshot(model)
        for net, some, take, schedule in (
            (model, optimizer, step, schedules[0]),
            (eager, eager_optimizer, eager_optimizer.step, schedules[1]),
        ):
            backward(net, some)
            take()
            schedule.step()
        assert graphs() == expected
        assert_same(model, eager)
        assert not any(map(torch.equal, before, snapshot(model)))
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05 / 16)
    assert_pruned(model, masks, optimizer)


def _graph_breaks(step: Callable[[], Any]) -> dict[str, int]:
    torch._dynamo.reset()
    counters.clear()
    fast = torch.compile(step, backend="aot_eager")
    for _ in range(3):
        fast()
    return dict(counters["graph_break"])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_whole_step_breaks_where_the_untracked_one_does(dynamo: Any, kind: str) -> None:
    plain = Net()
    torchs = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    plain_optimizer = torchs(plain.parameters(), 0.01)
    model, masks, optimizer = job(kind)

    def step_of(net: nn.Module, some: Any) -> Callable[[], Tensor]:
        def step() -> Tensor:
            some.zero_grad()
            loss = F.cross_entropy(net(_X), _Y)
            loss.backward()
            some.step()
            return loss.detach()

        return step

    expected = _graph_breaks(step_of(plain, plain_optimizer))
    assert graphs() > 0
    with track(model) as tracker:
        ours = _graph_breaks(step_of(model, optimizer))
        assert graphs() > 0
        assert all(count <= expected.get(why, 0) for why, count in ours.items()), (ours, expected)
        assert {row.positions for row in tracker.entropy()} == {3 * 24}
    assert_pruned(model, masks, optimizer)


def test_batches_of_any_size_in_one_graph(dynamo: Any, device: torch.device) -> None:
    model = Net().to(device)
    x, y = _X.to(device), _Y.to(device)
    with track(model) as tracker:
        fast = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for size in (5, 9, 24):
            F.cross_entropy(fast(x[:size]), y[:size]).backward()
            tracker.pause()
            fast(x[:size])
            tracker.resume()
        assert graphs() == 1
        assert {row.positions for row in tracker.entropy()} == {5 + 9 + 24}


class _NoReads(TorchDispatchMode):
    """A stream that is being captured cannot be read: no number of a tensor reaches Python."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.masked_select):
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_step_waits_for_nothing_and_stays_in_place(kind: str) -> None:
    """What a CUDA graph asks of a captured step: no reads, the same addresses at every replay."""
    model, masks, optimizer = job(kind)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    scale, found = torch.tensor(4.0), torch.tensor(0.0)
    with track(model) as tracker:
        backward(model, optimizer)
        optimizer.step()  # makes the state, before the capture
        held = [*masks._words.values(), *(c.ledger for c in tracker._counters.values())]
        held += [t for p in model.parameters() for t in (p, *optimizer.state[p].values())]
        places = [tensor.data_ptr() for tensor in held]
        before = snapshot(model)
        with _NoReads(), pytest.raises(AssertionError, match="makes the host wait"):
            bool(found)
        for scaled in (False, True):
            optimizer.grad_scale, optimizer.found_inf = (scale, found) if scaled else (None, None)
            with _NoReads():
                backward(model, optimizer)
                optimizer.step()
                tracker.pause(), tracker.resume()
        assert [tensor.data_ptr() for tensor in held] == places
        assert not any(map(torch.equal, before, snapshot(model)))
        assert {row.positions for row in tracker.entropy()} == {3 * 24}
        assert_pruned(model, masks, optimizer)


# ---- copies and checkpoints


def test_averaged_copies() -> None:
    model, masks, optimizer = job("adamw")
    with track(model) as tracker:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for _ in range(3):
            backward(model, optimizer)
            optimizer.step()
            average.update_parameters(model)
        of_average = masks.clone()
        of_average.rebind(dict(average.module.named_parameters()))
        masks.prune_(masks.shares(60))
        average.update_parameters(model)
        of_average.load_state_dict(masks.state_dict())  # the average had other weights there
        of_average.check_()
        assert masks.sparsity() == of_average.sparsity()
        average(_X)  # counts in ledgers of its own
        assert {row.positions for row in tracker.entropy()} == {3 * 24}
    plain = AveragedModel(Net())
    plain.load_state_dict(average.state_dict())


def test_checkpoints_of_the_plain_model() -> None:
    """Saved untracked and unmasked, they load into a tracked one, and the other way round."""
    file = io.BytesIO()
    torch.save(Net().state_dict(), file)
    model, masks, _ = job("sgd")
    with track(model) as tracker:
        file.seek(0)
        model.load_state_dict(torch.load(file, weights_only=True))
        masks.apply_()
        model(_X)
        counts = tracker.state_dict()
        other = io.BytesIO()
        torch.save(model.state_dict(), other)
        twin = copy.deepcopy(model)
        twin.load_state_dict(model.state_dict())
        assert all(map(torch.equal, counts.values(), tracker.state_dict().values()))
    for before in (Net(), model):
        other.seek(0)
        before.load_state_dict(torch.load(other, weights_only=True))
        assert_same(before, model, rtol=0, atol=0)
        masks.check_()
