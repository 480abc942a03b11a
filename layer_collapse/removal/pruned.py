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
from .common import check_arguments, few, measurement
from .settings import ROUNDS, family_of

__all__ = ["Pruned"]

_SAMPLES = 256  # to see a cut before training
_LEAST = 0.01  # fraction that is not halved for that


@dataclass(frozen=True)
class Pruned:
    """Prunes by rounds until enough rectifiers have zero entropy.

    The epochs are cut into ``rounds + 1`` equal parts: one of dense training, one after each round,
    each under a learning-rate schedule of its own. Once enough rectifiers have zero entropy, what
    is left of the epochs is one part without further pruning. A round that cuts the network is
    undone, and from there on half as much is pruned; where the cut shows before the round has
    trained, it costs no epochs.

    Attributes:
        strategy: how many weights each layer loses.
        fraction: of the weights alive in layers that still switch, per round; None: that of the
            model's family, as ``rounds``.
        rounds: how many, at most.
        guards: as for :func:`layer_collapse.prune_round`; a round empties no more layers than are
            still asked for.
        name: what reports call it; the strategy's own where empty.
    """

    strategy: Strategy = field(default_factory=EntropyGuided)
    fraction: float | None = None
    rounds: int | None = None
    guards: Guards = field(default_factory=Guards)
    name: str = ""

    def __post_init__(self) -> None:
        if self.fraction is not None:
            check_fraction(self.fraction)
        if self.rounds is not None and self.rounds < 1:
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
        usual = ROUNDS[family_of(model)]
        rounds, fraction = self.rounds or usual[0], self.fraction or usual[1]
        sites = find_sites(trace(model, loop.example_inputs))
        weights = candidate_weights(model, sites)
        if not weights:
            raise NotApplicable(f"{self.name}: no rectifier is fed by a layer of its own alone")
        masks = Masks(weights)
        some = few(loop.batches(), _SAMPLES)
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

        def undo() -> None:
            model.load_state_dict(state)
            masks.load_words({name: words.words(name) for name in masks.names})

        part, done = epochs / (rounds + 1), 0
        report = None
        if remove:
            loop.train(model, part, masks)
            done, report = 1, measured(part)
        while report is not None and done <= rounds and len(gone) < remove:
            state, words, had = copy.deepcopy(model.state_dict()), masks.clone(), dict(gone)
            most = min(self.guards.max_emptied, remove - len(gone))
            guards = replace(self.guards, max_emptied=most)
            while True:
                prune_round(model, masks, report, sites, fraction, self.strategy, guards)
                if fraction < _LEAST or not scan(model, some, loop.example_inputs).cut:
                    break
                undo()
                fraction /= 2
            loop.train(model, part, masks)
            done += 1
            after = measured(done * part)
            if after.cut:
                note += f"round {done - 1} cut the network ({after.cut_by}) and was undone; "
                undo()
                gone = had
                fraction /= 2
            else:
                report = after
        if done <= rounds:
            loop.train(model, epochs - done * part, masks)
        if note or done <= rounds:
            report = measured(epochs)
        assert report is not None
        if len(gone) < remove:
            note += (
                f"{len(gone)} of {remove} rectifiers at zero entropy with "
                f"{100 * masks.sparsity():.2f} % of the weights pruned"
            )
        note = note.removesuffix("; ")
        states = {row.name: row.state for row in report}
        removed = [
            Removed(name, EMPTY if states[name] == NO_WEIGHTS else ONE_SIDED, epoch)
            for name, epoch in gone.items()
        ]
        return Outcome(model, removed, epochs, history, note)
