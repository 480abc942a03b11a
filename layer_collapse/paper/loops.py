"""The training loop that every arm of an experiment shares, on images and on sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..prune.masks import Masks
from ..removal import Watch
from ..training import Recipe, fit, logits

__all__ = ["Inputs", "Part", "TrainingLoop", "predictions"]

Inputs = Tensor | dict[str, Tensor]
_LOSS_SAMPLES = 256
_EVALUATION_BATCH = 250


@dataclass(frozen=True)
class Part:
    """One split of a task.

    Attributes:
        x: images float32 [N, C, H, W], or a mapping with ``input_ids`` int64 [N, T] and
            ``attention_mask`` float32 [N, T], 1 for tokens and 0 for padding.
        y: int64 [N], classes from 0.
    """

    x: Inputs
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor | slice) -> Inputs:
        """The inputs of some samples."""
        if isinstance(self.x, dict):
            return {name: tensor[index] for name, tensor in self.x.items()}
        return self.x[index]

    def batches(self, size: int) -> list[Inputs]:
        """All inputs in fixed order; the last batch may be shorter."""
        return [self.take(slice(i, i + size)) for i in range(0, len(self), size)]


def _silent(_: str | float) -> None:
    pass


@dataclass
class TrainingLoop:
    """:class:`layer_collapse.removal.Loop` on two splits held in memory; it knows no test split.

    Cross-entropy under ``recipe``'s optimiser; the learning rate falls from ``recipe.lr`` to 0 by a
    cosine over each call of ``train``. Batches depend on ``seed`` and on how often ``train`` was
    called, so arms that train alike see the same batches. Parts of an epoch are rounded to steps so
    that all calls together train what was asked for. ``tick`` hears after every step how many
    epochs were trained, all calls together.
    """

    training: Part
    validation: Part
    recipe: Recipe
    seed: int = 0
    report: Callable[[str], None] = _silent
    tick: Callable[[float], None] = _silent
    epochs_done: float = field(default=0.0, init=False)
    _asked: float = field(default=0.0, init=False, repr=False)
    _calls: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not len(self.training) or not len(self.validation):
            raise ValueError(
                f"expected samples to train and to validate on (got {len(self.training)} and "
                f"{len(self.validation)})"
            )

    @property
    def example_inputs(self) -> Inputs:
        """Two training samples."""
        return self.training.take(slice(0, 2))

    def batches(self) -> list[Inputs]:
        """The training split in fixed order, with the padding marked."""
        return self.training.batches(_EVALUATION_BATCH)

    def loss(self, model: nn.Module) -> float:
        """Mean cross-entropy (nats) on the first 256 training samples, in evaluation mode."""
        some = slice(0, _LOSS_SAMPLES)
        answers = logits(model, [self.training.take(some)])
        return float(F.cross_entropy(answers, self.training.y[some]))

    def evaluate(self, model: nn.Module) -> float:
        """Accuracy on the validation split, in percent."""
        return accuracy(model, self.validation)

    def train(
        self,
        model: nn.Module,
        epochs: float,
        masks: Masks | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Train in place under one schedule; pruned weights stay zero.

        Raises:
            ValueError: ``epochs`` is no finite number of 0 or more.
            Diverged: the loss is not finite.
        """
        if not 0 <= epochs < math.inf:
            raise ValueError(f"expected a finite number of epochs, 0 or more (got {epochs})")
        recipe, per_epoch = self.recipe, math.ceil(len(self.training) / self.recipe.batch)
        self._asked += epochs
        total = round(self._asked * per_epoch) - round(self.epochs_done * per_epoch)
        self._calls += 1
        if not total:
            return
        torch.manual_seed(1000 * self.seed + self._calls)  # dropout
        begun = self.epochs_done

        def after(
            model: nn.Module, optimizer: torch.optim.Optimizer, step: int, steps: int
        ) -> None:
            self.epochs_done = begun + step / per_epoch
            self.tick(self.epochs_done)
            if watch is not None:
                watch(model, optimizer, step, steps)

        masks = masks or Masks(dict(model.named_parameters()))
        fit(model, masks, recipe, self._samples(total), total, after)

    def _samples(self, steps: int) -> Iterator[tuple[Inputs, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self._calls)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if not len(order):
                order = torch.randperm(len(self.training), generator=generator)
            picked, order = order[: self.recipe.batch], order[self.recipe.batch :]
            yield self.training.take(picked), self.training.y[picked]

    def log(self, line: str) -> None:
        """Pass one line of progress on."""
        self.report(line)


def accuracy(model: nn.Module, part: Part) -> float:
    """Share of right predictions in evaluation mode, in percent."""
    return 100.0 * float((predictions(model, part) == part.y).double().mean())


def predictions(model: nn.Module, part: Part) -> Tensor:
    """Predicted class of every sample in evaluation mode: int64 [N]."""
    return logits(model, part.batches(_EVALUATION_BATCH)).argmax(1)
