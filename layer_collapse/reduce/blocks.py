"""Residual branches that hardly matter leave as a whole: by measurement, and never silently.

A branch of a residual sum is replaced by its mean, a constant per channel. Unlike folding this
changes the function, by as much as the user allows and by as much as the result says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph import ExampleInputs, ordered_inputs, record_shapes, trace, training_mode
from ..measure.scan import Batch, call_model, logits_of
from .branches import Branch, branches
from .gate import ConstantBias
from .holdings import own_copy, remove_dead
from .refresh import refresh_batch_norm


@dataclass(frozen=True)
class Block:
    """One residual branch.

    Attributes:
        name: its last module.
        layers: all modules that it alone consists of.
        contribution: rms(branch - its mean) / rms(stream + branch) over the data; NaN where it was
            not measured.
        removed: whether its mean took its place.
        reason: why it stayed, else "".
    """

    name: str
    layers: tuple[str, ...]
    contribution: float
    removed: bool
    reason: str = ""


@dataclass
class BlockRemoval:
    """What :func:`remove_blocks` returns.

    Attributes:
        model: graph module in evaluation mode; names of what stays are those of the original.
        rows: every residual sum, in the order of execution.
        refreshed: batch norms whose statistics were computed anew first.
        max_change, rms_change: of the logits over all data, against the model as it was given.
        rms_logits: of the model as it was given, for comparison.
        accuracy_before, accuracy_after: what ``accuracy`` said, or None.
    """

    model: fx.GraphModule
    rows: list[Block]
    refreshed: tuple[str, ...]
    max_change: float
    rms_change: float
    rms_logits: float
    accuracy_before: float | None = None
    accuracy_after: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as plain data."""
        plain = {name: value for name, value in vars(self).items() if name != "model"}
        return plain | {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows], default=0)
        lines = [
            f"{row.name:{width}}  {row.contribution:9.3g}  {row.reason or 'replaced by its mean'}"
            for row in self.rows
        ]
        lines.append(
            f"logits changed by at most {self.max_change:.3g}, rms {self.rms_change:.3g} of "
            f"{self.rms_logits:.3g}"
        )
        if self.refreshed:
            lines.append(f"batch norms refreshed first: {', '.join(self.refreshed)}")
        if self.accuracy_before is not None:
            lines.append(
                f"accuracy {self.accuracy_before:.4g} before, {self.accuracy_after:.4g} after"
            )
        return "\n".join(lines)


def remove_blocks(
    model: nn.Module,
    data: Iterable[Batch],
    example_inputs: ExampleInputs,
    *,
    tolerance: float,
    accuracy: Callable[[nn.Module], float] | None = None,
    refresh: bool = True,
) -> BlockRemoval:
    """Replace residual branches that contribute less than ``tolerance`` by their means.

    A branch is the summand of ``stream + branch`` that is computed from the stream; where neither
    summand is the other's stream (a shortcut that changes the shape) nothing leaves. The mean is
    one number per channel, over all samples and positions. All branches are measured in one pass,
    before any leaves.

    Args:
        model: any model that can be traced; it is not changed.
        data: batches as for :func:`layer_collapse.scan`; iterated several times.
        example_inputs: as for :func:`layer_collapse.fold`.
        tolerance: largest contribution that may leave, rms(branch - mean) / rms(stream + branch);
            0 takes constant branches alone.
        accuracy: measures a model; called before and after.
        refresh: first compute the statistics anew of batch norms that read constant channels, see
            :func:`refresh_batch_norm`.

    Raises:
        ValueError: a tolerance below 0, no data, or data that can be iterated only once.
        TraceError: the model cannot be traced.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"remove_blocks: expected a tolerance of 0 or more (got {tolerance})")
    if iter(data) is data:
        raise ValueError(
            "remove_blocks: expected data that can be iterated again (got an iterator); pass a "
            "list or a DataLoader"
        )
    copied = own_copy(model).eval()
    refreshed = refresh_batch_norm(copied, data) if refresh else []
    if isinstance(copied, fx.GraphModule):
        record_shapes(copied, example_inputs)
    graph = copied if isinstance(copied, fx.GraphModule) else trace(copied, example_inputs)
    found = list(branches(graph))
    measured = _measured(graph, [b for b in found if not b.reason], data)
    rows = []
    for branch in found:
        contribution, mean = measured.get(branch.sum, (math.nan, None))
        reason = branch.reason
        if mean is not None and not contribution <= tolerance:
            reason = f"above the tolerance of {tolerance:g}"
        elif mean is not None:
            _replace(graph, branch, mean)
        rows.append(Block(branch.name, branch.layers, contribution, not reason, reason))
    remove_dead(graph)
    graph.graph.lint()
    graph.recompile()
    change = _compared(model, graph, data)
    before = None if accuracy is None else accuracy(model)
    after = None if accuracy is None else accuracy(graph)
    return BlockRemoval(graph, rows, tuple(refreshed), *change, before, after)


class _Sums:
    """Of one branch: what its contribution and its mean are computed from, in float64."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self.total: Tensor | float = 0.0  # [C]
        self.squares = 0.0  # of the branch
        self.whole = 0.0  # squares of stream + branch

    def see(self, stream: Tensor, branch: Tensor) -> None:
        stream, branch = stream.detach().double(), branch.detach().double()
        rows = branch.movedim(self.dim, 0).flatten(1)
        self.count += rows.shape[1]
        self.total = self.total + rows.sum(dim=1)
        self.squares += float(rows.square().sum())
        self.whole += float((stream + branch).square().sum())

    def result(self) -> tuple[float, Tensor]:
        """The contribution and the mean [C]."""
        assert isinstance(self.total, Tensor)
        mean = self.total / self.count
        varying = max(self.squares - self.count * float(mean.square().sum()), 0.0)
        # What float64 cannot tell from a constant is one.
        varying = 0.0 if varying <= 1e-13 * self.squares else varying
        whole = math.sqrt(self.whole)
        return (math.sqrt(varying) / whole if whole else 0.0), mean


class _Watching(fx.Interpreter):
    """Runs a graph and shows the summands to those who measure them."""

    def __init__(self, graph: fx.GraphModule, sums: Mapping[fx.Node, tuple[Branch, _Sums]]):
        super().__init__(graph)
        self.sums = sums

    def run_node(self, n: fx.Node) -> Any:
        if n in self.sums:
            branch, seen = self.sums[n]
            seen.see(self.env[branch.stream], self.env[branch.branch])
        return super().run_node(n)


def _measured(
    graph: fx.GraphModule, found: list[Branch], data: Iterable[Batch]
) -> dict[fx.Node, tuple[float, Tensor]]:
    """Contribution and mean of each branch over the data, by its sum."""
    sums = {branch.sum: (branch, _Sums(branch.dim)) for branch in found}
    watching = _Watching(graph, sums)
    device = next((p.device for p in graph.parameters()), torch.device("cpu"))
    empty = True
    with torch.no_grad():
        for batch in data:
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            if isinstance(inputs, Mapping):
                inputs = {key: value for key, value in inputs.items() if key != "labels"}
            given = ordered_inputs(graph, inputs)
            watching.run(*(v.to(device) if isinstance(v, Tensor) else v for v in given))
            empty = False
    if empty:
        raise ValueError("remove_blocks: expected data (got no batch); pass at least one")
    return {node: seen.result() for node, (_, seen) in sums.items()}


def _replace(graph: fx.GraphModule, found: Branch, mean: Tensor) -> None:
    """``stream + branch`` becomes ``stream + mean``."""
    number = 0
    while hasattr(graph, path := f"mean_of_branch_{number}"):
        number += 1
    meta = found.sum.meta["tensor_meta"]
    behind = [1] * (len(meta.shape) - found.dim - 1)
    graph.add_submodule(path, ConstantBias(mean.view(-1, *behind).to(meta.dtype)).eval())
    with graph.graph.inserting_before(found.sum):
        constant = graph.graph.call_module(path, (found.stream,))
    constant.meta = dict(found.sum.meta)
    found.sum.replace_all_uses_with(constant)


def _compared(
    model: nn.Module, changed: nn.Module, data: Iterable[Batch]
) -> tuple[float, float, float]:
    """Largest and rms change of the logits, and their rms."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    largest = changes = squares = 0.0
    count = 0
    with training_mode(model, False), torch.no_grad():
        for batch in data:
            was = logits_of(call_model(model, batch, device)).double()
            gap = logits_of(call_model(changed, batch, device)).double() - was
            largest = max(largest, float(gap.abs().max())) if gap.numel() else largest
            changes += float(gap.square().sum())
            squares += float(was.square().sum())
            count += was.numel()
    return largest, math.sqrt(changes / max(count, 1)), math.sqrt(squares / max(count, 1))
