"""The strong baseline: drop the branches that cost the least, and train on."""

from __future__ import annotations

from torch import nn

from .base import Loop, NotApplicable, Outcome
from .common import check_arguments
from .settings import DROP, Settings
from .steering import Steering

__all__ = ["Drop"]


class Drop:
    """At 0.3 of the run, branches become constants one by one, each time the cheapest.

    Cheapest: whose replacement by its mean costs the least loss on a few hundred training samples,
    those before it having left. The rest of the run is for what stays.
    """

    name = "drop"

    def __init__(self, settings: Settings = DROP) -> None:
        self.settings = settings

    def run(self, model: nn.Module, loop: Loop, epochs: float, remove: int) -> Outcome:
        """See :meth:`layer_collapse.removal.Removal.run`.

        Raises:
            NotApplicable: the network has no branch with a way around it.
            ValueError: bad arguments.
        """
        check_arguments(self.name, epochs, remove)
        steering = Steering(
            model,
            loop.batches(),
            loop.example_inputs,
            loop.loss,
            remove=remove,
            settings=self.settings,
            epochs=epochs,
            seed=loop.seed,
            log=loop.log,
        )
        loop.train(model, epochs, watch=steering)
        outcome = steering.finish()
        if remove and not outcome.removed:
            raise NotApplicable("drop: no branch of this network has a way around it")
        return outcome
