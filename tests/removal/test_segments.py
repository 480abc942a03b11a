"""EASIER and TLC: which rectifier goes, and how the epochs are divided."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import layer_collapse as lc
from layer_collapse.paper.loops import TrainingLoop
from layer_collapse.paper.measure import measure
from layer_collapse.removal import REMOVALS, NotApplicable
from layer_collapse.removal.tlc import minority

from .settings import resnet, vit


@dataclass
class _Recorded(TrainingLoop):
    """Notes each training, and the entropies and batch norms that it ended with."""

    trained: list[float] = field(default_factory=list)
    entropies: list[dict[str, float]] = field(default_factory=list)
    errors: list[dict[str, float]] = field(default_factory=list)

    def train(self, model: nn.Module, epochs: float, *args: object, **kwargs: object) -> None:
        super().train(model, epochs, *args, **kwargs)  # type: ignore[arg-type]
        self.trained.append(epochs)
        report = lc.scan(model, self.batches(), self.example_inputs)
        self.entropies.append({row.name: row.entropy for row in report})
        norms = {"act": "bn"} | {f"stages.{i}.0.act1": f"stages.{i}.0.bn1" for i in range(3)}
        self.errors.append(
            {a: float(minority(model.get_submodule(n)).mean()) for a, n in norms.items()}
        )


def _recorded() -> tuple[nn.Module, _Recorded]:
    model, loop = resnet()
    return model, _Recorded(loop.training, loop.validation, loop.recipe)


def test_easier_takes_the_lowest_entropy_after_each_equal_part() -> None:
    model, loop = _recorded()
    outcome = REMOVALS["easier"]().run(model, loop, 3.0, remove=2)
    assert loop.trained == [1.0, 1.0, 1.0]
    names = [one.name for one in outcome.removed]
    assert names == [min(h, key=lambda n: h[n]) for h in loop.entropies[:2]]
    assert [one.epoch for one in outcome.removed] == [1.0, 2.0]
    assert {one.kind for one in outcome.removed} == {"linearised"}
    found = measure(outcome, loop, loop.validation, latency_batches=())
    assert found["rectifiers_left"] == 5
    assert found["changed_predictions"] == 0


def test_tlc_reads_batch_norms_alone() -> None:
    model, loop = _recorded()
    outcome = REMOVALS["tlc"]().run(model, loop, 2.0, remove=2)
    first = min(loop.errors[0], key=lambda n: loop.errors[0][n])
    assert outcome.removed[0].name == first
    assert outcome.removed[1].name in set(loop.errors[1]) - {first}


def test_tlc_ends_where_no_rectifier_reads_a_batch_norm() -> None:
    model, loop = _recorded()
    outcome = REMOVALS["tlc"]().run(model, loop, 1.5, remove=5)
    assert len(outcome.removed) == 4
    assert outcome.note.startswith("4 of 5 left")
    assert sum(loop.trained) == pytest.approx(1.5)


def test_tlc_needs_batch_norms() -> None:
    model, loop = vit()
    with pytest.raises(NotApplicable, match="batch norm"):
        REMOVALS["tlc"]().run(model, loop, 1.0, remove=1)


def test_easier_needs_a_place_for_the_identity() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(784, 8), nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.fc(x.flatten(1))))

    _, loop = resnet()
    with pytest.raises(NotApplicable, match="a module with one call"):
        REMOVALS["easier"]().run(Functional(), loop, 1.0, remove=1)


def test_the_rarer_side_of_a_gaussian() -> None:
    norm = nn.BatchNorm2d(5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0]))
        norm.bias.copy_(torch.tensor([0.0, 2.0, -1.0, 0.3, 0.0]))
    expected = torch.tensor([0.5, 0.158655, 0.022750, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(minority(norm), expected, atol=1e-6, rtol=0)
