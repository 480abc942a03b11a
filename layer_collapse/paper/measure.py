"""What is measured of a trained network: one dictionary per cell, the same for every arm."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..graph import ExampleInputs, rectifier_nodes, trace
from ..measure.report import EntropyReport
from ..measure.scan import scan
from ..reduce.fold import fold
from ..reduce.latency import Latency, compare
from ..reduce.linearize import linearize
from ..reduce.report import Size
from ..removal import Outcome
from ..removal.common import measurement
from .loops import Inputs, Part, TrainingLoop, predictions

__all__ = ["measure", "per_sample"]


def measure(
    outcome: Outcome,
    loop: TrainingLoop,
    test: Part,
    whole: nn.Module | None = None,
    latency_batches: tuple[int, ...] = (1, 64),
) -> dict[str, Any]:
    """Linearise what is exactly zero, fold, and measure; the only look at the test split.

    Args:
        whole: the network before anything left it, for the latency; default: as it was trained.
        latency_batches: sizes at which the folded and the whole network run in turns.

    Returns:
        JSON data. ``kinds`` counts the outcome's removals by kind, ``zero`` names the rectifiers
        of exactly zero entropy that were still in the network, by state; ``layers`` counts the
        neurons of each rectifier by what they do; ``changed_predictions`` counts test samples on
        which the folded network answers something else. Multiply-adds are of one sample.
    """
    model = outcome.model
    report = scan(model, loop.batches(), loop.example_inputs)
    found: dict[str, Any] = {
        "cut": report.cut_by if report.cut else "",
        "epochs": outcome.epochs,
        "note": outcome.note,
        "removed": [asdict(one) for one in outcome.removed],
        "layers": _layers(report, model),
        "entropy_history": outcome.entropy_history,
    }
    if report.cut:
        return found
    linear = linearize(model, report, loop.example_inputs)
    folded = fold(linear.model, loop.example_inputs)
    ours, theirs = predictions(folded.model, test), predictions(model, test)
    left = trace(folded.model, loop.example_inputs)
    times = {
        str(size): asdict(_time(whole or model, folded.model, test.take(slice(0, size))))
        for size in latency_batches
    }
    return found | {
        "validation_accuracy": loop.evaluate(folded.model),
        "test_accuracy": _percent(ours, test),
        "unfolded_test_accuracy": _percent(theirs, test),
        "changed_predictions": int((ours != theirs).sum()),
        "test_samples": len(test),
        "kinds": dict(Counter(one.kind for one in outcome.removed)),
        "zero": {r.name: r.state for r in report if r.zero_entropy},
        "rectifiers_left": len(rectifier_nodes(left)),
        "before": per_sample(folded.report.before, loop.example_inputs),
        "after": per_sample(folded.report.after, loop.example_inputs),
        "proof": {"max_abs": folded.report.max_abs, "max_rel": folded.report.max_rel},
        "latency_ms": times,
    }


def _time(whole: nn.Module, folded: nn.Module, inputs: Inputs) -> Latency:
    """Processor time of one thread, in turns: other processes may train meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return compare(whole, folded, inputs, rounds=7, clock=time.process_time)
    finally:
        torch.set_num_threads(threads)


def per_sample(size: Size, example_inputs: ExampleInputs) -> dict[str, int]:
    """A size with the multiply-adds of one sample instead of the batch's."""
    first = next(t for t in tree_leaves(example_inputs) if isinstance(t, Tensor))
    return asdict(size) | {"macs": size.macs // len(first)}


def _percent(answers: Tensor, test: Part) -> float:
    return 100.0 * float((answers == test.y).double().mean())


def _layers(report: EntropyReport, model: nn.Module) -> list[dict[str, Any]]:
    """One entry per rectifier: its neurons by what they do, entropy, sparsity of what feeds it."""
    rectifiers = measurement(0.0, report, model)["rectifiers"]
    return [
        {
            "name": row.name,
            "state": row.state,
            "neurons": row.neurons,
            "on": row.on,
            "off": row.off,
            "saturated": row.saturated,
            "mixed": row.mixed,
            **rectifiers[row.name],
        }
        for row in report
    ]
