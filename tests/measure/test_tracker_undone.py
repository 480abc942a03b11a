"""Tracking changes nothing but the counts, and can be undone, paused, copied and saved."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracking import (
    Layers,
    Masked,
    snapshot,
)

from layer_collapse.graph import TraceError
from layer_collapse.measure.tracker import track
from layer_collapse.ops.rectify import POSITIONS


def test_remove_restores_everything() -> None:
    model = Masked()
    model.act.register_forward_hook(lambda *_: None)
    before, keys = snapshot(model), list(model.state_dict())
    tracker = track(model)
    assert snapshot(model) != before
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_modules()] == [entry[0] for entry in before]
    assert isinstance(model.act, nn.ReLU)
    assert repr(model) == repr(Masked().train())
    model(torch.randn(3, 2, 4))
    tracker.remove()
    assert snapshot(model) == before
    tracker.remove()  # twice is once
    assert snapshot(model) == before
    counted = tracker.state_dict()
    model(torch.randn(3, 2, 4))
    assert all(torch.equal(ledger, counted[k]) for k, ledger in tracker.state_dict().items())
    assert counted["act"][POSITIONS] == 6
    with track(model):  # and it can be tracked again
        model(torch.randn(3, 2, 4))
    assert snapshot(model) == before


def test_the_signature_of_forward_stays() -> None:
    model = Masked()
    before = inspect.signature(model.forward)
    with track(model):
        assert inspect.signature(model.forward) == before


def test_an_exception_removes_the_tracker_of_a_with() -> None:
    model = Masked()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), track(model):
        model(torch.randn(3, 5))
    assert snapshot(model) == before


def test_a_failed_start_changes_nothing() -> None:
    model = Layers(lambda m, x: m.act(x))
    before = snapshot(model)
    with pytest.raises(TraceError, match="'act'"):
        track(model)
    assert snapshot(model) == before


def test_exceptions_inside_forward_leave_the_tracker_usable() -> None:
    fail = [True]

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if fail[0]:
                raise ArithmeticError
            return x

    class Net(Layers):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.act(m.second(m.failing(F.relu(m.act(m.first(x)))))))
            self.failing = Failing()

    model = Net()
    fail[0] = False
    tracker = track(model)
    fail[0] = True
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            model(torch.randn(3, 4))
    fail[0] = False
    tracker.reset()
    model(torch.randn(3, 4))
    assert all(ledger[POSITIONS] == 3 for ledger in tracker.state_dict().values())
    assert torch.nn.functional.relu(torch.tensor([-1.0])) == 0  # nothing is caught any longer
    assert all(ledger[POSITIONS] == 3 for ledger in tracker.state_dict().values())


def test_a_copy_runs_and_counts_apart() -> None:
    model = Masked()
    with track(model) as tracker:
        twin = copy.deepcopy(model)
        x = torch.randn(3, 4)
        assert torch.equal(twin(x), model(x))
        assert torch.equal(twin(x, torch.ones(3)), model(x))
        assert all(ledger[POSITIONS] == 6 for ledger in tracker.state_dict().values())
        assert list(twin.state_dict()) == list(model.state_dict())


def test_nothing_is_counted_while_paused() -> None:
    model = Masked()
    with track(model) as tracker:
        model(torch.randn(3, 4))
        before = tracker.state_dict()
        tracker.pause()
        model(torch.randn(5, 4))
        tracker.reset()
        model(torch.randn(5, 4))
        assert all(not ledger.any() for ledger in tracker.state_dict().values())
        tracker.resume()
        model(torch.randn(3, 4))
        after = tracker.state_dict()
    assert all(after[k][POSITIONS] == before[k][POSITIONS] == 3 for k in before)


def test_counts_can_be_saved_and_loaded() -> None:
    model, other = Masked(), Masked()
    x = torch.randn(5, 4)
    with track(model) as tracker, track(other) as restored:
        model(x)
        state = tracker.state_dict()
        model(x)
        restored.load_state_dict(state)
        other.load_state_dict(model.state_dict())
        other(x)
        for name, ledger in restored.state_dict().items():
            assert torch.equal(ledger, tracker.state_dict()[name])
        with pytest.raises(ValueError, match=r"rectifiers differ \(nobody\)"):
            restored.load_state_dict({**state, "nobody": state["act"]})
        with pytest.raises(ValueError, match=r"counts of 'act': expected int64 of 24 words"):
            restored.load_state_dict({**state, "act": torch.zeros(3, dtype=torch.int64)})
        with pytest.raises(ValueError, match=r"counts of 'act': expected int64"):
            restored.load_state_dict({**state, "act": torch.zeros(20)})
