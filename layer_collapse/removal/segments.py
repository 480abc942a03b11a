"""Removal between trainings: one rectifier becomes the identity, the network is retrained, again.

What EASIER and TLC share; they differ in which rectifier goes next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..graph import trace
from ..measure.report import EntropyReport
from ..measure.scan import scan
from ..measure.sites import Site, find_sites
from .base import LINEARISED, Loop, NotApplicable, Outcome, Removed
from .common import check_arguments, measurement
from .units import swappable

__all__ = ["Choice", "run_segments"]

#: From the trained model, the sites that may go and a scan: the one that goes, or None for none.
Choice = Callable[[nn.Module, list[Site], EntropyReport], str | None]


def run_segments(
    name: str, model: nn.Module, loop: Loop, epochs: float, remove: int, choose: Choice
) -> Outcome:
    """Train, remove one, train, ... in ``remove + 1`` equal parts of ``epochs``.

    Each part is a training of its own, with the learning-rate schedule from its start, as in both
    papers; there each part is a full training. What goes becomes the identity for every neuron. An
    entropy scan follows each part.

    Raises:
        NotApplicable: no rectifier can be replaced in place.
        ValueError: bad arguments.
    """
    check_arguments(name, epochs, remove)
    paths = swappable(find_sites(trace(model, loop.example_inputs)))
    if remove and not paths:
        raise NotApplicable(
            f"{name}: no rectifier of this network is a module with one call, which the identity "
            "could replace"
        )
    removed: list[Removed] = []
    history: list[dict[str, Any]] = []
    note = ""
    part = epochs / (remove + 1)
    for number in range(1, remove + 2):
        loop.train(model, part)
        sites = find_sites(trace(model, loop.example_inputs))
        if not sites:
            break
        report = scan(model, loop.batches(), loop.example_inputs)
        history.append(measurement(number * part, report, model))
        if number > remove:
            break
        chosen = choose(model, [site for site in sites if site.name in paths], report)
        if chosen is None:
            break
        model.set_submodule(paths[chosen], nn.Identity())
        removed.append(Removed(chosen, LINEARISED, number * part))
        loop.log(f"{chosen} becomes the identity")
    if len(removed) < remove:
        note = f"{len(removed)} of {remove} left: no other can be replaced by the identity"
        loop.train(model, epochs - part * (len(removed) + 1))
    return Outcome(model, removed, epochs, history, note)
