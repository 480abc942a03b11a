"""The loop of the experiments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import layer_collapse as lc
from layer_collapse.paper.loops import Part, TrainingLoop
from layer_collapse.training import Diverged, Recipe


def _loop(samples: int = 50, seed: int = 0) -> TrainingLoop:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0))
    part = Part(x, (x[:, 0] > 0).long())
    return TrainingLoop(part, part, Recipe(lr=0.1, batch=16), seed=seed)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_watch_sees_every_step_of_a_fraction_of_epochs() -> None:
    seen: list[tuple[int, int]] = []
    _loop().train(_model(), 2.5, watch=lambda m, o, step, total: seen.append((step, total)))
    assert seen == [(step, 10) for step in range(1, 11)]  # 4 batches an epoch


def test_parts_of_an_epoch_add_up_to_the_whole() -> None:
    steps: list[int] = []
    loop = _loop()
    for _ in range(5):
        loop.train(_model(), 0.3, watch=lambda m, o, step, total: steps.append(total))
    assert len(steps) == 6  # 1.5 epochs of 4 steps
    assert loop.epochs_done == 1.5


def test_training_learns_and_repeats_itself_bit_for_bit() -> None:
    first, second = _model(), _model()
    loop = _loop()
    before = loop.loss(first)
    loop.train(first, 8)
    _loop().train(second, 8)
    assert loop.loss(first) < before
    assert loop.evaluate(first) > 85
    assert lc.fingerprint(first) == lc.fingerprint(second)
    other = _model()
    _loop(seed=1).train(other, 8)
    assert lc.fingerprint(first) != lc.fingerprint(other)


def test_pruned_weights_stay_zero() -> None:
    model = _model()
    masks = lc.Masks({"0.weight": model.get_parameter("0.weight")})
    masks.prune_({"0.weight": 20})
    _loop().train(model, 2, masks)
    assert int((model.get_parameter("0.weight") == 0).sum()) == 20


class _Pooled(nn.Module):
    """Counts tokens through one rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc, self.act = nn.Embedding(5, 3), nn.Linear(3, 4), nn.ReLU()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return (self.act(self.fc(self.words(input_ids))) * attention_mask.unsqueeze(-1)).sum(1)


def test_padding_is_not_counted() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    part = Part(
        {"input_ids": torch.tensor([[1, 2, 0], [3, 0, 0]]), "attention_mask": mask},
        torch.tensor([0, 1]),
    )
    loop = TrainingLoop(part, part, Recipe())
    report = lc.scan(_Pooled(), loop.batches(), loop.example_inputs)
    assert report["act"].positions == 3


def test_a_loss_that_is_not_finite_is_an_error_by_name() -> None:
    model = _model()
    torch.nn.init.constant_(model.get_parameter("2.bias"), float("inf"))
    with pytest.raises(Diverged, match=r"the training loss is nan at step 1 of 8; lower the"):
        _loop().train(model, 2)


def test_bad_input_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match="epochs, 0 or more"):
        _loop().train(_model(), float("nan"))
    with pytest.raises(ValueError, match="samples to train"):
        _loop(0)
