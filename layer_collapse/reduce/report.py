"""What folding did, what it refused, and the proof in numbers."""

from __future__ import annotations

import copy
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..graph import depth, rectifier_nodes
from ..tracing.hooks import without_hooks
from .gate import ConstantBias
from .holdings import sharing_copy
from .latency import Latency


@dataclass(frozen=True)
class Fold:
    """One accepted fold: the layer that changed or left, the rule, and its largest errors.

    ``max_rel`` is max|a - b| / max|ref|, ref = the computation before this fold in float64.
    ``before_ms`` and ``after_ms`` are the medians by which a merge of two layers was chosen, None
    where it was not timed.
    """

    name: str
    rule: str
    detail: str
    max_abs: float
    max_rel: float
    before_ms: float | None = None
    after_ms: float | None = None


@dataclass(frozen=True)
class Refusal:
    """One fold that was not made; ``reason`` is a sentence."""

    name: str
    rule: str
    reason: str


@dataclass(frozen=True)
class Size:
    """How large a graph is.

    Attributes:
        depth: weighted layers on the longest path.
        parameters: numbers stored.
        rectifiers: calls of rectifiers.
        macs: multiply-adds of one pass over the example inputs, the whole batch, as
            :class:`torch.utils.flop_counter.FlopCounterMode` counts them: matrix products,
            convolutions and attention; nothing that works on single elements.
    """

    depth: int
    parameters: int
    rectifiers: int
    macs: int


def size_of(module: fx.GraphModule, inputs: list[Any]) -> Size:
    """Size of a graph that is run once. Constants that folding left behind are parameters.

    Args:
        inputs: values of its placeholders.
    """
    constants = [m.value.numel() for m in module.modules() if isinstance(m, ConstantBias)]
    return Size(
        depth=depth(module),
        parameters=sum(p.numel() for p in module.parameters()) + sum(constants),
        rectifiers=len(rectifier_nodes(module)),
        macs=_macs(module, inputs),
    )


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


#: The one kernel of attention that torch's own table leaves out.
_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def _macs(module: fx.GraphModule, inputs: list[Any]) -> int:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its kernels are not counted
    try:
        try:
            shapes = FakeTensorMode(allow_non_fake_inputs=True)
            copied = sharing_copy(module)
            with without_hooks(list(copied.modules())):  # which would meet tensors without values
                counter = _counted(copied, inputs, shapes)
        except Exception:  # modules that look at their values: they are run
            counter = _counted(module, copy.deepcopy(inputs), nullcontext())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


def _counted(
    module: fx.GraphModule, inputs: list[Any], fake: AbstractContextManager[Any]
) -> FlopCounterMode:
    counter = FlopCounterMode(display=False, custom_mapping=_ON_CPU)
    with torch.no_grad(), fake, counter:
        module(*inputs)
    return counter


def _what(fold: Fold) -> str:
    if fold.before_ms is None or fold.after_ms is None:
        return fold.detail
    return f"{fold.detail} ({fold.before_ms:.3g} -> {fold.after_ms:.3g} ms)"


@dataclass
class FoldReport:
    """Everything :func:`layer_collapse.reduce.fold.fold` has to say.

    ``max_abs`` and ``max_rel`` compare the folded with the unfolded model end to end, in float64
    with the stored weights; ``checked_sizes`` lists the input shapes on which that was done, none
    where ``proven`` is False or nothing was folded. ``latency`` is for who folds to
    fill in: of the whole model
    (:func:`layer_collapse.reduce.latency.compare`). ``traced_by`` is "fx" or "export" (see
    :func:`layer_collapse.tracing.trace`). ``only_sizes``: shapes of the inputs, without the batch,
    where a fold holds for these (or for larger ones on which strides end alike) only, and always of
    a graph of torch.export; the folded network raises ValueError at others.
    """

    before: Size
    after: Size
    folds: list[Fold] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    max_abs: float = 0.0
    max_rel: float = 0.0
    checked_sizes: list[list[list[int]]] = field(default_factory=list)
    proven: bool = True
    latency: Latency | None = None
    traced_by: str = "fx"
    only_sizes: list[list[int]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        rows = [("layer", "rule", "max abs", "max rel", "what")]
        rows += [
            (f.name, f.rule, f"{f.max_abs:.1e}", f"{f.max_rel:.1e}", _what(f)) for f in self.folds
        ]
        rows += [(r.name, r.rule, "refused", "", r.reason) for r in self.refusals]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{'':12}{'before':>12}{'after':>12}",
            *(
                f"{name:12}{getattr(self.before, name):>12,}{getattr(self.after, name):>12,}"
                for name in ("depth", "parameters", "rectifiers", "macs")
            ),
            f"traced by torch.{self.traced_by}",
        ]
        if self.latency is not None:
            measured = f"batch {self.latency.batch}, {self.latency.threads} threads"
            times = f"{self.latency.before:>12.3f}{self.latency.after:>12.3f}"
            lines.append(f"{'latency, ms':12}{times} ({measured})")
        end = f"largest difference end to end: {self.max_abs:.1e} (relative {self.max_rel:.1e})"
        if not self.proven:
            end = "not compared end to end: only every fold by itself is proven"
        lines.append(end)
        if self.only_sizes is not None:
            shapes = ", ".join(str(["N", *shape]).replace("'", "") for shape in self.only_sizes)
            lines.append(f"for inputs of shape {shapes} only: the network refuses others")
        lines.append("")
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[4]]).rstrip())
        return "\n".join(lines)
