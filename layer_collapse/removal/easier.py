"""EASIER: the rectifier of the lowest entropy becomes the identity, the network is retrained."""

from __future__ import annotations

import math

from torch import nn

from ..measure.report import EntropyReport
from ..measure.sites import Site
from .base import Loop, Outcome
from .segments import run_segments

__all__ = ["Easier"]


class Easier:
    """Quétu, Liao, Tartaglione, "The Simpler The Better: An Entropy-Based Importance Metric To
    Reduce Neural Networks' Depth", ECML PKDD 2024 (arXiv 2404.18949).

    Nothing is pruned. The entropy of a layer is the mean over its neurons of the entropy of their
    ON state over the training set (neurons that never switch count as 0). Deviations: the
    probabilities come from exact counts over the whole training split instead of averages over
    batches; it stops after ``remove`` layers instead of at a loss of accuracy; and all trainings
    together have the epochs that other strategies have, where the paper trains fully each time.
    """

    name = "easier"

    def run(self, model: nn.Module, loop: Loop, epochs: float, remove: int) -> Outcome:
        """See :meth:`layer_collapse.removal.Removal.run`.

        Raises:
            NotApplicable: no rectifier can be replaced in place.
            ValueError: bad arguments.
        """

        def lowest(model: nn.Module, sites: list[Site], report: EntropyReport) -> str | None:
            found = [report[site.name] for site in sites]
            rows = [row for row in found if math.isfinite(row.entropy)]
            return min(rows, key=lambda row: row.entropy).name if rows else None

        return run_segments(self.name, model, loop, epochs, remove, lowest)
