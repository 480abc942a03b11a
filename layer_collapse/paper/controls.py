"""What every removal is held against: the dense network, and a shallow one from scratch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..graph import trace
from ..measure.report import ONE_SIDED
from ..measure.scan import scan
from ..measure.sites import find_sites
from ..measure.tracker import track
from ..reduce.fold import fold
from ..reduce.gate import reinitialise_
from ..reduce.linearize import linearize
from ..removal import Outcome
from ..removal.base import LINEARISED
from ..removal.common import check_arguments, measurement
from .loops import TrainingLoop

__all__ = ["shallow", "train_dense"]


def train_dense(model: nn.Module, loop: TrainingLoop, epochs: float, note: str = "") -> Outcome:
    """Train all epochs under one schedule, nothing leaves; entropies are those of each epoch."""
    check_arguments("dense", epochs, 0)
    history = []
    with track(model, loop.example_inputs) as tracker:

        def watch(
            model: nn.Module, optimizer: torch.optim.Optimizer, step: int, steps: int
        ) -> None:
            done = int(step * epochs / steps)
            if step == steps or done > int((step - 1) * epochs / steps):
                history.append(measurement(step * epochs / steps, tracker.entropy(), model))
                tracker.reset()

        loop.train(model, epochs, watch=watch)
    return Outcome(model, [], epochs, history, note)


def shallow(model: nn.Module, gone: Mapping[str, str], loop: TrainingLoop, seed: int) -> nn.Module:
    """The architecture that folding leaves once some rectifiers are gone, with fresh weights.

    Args:
        model: a fresh network; it is changed.
        gone: names of the rectifiers and how they left: "empty" and "constant" take their feeding
            layer along, "one-sided" and "linearised" leave it.
        seed: of the weights. Every layer starts as torch initialises it, also where the network
            that is copied was pretrained.
    """
    kept = (ONE_SIDED, LINEARISED)
    for site in find_sites(trace(model, loop.example_inputs)):
        if site.name in gone and gone[site.name] not in kept and site.feeding is not None:
            weight = model.get_submodule(site.feeding).weight
            assert isinstance(weight, nn.Parameter)
            nn.init.zeros_(weight)
    report = scan(model, loop.batches()[:1], loop.example_inputs)
    linear = linearize(model, report, loop.example_inputs, names=list(gone), tolerance=float("inf"))
    folded = fold(linear.model, loop.example_inputs, without=("batch norm",), prove=False).model
    reinitialise_(folded, seed)
    return folded
