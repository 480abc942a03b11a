"""What cannot be tracked is named in one sentence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracking import (
    Layers,
    snapshot,
)

from layer_collapse.graph import TraceError
from layer_collapse.measure.tracker import track


def test_a_rectifier_that_the_trace_does_not_see_is_an_error_when_called() -> None:
    use = [False]

    def forward(m: Layers, x: Tensor) -> Tensor:
        x = F.gelu(m.first(x))
        return m.act(x) if use[0] else x

    model = Layers(forward)
    with track(model) as tracker:
        model(torch.randn(3, 4))
        use[0] = True
        with pytest.raises(RuntimeError, match=r"rectifier 'act' is called more often .*\(0 calls"):
            model(torch.randn(3, 4))
        use[0] = False
        model(torch.randn(3, 4))
        assert list(tracker.state_dict()) == [":gelu"]
    with track(model, ignore=["act"]):  # as the message advises
        use[0] = True
        model(torch.randn(3, 4))


def test_functions_that_come_or_go_are_an_error() -> None:
    times = [2]

    def forward(m: Layers, x: Tensor) -> Tensor:
        x = m.act(m.first(x))
        for _ in range(times[0]):
            x = F.relu(x)
        return x

    with track(model := Layers(forward)):
        for times[0] in (1, 0):
            with pytest.raises(
                RuntimeError, match=r"rectifier ':relu, :relu#2': \d calls were seen"
            ):
                model(torch.randn(3, 4))
        times[0] = 3
        with pytest.raises(RuntimeError, match=r"rectifier ':relu, :relu#2' is called more often"):
            model(torch.randn(3, 4))
    times[0] = 1
    with track(model):
        times[0] = 2
        with pytest.raises(RuntimeError, match=r"rectifier ':relu': 2 calls were seen"):
            model(torch.randn(3, 4))


@pytest.mark.parametrize("path", ["", "inner", "inner.act"])
def test_a_forward_on_the_instance_is_an_error(path: str) -> None:
    class Outer(Layers):
        def __init__(self) -> None:
            super().__init__(lambda m, x: F.relu(m.inner(m.first(x))))
            self.inner = Layers(lambda m, x: m.act(F.gelu(x)))

    model = Outer()
    owner = model.get_submodule(path)
    owner.forward = type(owner).forward.__get__(owner)  # goes past what is put into its class
    before = snapshot(model)
    with pytest.raises(TraceError, match=r"cannot be counted: the forward of '.*' was replaced"):
        track(model)
    assert snapshot(model) == before


def test_more_calls_than_traced_are_an_error() -> None:
    times = [2]

    def forward(m: Layers, x: Tensor) -> Tensor:
        x = m.first(x)
        for _ in range(times[0]):
            x = m.act(x)
        return x

    with track(model := Layers(forward)):
        model(torch.randn(3, 4))
        times[0] = 3
        with pytest.raises(RuntimeError, match=r"rectifier 'act' is called more often .*2 calls"):
            model(torch.randn(3, 4))


def test_other_calls_than_traced_are_an_error() -> None:
    swap = [False]

    def forward(m: Layers, x: Tensor) -> Tensor:
        one, two = (F.relu, F.gelu) if swap[0] else (F.gelu, F.relu)
        return two(m.second(one(m.first(x))))

    with track(model := Layers(forward)):
        swap[0] = True
        with pytest.raises(RuntimeError, match=r"':gelu' was traced as gelu and is called as relu"):
            model(torch.randn(3, 4))


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (2, 1, 9, 9)])
def test_other_shapes_later_are_an_error_that_names_the_rectifier(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.ReLU())
    with (
        track(model, torch.randn(2, 1, 8, 8)),
        pytest.raises(RuntimeError, match=r"rectifier '2': expected 3 neurons in dim 1 of its"),
    ):
        model(torch.randn(shape))

    square = Layers(lambda m, x: m.act(m.second(x).permute(0, 2, 1)))
    with (
        track(square, torch.randn(2, 5, 6)),
        pytest.raises(RuntimeError, match=r"rectifier 'act': expected 6 neurons in dim 1"),
    ):
        square.act(torch.randn(3, 5, 6))

    with (
        track(square, torch.randn(2, 5, 6)),
        pytest.raises(RuntimeError, match=r"rectifier 'act': expected 6 neurons in dim 1"),
    ):
        square.act(torch.randn(3))


def test_tracking_twice_is_an_error() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 6), nn.ReLU())
    for first, second in ((model, model), (model, model[0]), (model[0], model)):
        with (
            track(first),
            pytest.raises(RuntimeError, match=r"tracked already; call remove\(\)"),
        ):
            track(second)
        track(second).remove()


def test_a_model_without_rectifiers_is_an_error() -> None:
    with pytest.raises(ValueError, match="Linear has no rectifier to track"):
        track(nn.Linear(4, 6))
    with pytest.raises(ValueError, match="has no rectifier to track"):
        track(nn.Sequential(nn.Linear(4, 6), nn.Tanh()))
