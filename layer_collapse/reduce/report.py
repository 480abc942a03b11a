"""What folding did, what it refused, and the proof in numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx

from ..graph import depth, rectifier_nodes
from .gate import ConstantBias


@dataclass(frozen=True)
class Fold:
    """One accepted fold: the layer that changed or left, the rule, and its largest errors.

    ``max_rel`` is max|a - b| / max|ref|, ref = the computation before this fold in float64.
    """

    name: str
    rule: str
    detail: str
    max_abs: float
    max_rel: float


@dataclass(frozen=True)
class Refusal:
    """One fold that was not made; ``reason`` is a sentence."""

    name: str
    rule: str
    reason: str


@dataclass(frozen=True)
class Size:
    """How large a graph is: longest path of weighted layers, numbers stored, rectifier calls."""

    depth: int
    parameters: int
    rectifiers: int


def size_of(module: fx.GraphModule) -> Size:
    """Size of a graph. Constants that folding left behind count as parameters."""
    constants = [m.value.numel() for m in module.modules() if isinstance(m, ConstantBias)]
    return Size(
        depth=depth(module),
        parameters=sum(p.numel() for p in module.parameters()) + sum(constants),
        rectifiers=len(rectifier_nodes(module)),
    )


@dataclass
class FoldReport:
    """Everything :func:`layer_collapse.reduce.fold.fold` has to say.

    ``max_abs`` and ``max_rel`` compare the folded with the unfolded model end to end, in float64
    with the stored weights; ``checked_sizes`` lists the input shapes on which that was done.
    ``traced_by`` is "fx" or "export" (see :func:`layer_collapse.tracing.trace`).
    """

    before: Size
    after: Size
    folds: list[Fold] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    max_abs: float = 0.0
    max_rel: float = 0.0
    checked_sizes: list[list[list[int]]] = field(default_factory=list)
    traced_by: str = "fx"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        rows = [("layer", "rule", "max abs", "max rel", "what")]
        rows += [
            (f.name, f.rule, f"{f.max_abs:.1e}", f"{f.max_rel:.1e}", f.detail) for f in self.folds
        ]
        rows += [(r.name, r.rule, "refused", "", r.reason) for r in self.refusals]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{'':12}{'before':>12}{'after':>12}",
            *(
                f"{name:12}{getattr(self.before, name):>12,}{getattr(self.after, name):>12,}"
                for name in ("depth", "parameters", "rectifiers")
            ),
            f"traced by torch.{self.traced_by}; "
            f"largest difference end to end: {self.max_abs:.1e} (relative {self.max_rel:.1e})",
            "",
        ]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[4]]).rstrip())
        return "\n".join(lines)
