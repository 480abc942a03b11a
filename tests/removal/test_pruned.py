"""Iterative pruning behind the interface of removal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from layer_collapse import Masks, scan
from layer_collapse.models import build
from layer_collapse.paper.loops import Part, TrainingLoop
from layer_collapse.prune.rounds import prune_round
from layer_collapse.removal import REMOVALS, NotApplicable, Watch, pruned
from layer_collapse.removal.pruned import Pruned
from layer_collapse.training import Recipe


class _Loop(TrainingLoop):
    """Writes down what it is asked for; ``spoil`` may damage the model after a call."""

    spoil: Callable[[nn.Module, int], None] = staticmethod(lambda model, call: None)

    def train(
        self,
        model: nn.Module,
        epochs: float,
        masks: Masks | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.__dict__.setdefault("asked", []).append(epochs)
        super().train(model, epochs, masks, watch)
        self.spoil(model, len(self.__dict__["asked"]))


def _loop() -> _Loop:
    x = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    part = Part(x, (x[:, 0, 0, 0] > 0).long())
    return _Loop(part, part, Recipe(lr=0.05, batch=20))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return build("resmlp", (1, 4, 4), 2, width=8, hidden=8, blocks=4)


@pytest.mark.parametrize("name", ["entropy", "entropy-active", "magnitude", "uniform"])
@pytest.mark.parametrize("remove", [0, 2])
def test_every_arm_spends_the_same_epochs(name: str, remove: int) -> None:
    loop, model = _loop(), _model()
    outcome = REMOVALS[name]().run(model, loop, 5, remove)
    assert sum(loop.__dict__["asked"]) == pytest.approx(5)
    assert loop.epochs_done == pytest.approx(5)  # of 3 steps each: a part is 2.5 steps
    assert REMOVALS[name]().name == name
    report = scan(outcome.model, loop.batches(), loop.example_inputs)
    assert {one.name for one in outcome.removed} == set(report.zero_entropy)
    for one in outcome.removed:
        assert one.kind == report[one.name].state
        assert 0 < one.epoch <= 5
    assert outcome.entropy_history[-1]["epoch"] == pytest.approx(5)
    assert (len(outcome.removed) < remove) == bool(outcome.note)
    if remove == 0:
        assert loop.__dict__["asked"] == [5]


def test_pruning_stops_once_enough_are_gone_and_survivors_keep_their_weights() -> None:
    loop = _loop()
    outcome = Pruned().run(_model(), loop, 6, 1)
    assert len(outcome.removed) == 1
    assert len(loop.__dict__["asked"]) < 7  # what was left was one part
    sparsity = [
        max(row["sparsity"] for row in entry["rectifiers"].values())
        for entry in outcome.entropy_history
    ]
    assert sparsity == sorted(sparsity)
    assert sparsity[0] == 0
    assert sparsity[-1] == 1


def test_a_round_that_cuts_is_undone() -> None:
    loop = _loop()
    head: list[torch.Tensor] = []

    def spoil(model: nn.Module, call: int) -> None:
        if call == 2:
            head.append(model.get_parameter("head.weight").detach().clone())
        if call == 3:
            model.get_parameter("head.weight").data.zero_()

    loop.spoil = spoil  # type: ignore[method-assign]
    outcome = Pruned(fraction=0.5).run(_model(), loop, 6, 4)
    assert "round 2 cut the network" in outcome.note
    assert "of 4 rectifiers at zero entropy" in outcome.note
    assert sum(loop.__dict__["asked"]) == pytest.approx(6)
    assert not scan(outcome.model, loop.batches(), loop.example_inputs).cut


def test_the_last_round_may_cut_too() -> None:
    loop = _loop()

    def spoil(model: nn.Module, call: int) -> None:
        if call == 3:
            model.get_parameter("head.weight").data.zero_()

    loop.spoil = spoil  # type: ignore[method-assign]
    outcome = Pruned(fraction=0.5, rounds=2).run(_model(), loop, 3, 4)
    assert loop.__dict__["asked"] == [1, 1, 1]
    report = scan(outcome.model, loop.batches(), loop.example_inputs)
    assert not report.cut
    assert {one.name for one in outcome.removed} == set(report.zero_entropy)


def test_a_cut_that_shows_at_once_costs_no_epochs_and_halves_what_is_pruned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[float] = []

    def rough(model: nn.Module, masks: Masks, *others: Any) -> dict[str, int]:
        tried.append(others[2])
        counts = prune_round(model, masks, *others)
        if others[2] > 0.3:
            model.get_parameter("head.weight").data.zero_()
        return counts

    monkeypatch.setattr(pruned, "prune_round", rough)
    loop = _loop()
    outcome = Pruned(fraction=0.8, rounds=2).run(_model(), loop, 3, 4)
    assert tried == [0.8, 0.4, 0.2, 0.2]
    assert loop.__dict__["asked"] == [1, 1, 1]
    assert "cut" not in outcome.note
    report = scan(outcome.model, loop.batches(), loop.example_inputs)
    assert not report.cut
    alive = [float((p != 0).float().mean()) for p in outcome.model.parameters() if p.ndim > 1]
    assert min(alive) > 0.3  # what 0.8 and 0.4 had pruned came back


def test_after_a_round_that_cuts_half_as_much_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def noted(*arguments: Any) -> dict[str, int]:
        tried.append(arguments[4])
        return prune_round(*arguments)

    monkeypatch.setattr(pruned, "prune_round", noted)
    loop = _loop()

    def spoil(model: nn.Module, call: int) -> None:
        if call == 2:
            model.get_parameter("head.weight").data.zero_()

    loop.spoil = spoil  # type: ignore[method-assign]
    outcome = Pruned(fraction=0.5, rounds=3).run(_model(), loop, 4, 4)
    assert tried == [0.5, 0.25, 0.25]
    assert "round 1 cut the network" in outcome.note
    assert not outcome.note.endswith("; ")


def test_bad_arguments_get_a_sentence() -> None:
    with pytest.raises(ValueError, match="epochs above 0"):
        Pruned().run(_model(), _loop(), 0, 1)
    with pytest.raises(ValueError, match="0 or more rectifiers"):
        Pruned().run(_model(), _loop(), 1, -1)
    with pytest.raises(ValueError, match="1 round or more"):
        Pruned(rounds=0)
    with pytest.raises(ValueError, match="fraction"):
        Pruned(fraction=1.0)
    shared = nn.Linear(4, 4)
    twice = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), shared, nn.ReLU(), shared)
    with pytest.raises(NotApplicable, match="fed by a layer of its own alone"):
        Pruned().run(twice, _loop(), 1, 1)
