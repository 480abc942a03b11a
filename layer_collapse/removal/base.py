"""What a removal strategy is given, and what it hands back.

A :class:`Removal` takes rectifiers out of a network within a number of epochs that is fixed before,
so that strategies compare at equal cost. It never sees how the network is trained: the
:class:`Loop` is the caller's, with the caller's optimiser and learning-rate schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..graph import ExampleInputs
from ..measure.scan import Batch
from ..prune.masks import Masks

#: ``watch(model, optimizer, step, total_steps)``: called after each optimizer step; ``step`` counts
#: from 1 to ``total_steps``, of the call of ``train`` that it belongs to.
Watch = Callable[[nn.Module, torch.optim.Optimizer, int, int], None]

#: The kinds of :class:`Removed`.
EMPTY, ONE_SIDED, LINEARISED, CONSTANT = "empty", "one-sided", "linearised", "constant"


class Loop(Protocol):
    """A training loop and the data that a strategy may look at: never a test split."""

    #: What the run's randomness derives from.
    seed: int

    @property
    def example_inputs(self) -> ExampleInputs:
        """One batch of inputs, as for :func:`layer_collapse.scan`."""
        ...

    def batches(self) -> Iterable[Batch]:
        """The training split in a fixed order, for :func:`layer_collapse.scan`.

        Re-iterable; padding, where there is any, is told by each batch's ``attention_mask``.
        """
        ...

    def loss(self, model: nn.Module) -> float:
        """Mean loss on a few hundred fixed training samples, in evaluation mode."""
        ...

    def evaluate(self, model: nn.Module) -> float:
        """Accuracy on the validation split, in percent."""
        ...

    def train(
        self,
        model: nn.Module,
        epochs: float,
        masks: Masks | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Train in place for ``epochs`` (a fraction counts steps) under one schedule.

        Args:
            masks: weights that stay pruned, by a masked optimiser or
                :func:`layer_collapse.keep_pruned`.
            watch: called after each optimizer step; it may replace submodules of the model.
        """
        ...

    def log(self, line: str) -> None:
        """Receive one line of progress."""
        ...


@dataclass(frozen=True)
class Removed:
    """One rectifier that left.

    Attributes:
        name: as :func:`layer_collapse.scan` calls it.
        kind: "empty" (no weight left in its feeding layer), "one-sided" (weights left, signs never
            change), "linearised" (it still switched; an affine gate took its place) or "constant"
            (its branch was replaced by its mean while it still depended on the input).
        epoch: after how many epochs of the whole run it left.
    """

    name: str
    kind: str
    epoch: float


@dataclass
class Outcome:
    """A trained network without the removed rectifiers; not folded yet.

    Attributes:
        model: trained; hand it to :func:`layer_collapse.fold` with the loop's example inputs.
        removed: in the order in which they left.
        epochs: spent on training, all in all.
        entropy_history: one entry per measurement: ``{"epoch": float, "rectifiers": {name: {"H":
            bits or None where unmeasured, "sparsity": share of the feeding layer's weights that
            are zero}}}``.
        note: what a reader must know, e.g. why fewer left than were asked for; may be empty.
    """

    model: nn.Module
    removed: list[Removed]
    epochs: float
    entropy_history: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""


class NotApplicable(ValueError):
    """The strategy cannot work on this network; the message says why."""


class Removal(Protocol):
    """Takes rectifiers out of a network within a number of epochs."""

    @property
    def name(self) -> str:
        """What the command line and reports call it."""
        ...

    def run(self, model: nn.Module, loop: Loop, epochs: float, remove: int) -> Outcome:
        """Remove up to ``remove`` rectifiers, spending exactly ``epochs`` epochs in all.

        Args:
            model: trained in place, or used up: go on with the outcome's model.
            epochs: above 0.
            remove: 0 trains the dense network for ``epochs``.

        Raises:
            NotApplicable: the strategy cannot work on this network.
            ValueError: bad arguments.
        """
        ...
