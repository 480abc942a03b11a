"""What measuring a model yields: one row per rectifier, and whether the network is cut."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.entropy import Column, layer_entropies
from .sites import Site

MIXED, ONE_SIDED, EMPTY = "mixed", "one-sided", "empty"
UNMEASURED, NONFINITE = "unmeasured", "nonfinite"


@dataclass(frozen=True)
class RectifierEntropy:
    """One rectifier's measurement.

    Attributes:
        entropy: mean H over all neurons in bits; NaN when unmeasured or nonfinite.
        entropy_active: mean H over the neurons with H > 0, in bits.
        on, off, saturated, mixed: number of neurons that were always there (saturated: ReLU6 > 6).
        state: "mixed", "one-sided", "empty", "unmeasured" or "nonfinite".
        zero_entropy: whether every neuron is linear, decided on the integer counts.
        neuron_states: [neurons] uint8, a :class:`layer_collapse.ops.entropy.State` per neuron; None
            when unmeasured.
    """

    name: str
    kind: str
    feeding: str | None
    neurons: int
    positions: int
    entropy: float
    entropy_active: float
    on: int
    off: int
    saturated: int
    mixed: int
    state: str
    candidate: bool
    why_not: str
    way_around: bool
    neuron_states: np.ndarray | None = field(repr=False, compare=False, default=None)

    @property
    def zero_entropy(self) -> bool:
        """Every neuron is linear: the layer's entropy is exactly zero."""
        return self.state in (ONE_SIDED, EMPTY)

    @property
    def constant(self) -> bool:
        """The rectifier's output does not depend on its input: empty, or only flat neurons."""
        flat = self.kind in ("relu", "relu6", "hardswish") and self.off + self.saturated
        return self.state == EMPTY or (self.state == ONE_SIDED and flat == self.neurons)


def measured(
    sites: Sequence[Site], ledgers: Sequence[Tensor], empty: Sequence[bool]
) -> list[RectifierEntropy]:
    """The row of every rectifier, from one reduction of all ledgers.

    Args:
        ledgers: one per site, as :func:`layer_collapse.ops.rectify.new_ledger` lays it out.
        empty: per site, whether every weight of the feeding layer is zero.
    """
    summary, _, states = layer_entropies(
        [ledger.cpu() for ledger in ledgers], [site.kind.code for site in sites]
    )
    per_site = torch.split(states, [site.neurons for site in sites])
    return [
        _row(site, numbers, codes.numpy(), is_empty)
        for site, numbers, codes, is_empty in zip(
            sites, summary.tolist(), per_site, empty, strict=True
        )
    ]


def _row(site: Site, numbers: list[float], codes: np.ndarray, empty: bool) -> RectifierEntropy:
    positions, mixed = int(numbers[Column.POSITIONS]), int(numbers[Column.MIXED])
    if positions == 0 or site.neurons == 0:
        state = UNMEASURED
    elif numbers[Column.NONFINITE]:
        state = NONFINITE
    elif empty:
        state = EMPTY
    else:
        state = ONE_SIDED if site.kind.piecewise_linear and mixed == 0 else MIXED
    return RectifierEntropy(
        name=site.name,
        kind=site.kind.name,
        feeding=site.feeding,
        neurons=site.neurons,
        positions=positions,
        entropy=numbers[Column.ENTROPY],
        entropy_active=numbers[Column.ENTROPY_ACTIVE],
        on=int(numbers[Column.ON]),
        off=int(numbers[Column.OFF]),
        saturated=int(numbers[Column.SATURATED]),
        mixed=mixed,
        state=state,
        candidate=site.candidate,
        why_not=site.why_not,
        way_around=site.way_around,
        neuron_states=codes if positions else None,
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class EntropyReport:
    """Entropy of every rectifier of a model.

    Attributes:
        rows: one per rectifier, in the order of execution.
        cut: the output does not depend on the input: a layer without a way around is constant. Zero
            entropy then says nothing.
        cut_by: what shows it, else "".
        certified: the counts come from :func:`layer_collapse.scan`, an evaluation-mode pass over a
            whole data set with unchanged weights; only such a report lets ``linearize`` act.
        fingerprint: hash of the parameters and buffers at the scan, else "".
        samples: number of samples scanned.
    """

    rows: tuple[RectifierEntropy, ...]
    cut: bool = False
    cut_by: str = ""
    certified: bool = False
    fingerprint: str = ""
    samples: int = 0

    def __iter__(self) -> Iterator[RectifierEntropy]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> RectifierEntropy:
        for row in self.rows:
            if row.name == name:
                return row
        known = ", ".join(row.name for row in self.rows)
        raise KeyError(f"no rectifier is called {name!r}; this model has: {known}")

    @property
    def zero_entropy(self) -> list[str]:
        """Names of the rectifiers of exactly zero entropy; none where the network is cut."""
        return [] if self.cut else [row.name for row in self.rows if row.zero_entropy]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with null for what is not a finite number."""
        rows = []
        for row in self.rows:
            plain = asdict(row)
            del plain["neuron_states"]
            rows.append({key: _finite(value) for key, value in plain.items()})
        return {
            "rectifiers": rows,
            "cut": self.cut,
            "cut_by": self.cut_by,
            "certified": self.certified,
            "fingerprint": self.fingerprint,
            "samples": self.samples,
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        header = (
            "rectifier",
            "kind",
            "feeding layer",
            "neurons",
            "positions",
            "H (bits)",
            "H active",
            "on/off/mixed",
            "state",
        )
        lines = [header]
        for row in self.rows:
            lines.append(
                (
                    row.name,
                    row.kind,
                    row.feeding or "-",
                    str(row.neurons),
                    str(row.positions),
                    f"{row.entropy:.4f}",
                    f"{row.entropy_active:.4f}",
                    f"{row.on + row.saturated}/{row.off}/{row.mixed}",
                    row.state,
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
        text.insert(1, "  ".join("-" * width for width in widths))
        if self.cut:
            text.append(f"CUT: {self.cut_by}; its entropies say nothing.")
        return "\n".join(line.rstrip() for line in text)
