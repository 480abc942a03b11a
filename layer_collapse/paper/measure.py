"""What is measured of a trained network: one dictionary per cell, the same for every arm."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from ..graph import rectifier_nodes, trace
from ..measure.scan import scan
from ..reduce.fold import fold
from ..reduce.latency import compare
from ..reduce.linearize import linearize
from ..removal import Outcome
from .loops import Part, TrainingLoop, accuracy, predictions

__all__ = ["measure"]


def measure(
    outcome: Outcome, loop: TrainingLoop, test: Part, latency_batches: tuple[int, ...] = (1, 64)
) -> dict[str, Any]:
    """Linearise what is exactly zero, fold, and measure; the only look at the test split.

    Args:
        latency_batches: sizes at which folded and unfolded run in turns.

    Returns:
        JSON data. ``kinds`` counts the outcome's removals by kind, ``zero`` names the rectifiers
        of exactly zero entropy that were still in the network, by state; ``changed_predictions``
        counts test samples on which the folded network answers something else.
    """
    model = outcome.model
    report = scan(model, loop.batches(), loop.example_inputs)
    if report.cut:
        return {"cut": report.cut_by, "epochs": outcome.epochs, "note": outcome.note}
    linear = linearize(model, report, loop.example_inputs)
    folded = fold(linear.model, loop.example_inputs)
    ours, theirs = predictions(folded.model, test), predictions(model, test)
    left = trace(folded.model, loop.example_inputs)
    times = {
        str(size): asdict(compare(model, folded.model, test.take(slice(0, size))))
        for size in latency_batches
    }
    return {
        "cut": "",
        "epochs": outcome.epochs,
        "note": outcome.note,
        "validation_accuracy": loop.evaluate(folded.model),
        "test_accuracy": accuracy(folded.model, test),
        "unfolded_test_accuracy": accuracy(model, test),
        "changed_predictions": int((ours != theirs).sum()),
        "test_samples": len(test),
        "removed": [asdict(one) for one in outcome.removed],
        "kinds": dict(Counter(one.kind for one in outcome.removed)),
        "zero": {r.name: r.state for r in report if r.zero_entropy},
        "rectifiers_left": len(rectifier_nodes(left)),
        "before": asdict(folded.report.before),
        "after": asdict(folded.report.after),
        "proof": {"max_abs": folded.report.max_abs, "max_rel": folded.report.max_rel},
        "latency_ms": times,
        "entropy_history": outcome.entropy_history,
    }
