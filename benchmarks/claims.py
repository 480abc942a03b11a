"""What the benchmarks must show: every claim with its peer and its bar, and the rule that decides.

A claim holds at a thread count if the geometric mean over its cases is at most its bar and no case
is above its worst. A claim without a bar is reported only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Claim:
    """One line of the summary.

    Attributes:
        title: what ours is.
        peer: what it is measured against.
        bar: limit of the mean over the cases; None: no limit.
        worst: limit of every single case; None: the mean decides alone.
        unit: "ratio", ours over the peer; or "us", ours minus the peer in microseconds.
    """

    title: str
    peer: str
    bar: float | None = None
    worst: float | None = None
    unit: str = "ratio"


_HOOKED = "Forward pass of a rectifier with counts"
_EVALUATION = "Evaluation pass, tracked"
_SELECTION = "Selection among 20 M weights"

CLAIMS: Mapping[str, Claim] = {
    "relu_f32": Claim("ReLU + counts, f32, 4 MB and more", "torch's, out of place", 1.00, 1.10),
    "relu_f32_inplace": Claim("ReLU + counts, f32, 4 MB and more", "torch's, in place", 1.00, 1.20),
    "relu_bf16": Claim("ReLU + counts, bf16, 4 MB and more", "torch's, out of place", 0.90, 1.00),
    "relu_bf16_inplace": Claim(
        "ReLU + counts, bf16, 4 MB and more", "torch's, in place", 0.90, 1.00
    ),
    "relu_small": Claim("ReLU + counts, f32, 64 KB to 4 MB", "torch's, out of place", 1.10, 1.30),
    "compile_small": Claim("ReLU + counts, up to 4 MB", "torch.compile of relu + sum", 0.50),
    "compile_large": Claim("ReLU + counts, 32 MB", "torch.compile of relu + sum", 0.90),
    "hook_signs": Claim(_HOOKED, "hook (z > 0).sum"),
    "hook_egp": Claim(_HOOKED, "EGP hook", 0.15),
    "hook_easier": Claim(_HOOKED, "EASIER hook", 0.25),
    "bn_forward": Claim("BN + ReLU + counts, forward", "eager BN, ReLU", 0.45),
    "bn_both": Claim("BN + ReLU + counts, forward + backward", "eager BN, ReLU", 0.60),
    "step_resnet": Claim("ResNet-18 training step, tracked", "untracked", 1.03),
    "step_resnet_bn": Claim("ResNet-18 training step, BN fused", "untracked", 1.00),
    "step_transformers": Claim("ViT and encoder training step, tracked", "untracked", 1.02),
    "step_ddp": Claim("Step on 2 processes, tracked, MaskedSGD", "DDP, SGD(fused=True)", 1.02),
    "evaluation": Claim(_EVALUATION, "untracked", 1.01),
    "evaluation_bn": Claim("Evaluation pass of ResNet-18, BN fused", "untracked", 1.01),
    "evaluation_egp": Claim(_EVALUATION, "EGP hooks"),
    "evaluation_easier": Claim(_EVALUATION, "EASIER hooks"),
    "sgd_dense": Claim("MaskedSGD, nothing pruned", "SGD(fused=True)", 1.02),
    "sgd_95": Claim("MaskedSGD, 95 % pruned", "SGD(fused=True)", 0.88),
    "sgd_99": Claim("MaskedSGD, 99 % pruned", "SGD(fused=True)", 0.25),
    "sgd_rows": Claim("MaskedSGD, 95 % pruned as whole rows", "SGD(fused=True)", 0.08),
    "sgd_foreach": Claim("MaskedSGD, 95 % pruned", "SGD(foreach=True)"),
    "sgd_multiplied": Claim("MaskedSGD, 95 % pruned", "SGD(fused=True), p.mul_(mask)"),
    "sgd_reparametrised": Claim("MaskedSGD, 95 % pruned", "torch.nn.utils.prune"),
    "adamw_dense": Claim("MaskedAdamW, nothing pruned", "AdamW(fused=True)", 1.02),
    "adamw_95": Claim("MaskedAdamW, 95 % pruned", "AdamW(fused=True)", 0.95),
    "adamw_99": Claim("MaskedAdamW, 99 % pruned", "AdamW(fused=True)", 0.35),
    "adamw_rows": Claim("MaskedAdamW, 95 % pruned as whole rows", "AdamW(fused=True)", 0.10),
    "adamw_foreach": Claim("MaskedAdamW, 95 % pruned", "AdamW(foreach=True)"),
    "adamw_multiplied": Claim("MaskedAdamW, 95 % pruned", "AdamW(fused=True), p.mul_(mask)"),
    "adamw_reparametrised": Claim("MaskedAdamW, 95 % pruned", "torch.nn.utils.prune"),
    "selection_kthvalue": Claim(_SELECTION, "kthvalue", 0.04),
    "selection_topk": Claim(_SELECTION, "topk", 0.04),
    "selection_sort": Claim(_SELECTION, "sort"),
    "call": Claim("Tracked rectifier on 64 floats, eager training", "nn.ReLU", 4.0, unit="us"),
    "live": Claim("Tracking with live entropy", "tracking without"),
    "overhead": Claim("ReLU + counts by size", "torch's, out of place"),
    "overhead_inplace": Claim("ReLU + counts by size", "torch's, in place"),
}


def within(value: float, limit: float | None) -> bool:
    return limit is None or value <= limit


def mean(values: Iterable[float], unit: str) -> float:
    """The geometric mean of ratios; the mean of differences, which may be negative."""
    values = list(values)
    if unit == "us":
        return math.fsum(values) / len(values)
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def verdicts(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per claim and thread count that has rows, in the order of ``CLAIMS``.

    ``spread`` is the lowest and the highest mean that a pass over the cases gave.
    """
    measured: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        measured.setdefault((row["claim"], row["threads"]), []).append(row)
    entries = []
    for key, claim in CLAIMS.items():
        for _, threads in sorted(found for found in measured if found[0] == key):
            cases = measured[key, threads]
            values = [case["value"] for case in cases]
            average, worst = mean(values, claim.unit), max(values)
            passes = zip(*(case["passes"] for case in cases), strict=True)
            means = [mean(values_of_pass, claim.unit) for values_of_pass in passes]
            holds = within(average, claim.bar) and within(worst, claim.worst)
            entries.append(
                {"claim": key, "title": claim.title, "peer": claim.peer, "threads": threads}
                | {"unit": claim.unit, "cases": len(values), "mean": average, "highest": worst}
                | {"spread": [min(means), max(means)]}
                | {"bar": claim.bar, "worst": claim.worst}
                | {"holds": None if claim.bar is None else holds}
            )
    return entries
