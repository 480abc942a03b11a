"""Iterative pruning as a removal strategy: prune, retrain, measure, until layers are linear.

Entropy: Liao, Quétu, Nguyen, Tartaglione, TMLR 2026 (NEPENTHE) and ICCVW 2023 (EGP, the mean over
active neurons); magnitude: Han et al., NeurIPS 2015, over all layers together; uniform: the same
share of every layer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

from torch import nn

from ..graph import trace
from ..measure.report import EMPTY as NO_WEIGHTS
from ..measure.report import EntropyReport
from ..measure.scan import scan
from ..measure.sites import find_sites
from ..prune.masks import Masks
from ..prune.rounds import Guards, candidate_weights, check_fraction, prune_round
from ..prune.strategies import EntropyGuided, Strategy
from .base import EMPTY, ONE_SIDED, Loop, NotApplicable, Outcome, Removed
from .common import check_arguments, measurement

__all__ = ["Pruned"]


@dataclass(frozen=True)
class Pruned:
    """Prunes by rounds until enough rectifiers have zero entropy.

    The epochs are cut into ``rounds + 1`` equal parts: one of dense training, one after each round,
    each under a learning-rate schedule of its own. Once enough rectifiers have zero entropy, what
    is left of the epochs is one part without further pruning. A round that cuts the network is
    undone and was the last.

    Attributes:
        strategy: how many weights each layer loses.
        fraction: of the weights alive in layers that still switch, per round.
        rounds: how many, at most.
        guards: as for :func:`layer_collapse.prune_round`; a round empties no more layers than are
            still asked for.
        name: what reports call it; the strategy's own where empty.
    """

    strategy: Strategy = field(default_factory=EntropyGuided)
    fraction: float = 0.8
    rounds: int = 5
    guards: Guards = field(default_factory=Guards)
    name: str = ""

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        if self.rounds < 1:
            raise ValueError(f"expected 1 round or more (got {self.rounds})")
        if not self.name:
            object.__setattr__(self, "name", self.strategy.name)

    def run(self, model: nn.Module, loop: Loop, epochs: float, remove: int) -> Outcome:
        """See :meth:`layer_collapse.removal.Removal.run`.

        Raises:
            NotApplicable: no rectifier is fed by a layer of its own alone.
            ValueError: bad arguments.
        """
        check_arguments(self.name, epochs, remove)
        sites = find_sites(trace(model, loop.example_inputs))
        weights = candidate_weights(model, sites)
        if not weights:
            raise NotApplicable(f"{self.name}: no rectifier is fed by a layer of its own alone")
        masks = Masks(weights)
        history, gone, note = [], dict[str, float](), ""

        def measured(epoch: float) -> EntropyReport:
            report = scan(model, loop.batches(), loop.example_inputs)
            history.append(measurement(epoch, report, model))
            zero = set(report.zero_entropy)
            for name in [name for name in gone if name not in zero]:
                del gone[name]  # one that switches again
            for name in report.zero_entropy:
                gone.setdefault(name, epoch)
            loop.log(
                f"{self.name}: epoch {epoch:g}, {100 * masks.sparsity():.2f} % of the weights "
                f"pruned, {len(zero)} of {remove} rectifiers at zero entropy"
            )
            return report

        part, done = epochs / (self.rounds + 1), 0
        report = None
        if remove:
            loop.train(model, part, masks)
            done, report = 1, measured(part)
        while report is not None and done <= self.rounds and len(gone) < remove:
            before = copy.deepcopy(model.state_dict()), masks.clone(), dict(gone)
            most = min(self.guards.max_emptied, remove - len(gone))
            guards = replace(self.guards, max_emptied=most)
            prune_round(model, masks, report, sites, self.fraction, self.strategy, guards)
            loop.train(model, part, masks)
            done += 1
            report = measured(done * part)
            if report.cut:
                note = f"round {done - 1} cut the network ({report.cut_by}) and was undone"
                model.load_state_dict(before[0])
                masks.load_words({name: before[1].words(name) for name in masks.names})
                gone.update(before[2])
                break
        if done <= self.rounds:
            loop.train(model, epochs - done * part, masks)
        if note or done <= self.rounds:
            report = measured(epochs)
        assert report is not None
        if len(gone) < remove:
            few = (
                f"{len(gone)} of {remove} rectifiers at zero entropy with "
                f"{100 * masks.sparsity():.2f} % of the weights pruned"
            )
            note = f"{note}; {few}" if note else few
        states = {row.name: row.state for row in report}
        removed = [
            Removed(name, EMPTY if states[name] == NO_WEIGHTS else ONE_SIDED, epoch)
            for name, epoch in gone.items()
        ]
        return Outcome(model, removed, epochs, history, note)
