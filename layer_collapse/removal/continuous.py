"""Ours: layers leave in one training run, steered by entropies that are known all along."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .base import Loop, Outcome
from .common import check_arguments
from .settings import FAMILIES, Settings, family_of
from .steering import Steering

__all__ = ["Continuous"]


class Continuous:
    """One run, one schedule; see :class:`~layer_collapse.removal.steering.Steering`.

    Args:
        settings: instead of those of the model's family.
        score, forms: instead of those of the settings, for ablations.
        at_once: each leaves in one step at the start of its part, another ablation.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        score: str | None = None,
        forms: tuple[str, ...] | None = None,
        at_once: bool = False,
    ) -> None:
        self.settings = settings
        self.score = score
        self.forms = forms
        self.at_once = at_once

    @property
    def name(self) -> str:
        """ "continuous", and what an ablation changes."""
        changed = [self.score, *(self.forms or ()), "once" if self.at_once else None]
        return "-".join(["continuous", *filter(None, changed)])

    def run(self, model: nn.Module, loop: Loop, epochs: float, remove: int) -> Outcome:
        """See :meth:`layer_collapse.removal.Removal.run`.

        Raises:
            ValueError: bad arguments.
        """
        check_arguments(self.name, epochs, remove)
        settings = self.settings or FAMILIES[family_of(model)]
        settings = replace(
            settings,
            score=self.score or settings.score,
            forms=self.forms or settings.forms,
            moves=0 if self.at_once else settings.moves,
        )
        steering = Steering(
            model,
            loop.batches(),
            loop.example_inputs,
            loop.loss,
            remove=remove,
            settings=settings,
            epochs=epochs,
            seed=loop.seed,
            log=loop.log,
        )
        loop.train(model, epochs, watch=steering)
        return steering.finish()
