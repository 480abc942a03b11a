"""One run in which layers leave: on real data, to the folded network."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import layer_collapse as lc
from layer_collapse.graph import rectifier_nodes, trace
from layer_collapse.models import build
from layer_collapse.paper.measure import measure
from layer_collapse.removal import REMOVALS, NotApplicable, Settings, Steering
from layer_collapse.removal.choosing import lowest
from layer_collapse.removal.continuous import Continuous

from .settings import NETWORKS, Inverted, Parallel, resnet

_CASES = {
    "drop": (REMOVALS["drop"](), "constant"),
    "emptied": (Continuous(Settings(forms=("constant",), moves=4)), "empty"),
    "linear": (Continuous(Settings(forms=("linear",), moves=4)), "linearised"),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("case", _CASES)
def test_what_left_is_gone_from_the_folded_network(network: str, case: str) -> None:
    model, loop = NETWORKS[network]()
    removal, kind = _CASES[case]
    before = len(rectifier_nodes(trace(model, loop.example_inputs)))
    names = {name for name, _ in model.named_parameters()}
    outcome = removal.run(model, loop, 2.5, remove=2)
    assert [one.kind for one in outcome.removed] == [kind] * 2
    assert {name for name, _ in outcome.model.named_parameters()} == names
    assert outcome.note == ""
    found = measure(outcome, loop, loop.validation, latency_batches=())
    assert found["cut"] == ""
    assert found["rectifiers_left"] == before - 2
    assert found["changed_predictions"] == 0
    epochs = [entry["epoch"] for entry in outcome.entropy_history]
    assert epochs == sorted(epochs)
    assert epochs[-1] == outcome.epochs == 2.5


class _Score(nn.Module):
    """Two branches: one that hardly matters and switches, one that matters and hardly switches."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.large = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        nn.init.constant_(self.large[0].bias, 3.0)
        with torch.no_grad():
            self.small[2].weight.mul_(0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.small(x) + self.large(x)


@pytest.mark.parametrize(("score", "expected"), [("loss", "small.1"), ("entropy", "large.1")])
def test_scores_choose_by_what_they_say(score: str, expected: str) -> None:
    torch.manual_seed(0)
    model, x = _Score(), torch.randn(64, 4)
    target = model(x).detach()
    settings = Settings(score=score, forms=("constant",), start=0.5, end=0.5, moves=0)

    def loss(model: nn.Module) -> float:
        return float(F.mse_loss(model(x), target).detach())

    steering = Steering(model, [x], x, loss, remove=1, settings=settings)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for step in (1, 2):
        model(x)
        steering(model, optimizer, step, 2)
    assert [one.name for one in steering.finish().removed] == [expected]


def test_in_a_loop_of_ones_own_optimizer_and_schedule_stay() -> None:
    model, task = resnet()
    x, y = task.training.take(slice(None)), task.training.y
    assert isinstance(x, torch.Tensor)

    def loss(model: nn.Module) -> float:
        with lc.graph.training_mode(model, False), torch.no_grad():
            return float(F.cross_entropy(model(x[:128]), y[:128]))

    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 8, 0.5)
    model.train()
    steering = Steering(model, x.split(100), x[:2], loss, remove=2, epochs=3)
    for step in range(1, 19):
        at = slice(50 * ((step - 1) % 6), 50 * ((step - 1) % 6 + 1))
        optimizer.zero_grad()
        F.cross_entropy(model(x[at]), y[at]).backward()
        optimizer.step()
        schedule.step()
        steering(model, optimizer, step, total_steps=18)
    outcome = steering.finish()
    assert outcome.model is model
    assert len(outcome.removed) == 2
    assert all(0 < one.epoch <= 0.65 * 3 for one in outcome.removed)
    assert optimizer.param_groups[0]["lr"] == 0.05 * 0.5**2
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    folded = lc.fold(trace(model.eval(), x[:2]), x[:2]).model
    assert torch.equal(folded(x).argmax(1), model(x).argmax(1))


def _steer(
    model: nn.Module, x: torch.Tensor, remove: int, settings: Settings
) -> lc.removal.Outcome:
    def loss(model: nn.Module) -> float:
        return float(model(x).detach().square().mean())

    steering = Steering(model, [x], x, loss, remove=remove, settings=settings)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for step in range(1, 21):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        steering(model, optimizer, step, 20)
    return steering.finish()


def test_a_branch_that_would_cut_the_network_stays_and_the_note_says_so() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 4)
    outcome = _steer(Parallel(), x, 2, Settings(forms=("constant",)))
    assert len(outcome.removed) == 1
    assert "1 of 2 left" in outcome.note
    assert "cut" not in outcome.note


def test_what_has_no_way_around_leaves_by_becoming_linear() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 4)
    outcome = _steer(Parallel(), x, 2, Settings(forms=("constant", "linear"), moves=3))
    assert [one.kind for one in outcome.removed] == ["empty", "linearised"]
    assert outcome.note == ""


def test_two_rectifiers_of_a_branch_leave_at_one_time_or_not_at_all() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 4, 5, 5)
    both = _steer(Inverted(), x, 2, Settings(forms=("constant",), moves=3))
    assert [one.name for one in both.removed] == ["act1", "act2"]
    assert both.removed[0].epoch == both.removed[1].epoch
    one = _steer(Inverted(), x, 1, Settings(forms=("constant",), moves=3))
    assert one.removed == []
    assert one.note.startswith("0 of 1 left")


def test_rectifiers_that_work_in_place_become_linear_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 4, 5, 5)
    outcome = _steer(Inverted(), x, 2, Settings(moves=3))
    assert {one.name for one in outcome.removed} == {"act1", "act2"}
    model = outcome.model.eval()
    folded = lc.fold(model, x).model
    assert rectifier_nodes(trace(folded, x)) == []
    torch.testing.assert_close(folded(x), model(x))


@pytest.mark.parametrize(
    ("most", "kinds"), [(0.3, ["constant", "linearised"]), (0.1, ["linearised", "linearised"])]
)
def test_a_branch_becomes_constant_where_that_costs_little(most: float, kinds: list[str]) -> None:
    """The left branch costs a fifth of the loss, the right one is the only way left after it."""
    torch.manual_seed(0)
    model, x = Parallel().eval(), torch.randn(200, 4)
    left, right = model.left(x).detach(), model.right(x).detach()

    @torch.no_grad()
    def loss(now: nn.Module) -> float:
        lost = [
            float((branch(x) - whole).square().sum() / (whole - whole.mean(0)).square().sum())
            for branch, whole in ((now.left, left), (now.right, right))
        ]
        return 1.0 + 0.2 * lost[0] + 2.0 * lost[1]

    settings = Settings(score="loss", forms=("constant", "linear"), most=most, moves=0)
    steering = Steering(model, [x], x, loss, remove=2, settings=settings)
    for step in range(1, 11):
        model(x)
        steering(model, torch.optim.SGD(model.parameters(), 0.1), step, 10)
    assert [one.kind for one in steering.finish().removed] == kinds


def test_a_run_that_ends_early_removes_what_is_on_its_way_and_says_so() -> None:
    torch.manual_seed(0)
    model, x = Parallel(), torch.randn(50, 4)
    steering = Steering(model, [x], x, lambda m: 0.0, remove=2, settings=Settings(start=0.1))
    for step in range(1, 5):
        model(x)
        steering(model, torch.optim.SGD(model.parameters(), 0.1), step, 20)
    outcome = steering.finish()
    assert len(outcome.removed) == 1
    assert "left as the run ended" in outcome.note


def test_lazy_choice_measures_few_and_finds_the_cheapest() -> None:
    calls: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.rectifiers = (name,)
            self.kind = "constant"

        @contextmanager
        def momentarily(self, model: nn.Module) -> Iterator[None]:
            calls.append(self.rectifiers[0])
            yield

    now = {"a": 0.5, "b": 0.3, "c": 0.9, "d": 0.8}
    costs = {("a",): 0.1, ("b",): 0.2, ("c",): 0.4, ("d",): 0.7}
    ways: list[Any] = [Fake(name) for name in "dcba"]

    def loss(model: nn.Module) -> float:
        return 1.0 + (now[calls[-1]] if calls else 0.0)

    best = lowest("loss", ways, nn.Identity(), loss, {}, random.Random(0), costs)
    assert best.way.rectifiers == ("b",)
    assert best.growth == pytest.approx(0.3)
    assert calls == ["a", "b"]
    assert costs[("a",)] == pytest.approx(0.5)
    calls.clear()
    best = lowest("loss", ways, nn.Identity(), loss, {}, random.Random(0), {})
    assert best.way.rectifiers == ("b",)
    assert sorted(calls) == ["a", "b", "c", "d"]


def test_random_order_is_that_of_the_seed() -> None:
    def order(seed: int) -> list[str]:
        torch.manual_seed(0)
        model = build("resmlp", (1, 4, 4), 2, width=8, hidden=8, blocks=4)
        x = torch.randn(20, 1, 4, 4)
        settings = Settings(score="random", moves=0)
        steering = Steering(model, [x], x, lambda m: 0.0, remove=3, settings=settings, seed=seed)
        for step in range(1, 21):
            model(x)
            steering(model, torch.optim.SGD(model.parameters(), 0.1), step, 20)
        return [one.name for one in steering.finish().removed]

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_drop_needs_a_branch() -> None:
    _, loop = resnet()
    with pytest.raises(NotApplicable, match="no further branch"):
        REMOVALS["drop"]().run(build("mlp", (1, 28, 28), 10), loop, 1, remove=1)


@pytest.mark.parametrize("name", REMOVALS)
def test_removing_none_is_dense_training(name: str) -> None:
    model, loop = resnet()
    other, same = resnet()
    outcome = REMOVALS[name]().run(model, loop, 1, remove=0)
    same.train(other, 1)
    assert outcome.removed == []
    assert lc.fingerprint(outcome.model) == lc.fingerprint(other)


@pytest.mark.parametrize("name", REMOVALS)
def test_bad_arguments_get_a_sentence(name: str) -> None:
    model, loop = resnet()
    with pytest.raises(ValueError, match="epochs above 0"):
        REMOVALS[name]().run(model, loop, 0, remove=1)
    with pytest.raises(ValueError, match="0 or more rectifiers"):
        REMOVALS[name]().run(model, loop, 1, remove=-1)


def test_data_that_can_be_read_once_are_refused() -> None:
    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match="iterated again"):
        Steering(Parallel(), iter([x]), x, lambda m: 0.0, remove=1)


def test_names_are_those_of_the_registry() -> None:
    assert {name: make().name for name, make in REMOVALS.items()} == {n: n for n in REMOVALS}


def test_settings_are_checked() -> None:
    for wrong in ({"score": "luck"}, {"forms": ()}, {"start": 0.7}, {"moves": -1}):
        with pytest.raises(ValueError, match="got"):
            Settings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("case", _CASES)
def test_what_left_is_gone_from_the_exported_graph(network: str, case: str) -> None:
    model, loop = NETWORKS[network]()
    before = len(rectifier_nodes(trace(model, loop.example_inputs)))
    outcome = _CASES[case][0].run(model, loop, 0.5, remove=2)
    report = lc.scan(outcome.model, loop.batches(), loop.example_inputs)
    linear = lc.linearize(outcome.model, report, loop.example_inputs).model
    folded = lc.fold(linear.eval(), loop.example_inputs).model
    example = loop.example_inputs
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), None)
    exported = torch.export.export(folded, args, kwargs)
    nodes = list(exported.graph.nodes)
    left = [n for n in nodes if str(n.target).split(".")[1:2] in (["relu"], ["relu_"], ["gelu"])]
    assert len(left) == before - 2
    gone = {one.name for one in outcome.removed}
    # An affine gate that merges into nothing stays under the name of its rectifier.
    paths = {path for n in left for path, _ in n.meta["nn_module_stack"].values()}
    assert paths
    assert not gone & paths


@pytest.mark.parametrize("name", REMOVALS)
@pytest.mark.parametrize("remove", [0, 2])
def test_every_strategy_trains_the_epochs_that_it_is_given(name: str, remove: int) -> None:
    model, loop = NETWORKS["resnet"]()
    outcome = REMOVALS[name]().run(model, loop, 2.5, remove)
    assert loop.epochs_done == pytest.approx(2.5)
    assert REMOVALS[name]().name == name
    assert len(outcome.removed) >= remove or outcome.note
