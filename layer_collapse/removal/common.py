"""What several strategies share: arguments, a few samples, the history of entropies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..measure.report import EntropyReport
from ..measure.scan import Batch

__all__ = ["check_arguments", "few", "measurement"]


def check_arguments(name: str, epochs: float, remove: int) -> None:
    """Raises ValueError unless ``epochs`` is above 0 and finite and ``remove`` is 0 or more."""
    if not 0 < epochs < math.inf:
        raise ValueError(f"{name}: expected epochs above 0 (got {epochs})")
    if remove < 0:
        raise ValueError(f"{name}: expected 0 or more rectifiers to remove (got {remove})")


def few(batches: Iterable[Batch], samples: int) -> list[Batch]:
    """The first ``samples`` samples in their batches, or all there are.

    Raises:
        ValueError: there is no batch.
    """
    chosen: list[Batch] = []
    for batch in batches:
        if samples <= 0:
            break
        size = _size(batch)
        chosen.append(batch if size <= samples else _cut(batch, size, samples))
        samples -= size
    if not chosen:
        raise ValueError("expected data to measure on (got no batch); pass at least one")
    return chosen


def _size(batch: Batch) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch
    tensors = [batch] if isinstance(batch, Tensor) else [v for v in values if torch.is_tensor(v)]
    return len(tensors[0]) if tensors else 0


def _cut(value: Any, size: int, samples: int) -> Any:
    """A batch of ``size`` samples with the first of them only."""
    if isinstance(value, Mapping):
        return {key: _cut(v, size, samples) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return [_cut(v, size, samples) for v in value]
    return value[:samples] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value


def measurement(epoch: float, report: EntropyReport, model: nn.Module) -> dict[str, Any]:
    """One entry of ``Outcome.entropy_history``."""
    rows = {}
    for row in report:
        sparsity = None
        if row.feeding is not None:
            weight = model.get_submodule(row.feeding).weight
            if isinstance(weight, Tensor) and weight.numel():
                sparsity = 1.0 - int(weight.detach().count_nonzero()) / weight.numel()
        entropy = row.entropy if math.isfinite(row.entropy) else None
        rows[row.name] = {"H": entropy, "sparsity": sparsity}
    return {"epoch": epoch, "rectifiers": rows}
