"""Batch norms whose statistics are those of channels that have died since."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..graph import BATCH_NORM, training_mode
from ..measure.scan import Batch, call_model


def refresh_batch_norm(
    model: nn.Module, data: Iterable[Batch], *, every: bool = False
) -> list[str]:
    """Compute running statistics anew, as the average over the batches of ``data``; in place.

    Right after a filter has lost its weights its batch norm still subtracts the mean of what the
    filter used to give: gamma (x - mean) / sqrt(var + eps) + beta has any sign, where training
    would make it beta. Whoever reads signs, or means, refreshes first.

    Args:
        model: everything but the batch norms in question runs in evaluation mode.
        data: batches as for :func:`layer_collapse.scan`, iterated twice; each with more than one
            value per channel.
        every: all batch norms; by default those that read a channel which is the same for all
            samples and positions.

    Returns:
        The paths of the batch norms with new statistics.
    """
    norms: dict[str, nn.Module] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BATCH_NORM) and module.running_mean is not None
    }
    if not every:
        constant = _reading_constants(model, norms, data)
        norms = {path: norm for path, norm in norms.items() if path in constant}
    if norms:
        with training_mode(model, False), _cumulative(list(norms.values())):
            _run(model, data)
    return list(norms)


@contextmanager
def _cumulative(norms: list[nn.Module]) -> Iterator[None]:
    """Batch norms in training mode that average over all batches alike; undone where one fails."""
    momentum = [norm.momentum for norm in norms]
    own = [{name: t.clone() for name, t in norm.named_buffers()} for norm in norms]
    for norm in norms:
        norm.reset_running_stats()  # type: ignore[operator]
        norm.momentum = None  # type: ignore[assignment]
        norm.train()
    try:
        yield
    except BaseException:
        for norm, tensors in zip(norms, own, strict=True):
            for name, tensor in tensors.items():
                getattr(norm, name).copy_(tensor)
        raise
    finally:
        for norm, was in zip(norms, momentum, strict=True):
            norm.momentum = was


def _reading_constants(
    model: nn.Module, norms: dict[str, nn.Module], data: Iterable[Batch]
) -> set[str]:
    """Batch norms with an input channel that never changes over the data."""
    least: dict[str, Tensor] = {}
    most: dict[str, Tensor] = {}

    def watch(path: str, x: Tensor) -> None:
        rows = x.detach().transpose(0, 1).flatten(1)
        low, high = rows.amin(dim=1), rows.amax(dim=1)
        least[path] = torch.minimum(least[path], low) if path in least else low
        most[path] = torch.maximum(most[path], high) if path in most else high

    hooks = [
        norm.register_forward_pre_hook(lambda _, args, path=path: watch(path, args[0]))
        for path, norm in norms.items()
    ]
    try:
        with training_mode(model, False):
            _run(model, data)
    finally:
        for hook in hooks:
            hook.remove()
    return {path for path in least if bool((least[path] == most[path]).any())}


def _run(model: nn.Module, data: Iterable[Batch]) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        for batch in data:
            call_model(model, batch, device)
