"""Everything that removal during one run decides by, and the one configuration of each family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from ..graph import BATCH_NORM

__all__ = ["DROP", "DROPS", "FAMILIES", "FORMS", "ROUNDS", "SCORES", "Settings", "family_of"]

SCORES = ("loss x entropy", "loss", "entropy", "random")
FORMS = ("constant", "linear")


@dataclass(frozen=True)
class Settings:
    """How rectifiers leave during a run.

    Attributes:
        score: the lowest leaves next. "loss": by how much the loss grows when it has left, 0 where
            it falls. "entropy": mean entropy of its neurons in bits over the last steps. "loss x
            entropy": their product. "random": any.
        forms: "constant": a branch becomes the mean of its output (see
            :mod:`layer_collapse.removal.units`); "linear": a rectifier becomes the affine gate that
            fits it best. In order of preference.
        most: the next form is taken where the best that leaves in this one makes the loss grow by
            more than this share of what it is, or where nothing is left in this one.
        start, end: shares of the run between which rectifiers leave, each in its equal part.
        moves: in how many steps of equal size one leaves; 0: at once, at the start of its part.
    """

    score: str = "loss x entropy"
    forms: tuple[str, ...] = ("linear",)
    most: float = math.inf
    start: float = 0.15
    end: float = 0.6
    moves: int = 10

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)} (got {self.score!r})")
        if not self.forms or set(self.forms) - set(FORMS):
            raise ValueError(f"forms must be some of {', '.join(FORMS)} (got {self.forms})")
        if not self.most >= 0:
            raise ValueError(f"most must be 0 or more (got {self.most})")
        if not 0 <= self.start <= self.end <= 1 or self.moves < 0:
            raise ValueError(
                "expected 0 <= start <= end <= 1 and moves >= 0 (got "
                f"{self.start}, {self.end}, {self.moves})"
            )


#: Of the strong baseline: greedily by the loss alone, all at once; no pruning and no entropy.
DROP = Settings(score="loss", forms=("constant",), start=0.3, end=0.3, moves=0)

#: When ``drop`` drops, as a share of the run, by family: with the best validation accuracy in
#: ``python -m layer_collapse.paper.tune rivals`` (docs/results/rivals.json), as below.
DROPS: Mapping[str, float] = {"cnn": 0.05, "vit": 0.15, "nlp": 0.15}

#: Rounds of iterative pruning, and the fraction of each, by family: of those that emptied what was
#: asked.
ROUNDS: Mapping[str, tuple[int, float]] = {"cnn": (5, 0.8), "vit": (8, 0.7), "nlp": (5, 0.8)}

_MIXED = Settings(forms=("constant", "linear"), most=0.25, start=0.05, end=0.4)

#: Of ``continuous``, by family; ``python -m layer_collapse.paper.tune`` chose it on other networks
#: (docs/results/tuning.json).
FAMILIES: Mapping[str, Settings] = {
    "cnn": _MIXED,
    "vit": replace(_MIXED, start=0.15, end=0.6),
    "nlp": _MIXED,
}


def family_of(model: nn.Module) -> str:
    """ "cnn" for a network with batch norms, "nlp" for one with embeddings, else "vit"."""
    modules = list(model.modules())
    if any(isinstance(m, BATCH_NORM) for m in modules):
        return "cnn"
    return "nlp" if any(isinstance(m, nn.Embedding) for m in modules) else "vit"
