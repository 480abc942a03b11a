"""The numbers of the experiments: cells become rows with mean and spread over the seeds."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...paper.cells import Cell, rectifiers_off
from ...paper.networks import NETWORKS, Sizes

__all__ = ["BANDS", "gone", "is_variant", "on_common_seeds", "summary"]

#: Bands of sparsity, each with where it ends.
BANDS = {
    "under 1 %": 0.01,
    "to 90 %": 0.9,
    "to 95 %": 0.95,
    "to 99 %": 0.99,
    "to 99.9 %": 0.999,
    "more": math.inf,
}

Results = Sequence[tuple[Cell, dict[str, Any]]]


def summary(results: Results) -> dict[str, Any]:
    """All that tables and figures show, as JSON data: by network, in the order of the cells."""
    networks: dict[str, list[tuple[Cell, dict[str, Any]]]] = {}
    for cell, result in results:
        networks.setdefault(cell.network, []).append((cell, result))
    return {name: _network(name, found) for name, found in networks.items()}


def is_variant(arm: str) -> bool:
    """Whether it is another arm with one choice changed, for an ablation."""
    return arm.startswith(("continuous-", "drop-", "entropy-")) and not arm[-1].isdigit()


def _network(name: str, found: Results) -> dict[str, Any]:
    groups: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for cell, result in found:
        groups.setdefault((cell.arm, cell.remove), {})[cell.seed] = result
    first = found[0][0]
    whole = next((r["network"] for _, r in found if "network" in r), None)
    shown = [cell for cell, result in found if "layers" in result and cell.seed == 0]
    return {
        "about": NETWORKS[name].about(Sizes(**first.settings["sizes"])),
        "family": NETWORKS[name].family,
        "epochs": {cell.arm: cell.settings["epochs"] for cell, _ in found},
        "whole": whole,
        "before_ms": _before([r["latency_ms"] for _, r in found if "latency_ms" in r]),
        "test_samples": next((r["test_samples"] for _, r in found if "test_samples" in r), None),
        "cpu_minutes": sum(r.get("cpu_seconds", 0.0) for _, r in found) / 60,
        "rows": [_row(arm, asked, group) for (arm, asked), group in groups.items()],
        "correlation": {
            arm: _correlation([r for cell, r in found if (cell.arm, cell.remove) == (arm, asked)])
            for arm, asked in _first_counts(found).items()
        },
        "layers": {
            f"{cell.arm} {cell.remove}": {
                "final": result["layers"],
                "history": result["entropy_history"],
            }
            for cell, result in found
            if cell in shown
        },
    }


def _before(measured: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Milliseconds of the whole network at each batch size, median over the cells."""
    sizes = measured[0] if measured else {}
    return {size: statistics.median(one[size]["before"] for one in measured) for size in sizes}


def _first_counts(found: Results) -> dict[str, int]:
    """How many rectifiers each arm was asked for first; where an arm does not get there, its runs
    at other counts are the same.
    """
    counts: dict[str, int] = {}
    for cell, _ in found:
        counts.setdefault(cell.arm, cell.remove)
    return counts


def _row(arm: str, asked: int, by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One line of the table: an arm at one number of rectifiers asked for, over its seeds."""
    group = list(by_seed.values())
    seeds = {s: r for s, r in by_seed.items() if "n/a" not in r and not r["cut"]}
    whole = list(seeds.values())
    row: dict[str, Any] = {
        "arm": arm,
        "asked": asked,
        "seeds": len(group),
        "whole": len(whole),
        "cut": sum(1 for r in group if r.get("cut")),
        "not_applicable": next((r["n/a"] for r in group if "n/a" in r), ""),
        "notes": list(dict.fromkeys(r["note"] for r in group if r.get("note"))),
    }
    if not whole:
        return row
    states = Counter(state for r in whole for state in r["zero"].values())
    kinds = Counter(one["kind"] for r in whole for one in r["removed"])
    row |= {
        "off": _spread([rectifiers_off(r) for r in whole]),
        "test_accuracy": _spread([r["test_accuracy"] for r in whole]),
        "by_seed": {
            str(seed): {
                "test": r["test_accuracy"],
                "validation": r["validation_accuracy"],
                "off": rectifiers_off(r),
            }
            for seed, r in seeds.items()
        },
        "validation_accuracy": _spread([r["validation_accuracy"] for r in whole]),
        "empty": states["empty"] / len(whole),
        "one_sided": states["one-sided"] / len(whole),
        "kinds": {kind: count / len(whole) for kind, count in kinds.items()},
        "depth": statistics.mean(r["after"]["depth"] for r in whole),
        "macs": statistics.mean(r["after"]["macs"] for r in whole),
        "parameters": statistics.mean(r["after"]["parameters"] for r in whole),
        "changed_predictions": sum(r["changed_predictions"] for r in whole),
        "latency": {
            size: {
                "ms": statistics.median(r["latency_ms"][size]["after"] for r in whole),
                "ratio": _spread(
                    [
                        r["latency_ms"][size]["after"] / r["latency_ms"][size]["before"]
                        for r in whole
                    ]
                ),
            }
            for size in whole[0]["latency_ms"]
        },
        "proof": max(r["proof"]["max_rel"] for r in whole),
    }
    return row


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample deviation; no deviation from one value."""
    return {
        "mean": statistics.mean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def gone(row: dict[str, Any]) -> float:
    """Rectifiers gone; for a shallow network what its original lost. Where that left a rectifier
    that reads another, the scan finds it linear, though no layer is saved by it.
    """
    return float(row["asked"] if row["arm"] == "shallow" else row["off"]["mean"])


def on_common_seeds(
    ours: dict[str, Any], theirs: dict[str, Any], key: str = "test"
) -> list[tuple[float, float]]:
    """Pairs of accuracies (%) of two rows, for every seed that both have."""
    mine, other = ours.get("by_seed", {}), theirs.get("by_seed", {})
    return [(mine[seed][key], other[seed][key]) for seed in mine if seed in other]


def _correlation(group: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Spearman's rank correlation of entropy with sparsity: of layers and measurements together,
    and the median of those of every layer of every seed by itself; mean entropy by bands of
    sparsity. None where nothing was pruned.
    """
    layers: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for number, r in enumerate(group):
        for measured in r.get("entropy_history", []):
            for name, row in measured["rectifiers"].items():
                if row["sparsity"] is not None and row["H"] is not None:
                    layers.setdefault((number, name), []).append((row["sparsity"], row["H"]))
    pairs = [pair for layer in layers.values() for pair in layer]
    if (rho := _rho(pairs)) is None:
        return None
    alone = [found for layer in layers.values() if (found := _rho(layer)) is not None]
    bands: dict[str, list[float]] = {name: [] for name in BANDS}
    for sparsity, entropy in pairs:
        bands[next(name for name, end in BANDS.items() if sparsity < end)].append(entropy)
    return {
        "bands": {name: statistics.mean(found) if found else None for name, found in bands.items()},
        "rho": rho,
        "points": len(pairs),
        "within": statistics.median(alone) if alone else None,
        "layers": len(alone),
    }


def _rho(pairs: list[tuple[float, float]]) -> float | None:
    """None where one of the two does not vary."""
    if len({a for a, _ in pairs}) < 2 or len({b for _, b in pairs}) < 2:
        return None
    first, second = (_ranks(np.array(values)) for values in zip(*pairs, strict=True))
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
