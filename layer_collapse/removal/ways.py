"""The two ways out of a network: as a constant, or as an affine gate. Both change it in place.

Names, ``state_dict`` keys (but for a gate's) and the optimiser stay as they are. Neither way is
exact: the network goes on training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..graph import training_mode
from ..measure.scan import Batch, call_model
from ..measure.valid import positions_mask
from ..prune.masks import Masks
from ..reduce.gate import AffineGate
from ..reduce.layers import channel_dim
from ..reduce.refresh import refresh_batch_norm
from .base import CONSTANT, EMPTY, LINEARISED
from .units import Unit

__all__ = ["AsConstant", "AsGate", "Fading", "Way", "output_means"]


class Way(Protocol):
    """How one or more rectifiers leave."""

    rectifiers: tuple[str, ...]

    @property
    def kind(self) -> str:
        """As :class:`~layer_collapse.removal.Removed` has it."""
        ...

    def momentarily(self, model: nn.Module) -> Any:
        """Context in which they have left, and after which nothing has changed."""
        ...

    def begin(self, model: nn.Module) -> None:
        """They start to leave."""
        ...

    def move(self, share: float) -> None:
        """Be ``share`` (0 to 1) of the way out; called after every optimizer step."""
        ...

    def end(self, model: nn.Module, data: Sequence[Batch]) -> None:
        """Leave for good."""
        ...


class AsConstant:
    """A branch is emptied and its output becomes the mean of what it was.

    On the way the weights of the feeding layers go, within each layer the smallest |w| first. At
    the end those of the exit are 0 as well and frozen, so that no momentum and no weight decay
    moves them; its bias trains on.
    """

    def __init__(self, unit: Unit, mean: Tensor) -> None:
        self.unit = unit
        self.rectifiers = unit.rectifiers
        self.mean = mean
        self.masks: Masks | None = None

    @property
    def kind(self) -> str:
        """ "empty" if its weights left one after another, "constant" if it was cut at once."""
        return CONSTANT if self.masks is None else EMPTY

    @contextmanager
    def momentarily(self, model: nn.Module) -> Iterator[None]:
        """The exit gives its mean."""

        def constant(module: nn.Module, args: object, output: Tensor) -> Tensor:
            shape = [1] * output.ndim
            shape[channel_dim(module, output.ndim) or 0] = -1
            return self.mean.to(output).view(shape).expand_as(output)

        hook = model.get_submodule(self.unit.exit).register_forward_hook(constant)
        try:
            yield
        finally:
            hook.remove()

    def begin(self, model: nn.Module) -> None:
        """From now on the feeding layers lose weights."""
        weights = {f"{p}.weight": model.get_parameter(f"{p}.weight") for p in self.unit.feeding}
        self.masks = Masks(weights) if weights else None

    def move(self, share: float) -> None:
        """So many of the feeding weights are gone, and what the optimizer revived of them."""
        if self.masks is None:
            return
        total = {name: self.masks.bool_mask(name).numel() for name in self.masks.names}
        missing = {
            n: round(share * size) - (size - self.masks.alive(n)) for n, size in total.items()
        }
        if any(count > 0 for count in missing.values()):
            self.masks.prune_({name: max(0, count) for name, count in missing.items()})
        else:
            self.masks.apply_()

    @torch.no_grad()
    def end(self, model: nn.Module, data: Sequence[Batch]) -> None:
        """Cut: what was the branch's mean, in training as in evaluation, is its output."""
        for path in self.unit.feeding:
            _freeze_at_zero(model.get_parameter(f"{path}.weight"))
        if self.masks is not None:  # what the branch gives now, not what it gave when it was whole
            refresh_batch_norm(model, data)  # of the whole branch, as training sees it
            self.mean = output_means(model, [self.unit.exit], data)[self.unit.exit]
        _freeze_at_zero(model.get_parameter(f"{self.unit.exit}.weight"))
        bias = model.get_parameter(f"{self.unit.exit}.bias")
        bias.copy_(self.mean)


def _freeze_at_zero(parameter: nn.Parameter) -> None:
    parameter.zero_()
    parameter.requires_grad_(False)
    parameter.grad = None  # an optimizer leaves alone what has no gradient


class Fading(nn.Module):
    """A rectifier on its way to its affine gate: ``(1 - share) act(z) + share gate(z)``.

    As Dror et al., "Layer Folding" (arXiv 2106.09309), turn ReLU into the identity, but towards the
    gate that fits the data, and by the clock instead of by a learned slope.
    """

    def __init__(self, act: nn.Module, gate: AffineGate) -> None:
        super().__init__()
        self.act = act
        self.gate = gate
        self.share = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """``x``: any shape that the gate takes; returns the same shape and dtype."""
        linear = self.gate(x)  # first: the rectifier may work in place
        return torch.lerp(self.act(x), linear, self.share)


class AsGate:
    """A rectifier becomes the affine function per neuron that comes closest to it on the data.

    Least squares over the positions measured, :func:`layer_collapse.fit_gates`. A folded network
    merges the layers before and behind it where that can be exact.
    """

    def __init__(self, name: str, path: str, gate: AffineGate) -> None:
        self.rectifiers: tuple[str, ...] = (name,)
        self.path = path
        self.gate = gate
        self.kind = LINEARISED

    @contextmanager
    def momentarily(self, model: nn.Module) -> Iterator[None]:
        """The gate stands in the rectifier's place."""
        rectifier = model.get_submodule(self.path)
        model.set_submodule(self.path, self.gate)
        try:
            yield
        finally:
            model.set_submodule(self.path, rectifier)

    def begin(self, model: nn.Module) -> None:
        """The rectifier is still all of itself."""
        self.fading = Fading(model.get_submodule(self.path), self.gate)
        model.set_submodule(self.path, self.fading)

    def move(self, share: float) -> None:
        """So much of the output is the gate's."""
        self.fading.share = share

    def end(self, model: nn.Module, data: Sequence[Batch]) -> None:
        """The gate alone is left."""
        model.set_submodule(self.path, self.gate)


@torch.no_grad()
def output_means(
    model: nn.Module, paths: Collection[str], data: Sequence[Batch]
) -> dict[str, Tensor]:
    """Mean output of some layers per channel, over samples and valid positions, in evaluation mode.

    Args:
        data: batches as for :func:`layer_collapse.scan`; the ``attention_mask`` of a mapping says
            which positions are valid.

    Returns:
        By path float64 [C].
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    valid: list[Tensor | None] = [None]

    def watch(path: str, module: nn.Module, output: Tensor) -> None:
        dim = channel_dim(module, output.ndim)
        if dim is None:
            raise ValueError(f"{path!r}: expected a batch (got an output {list(output.shape)})")
        rows = output.detach().movedim(dim, -1)
        if valid[0] is not None:
            rows = rows[positions_mask(valid[0], output.shape, dim, path).to(rows.device)]
        rows = rows.reshape(-1, rows.shape[-1]).double()
        sums[path] = sums.get(path, 0.0) + rows.sum(0)
        counts[path] = counts.get(path, 0) + len(rows)

    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: watch(path, module, output)
        )
        for path in paths
    ]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with training_mode(model, False):
            for batch in data:
                valid[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                call_model(model, batch, device)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: sums[path] / counts[path] for path in paths}
