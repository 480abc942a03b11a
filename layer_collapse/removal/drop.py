"""The strong baseline: drop the branches that cost the least, and train on."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .base import Loop, NotApplicable, Outcome
from .common import check_arguments
from .settings import DROP, DROPS, family_of
from .steering import Steering

__all__ = ["Drop"]


class Drop:
    """Early in the run, at the share that is best for the model's family (``DROPS``), branches
    become constants one by one, each time the cheapest.

    Cheapest: whose replacement by its mean costs the least loss on a few hundred training samples,
    those before it having left; measured lazily (see :mod:`layer_collapse.removal.choosing`). The
    rest of the run is for what stays.

    Args:
        forms: ("linear",) replaces rectifiers by affine gates instead: the control that has what
            ``continuous-linear`` has, but for the entropy and the time that each layer is given.
    """

    def __init__(self, forms: tuple[str, ...] = DROP.forms) -> None:
        self.forms = forms

    @property
    def name(self) -> str:
        """ "drop", or "drop-linear"."""
        return "drop" if self.forms == DROP.forms else "-".join(["drop", *self.forms])

    def run(self, model: nn.Module, loop: Loop, epochs: float, remove: int) -> Outcome:
        """See :meth:`layer_collapse.removal.Removal.run`.

        Raises:
            NotApplicable: nothing can leave, e.g. no branch has a way around it.
            ValueError: bad arguments.
        """
        check_arguments(self.name, epochs, remove)
        when = DROPS[family_of(model)]
        steering = Steering(
            model,
            loop.batches(),
            loop.example_inputs,
            loop.loss,
            remove=remove,
            settings=replace(DROP, forms=self.forms, start=when, end=when),
            epochs=epochs,
            seed=loop.seed,
            log=loop.log,
        )
        loop.train(model, epochs, watch=steering)
        outcome = steering.finish()
        if remove and not outcome.removed:
            raise NotApplicable(f"{self.name}: {outcome.note}")
        return outcome
