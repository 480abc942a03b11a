"""The plain training loop behind the command line; your own plugs into ``collapse`` instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .collapse import Phase
from .data import Split, batches
from .graph import training_mode
from .prune.masks import Masks
from .prune.optim import MaskedAdamW, MaskedSGD

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]


def silent(iterable: Iterable[Any], title: str, total: int) -> Iterable[Any]:
    """No progress bar."""
    return iterable


@dataclass(frozen=True)
class Recipe:
    """How the built-in loop trains one phase: cross-entropy, cosine decay from ``lr`` to 0.

    Attributes:
        optimizer: "sgd" (momentum 0.9) or "adamw".
        epochs: per phase; the schedule restarts in every phase.
        dense_epochs: of the phase before the first pruning.
    """

    optimizer: str = "sgd"
    lr: float = 0.05
    weight_decay: float = 1e-4
    epochs: int = 3
    dense_epochs: int = 3
    batch: int = 128

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be 'sgd' or 'adamw' (got {self.optimizer!r})")
        if min(self.epochs, self.dense_epochs) < 0 or self.batch < 1 or not self.lr > 0:
            raise ValueError("expected epochs >= 0, batch >= 1 and lr > 0")

    def epochs_of(self, phase: Phase) -> int:
        """Number of epochs that a phase trains for."""
        return self.dense_epochs if phase.kind == "dense" else self.epochs


class Diverged(RuntimeError):
    """The training loss is not finite."""


#: Called after every optimizer step with the model, the optimizer, the step from 1, and how many.
AfterStep = Callable[[nn.Module, torch.optim.Optimizer, int, int], None]


def fit(
    model: nn.Module,
    masks: Masks,
    recipe: Recipe,
    samples: Iterable[tuple[Any, Tensor]],
    steps: int,
    after: AfterStep | None = None,
) -> None:
    """Train in place on ``steps`` batches under one schedule; pruned weights stay zero.

    Args:
        samples: (inputs, classes) of each step; a mapping of inputs gives keyword arguments.

    Raises:
        Diverged: the loss is not finite.
    """
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = MaskedSGD(
            model.parameters(), recipe.lr, 0.9, weight_decay=recipe.weight_decay, masks=masks
        )
    else:
        optimizer = MaskedAdamW(
            model.parameters(), recipe.lr, weight_decay=recipe.weight_decay, masks=masks
        )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    with training_mode(model, True):
        for step, (x, y) in enumerate(samples, start=1):
            loss = F.cross_entropy(_logits(model, x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if not math.isfinite(loss.item()):
                raise Diverged(
                    f"the training loss is {loss.item()} at step {step} of {steps}; lower the "
                    f"learning rate ({recipe.lr})"
                )
            if after is not None:
                after(model, optimizer, step, steps)


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


@torch.no_grad()
def logits(model: nn.Module, inputs: Iterable[Any]) -> Tensor:
    """The outputs for all batches of inputs, in evaluation mode: [N, classes]."""
    with training_mode(model, False):
        return torch.cat([_logits(model, x) for x in inputs])


def train_phase(
    model: nn.Module,
    masks: Masks,
    phase: Phase,
    split: Split,
    recipe: Recipe,
    progress: Progress = silent,
) -> None:
    """Train in place for one phase; pruned weights stay zero.

    Raises:
        Diverged: the loss is not finite.
    """
    epochs = recipe.epochs_of(phase)
    steps = -(-len(split) // recipe.batch)
    generator = torch.Generator().manual_seed(phase.seed)

    def samples() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in range(epochs):
            loader = batches(split, recipe.batch, generator=generator)
            yield from progress(loader, f"{phase}: epoch {epoch + 1}/{epochs}", steps)

    try:
        fit(model, masks, recipe, samples(), epochs * steps)
    except Diverged as error:
        raise Diverged(f"{phase}: {error}") from error


def predictions(model: nn.Module, split: Split, batch: int = 1000) -> Tensor:
    """Predicted class of every sample: [N] int64."""
    return logits(model, (x for x, _ in batches(split, batch))).argmax(1)


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of right predictions, in percent."""
    return 100.0 * float((predictions(model, split) == split.y).double().mean())
