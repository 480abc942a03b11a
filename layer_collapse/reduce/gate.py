"""The modules that stand in for what pruning made linear or constant.

A rectifier whose neurons never change sign is affine per neuron, ``a_i z + c_i``
(:class:`AffineGate`); a branch whose layer has lost all its weights is a constant
(:class:`ConstantBias`). Both are ordinary modules: they deep-copy, compile and export.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def _floating(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a floating-point tensor (got {got})")
    return tensor.detach().clone()


class AffineGate(nn.Module):
    """``y = scale * x + offset`` per neuron: the exact replacement of a zero-entropy rectifier.

    ReLU gives (0, 0) to a neuron that is never on and (1, 0) to one that is always on; a saturated
    ReLU6 gives (0, 6); LeakyReLU and PReLU give (slope, 0) to a neuron that is never on; any
    rectifier behind an empty layer gives (0, act(bias)). See Liao, Quétu, Nguyen, Tartaglione,
    "Layer Collapse Can be Induced by Unstructured Pruning", TMLR 2026. Finite values pass
    unchanged where the pair is (1, 0); only the sign of a negative zero is lost.

    Args:
        scale: [C] floating point, one value per neuron; it is copied.
        offset: [C], same dtype and device as ``scale``; it is copied.
        channel_dim: the dim of the input on which the C neurons lie; may be negative.

    Raises:
        TypeError: ``scale`` or ``offset`` is not a floating-point tensor.
        ValueError: their shapes, dtypes or devices differ or are not [C].
    """

    scale: Tensor  # [C]
    offset: Tensor  # [C]

    def __init__(self, scale: Tensor, offset: Tensor, channel_dim: int = 1) -> None:
        super().__init__()
        scale, offset = (
            _floating("AffineGate: scale", scale),
            _floating("AffineGate: offset", offset),
        )
        if scale.ndim != 1 or scale.shape != offset.shape:
            raise ValueError(
                "AffineGate: expected scale and offset of one shape [C] "
                f"(got {list(scale.shape)} and {list(offset.shape)})"
            )
        if (scale.dtype, scale.device) != (offset.dtype, offset.device):
            raise ValueError(
                "AffineGate: expected scale and offset of one dtype and device "
                f"(got {scale.dtype} on {scale.device} and {offset.dtype} on {offset.device})"
            )
        self.channel_dim = int(channel_dim)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: any shape with C entries along ``channel_dim``; returns the same shape, dtype."""
        channels = self.scale.shape[0]
        if not -x.ndim <= self.channel_dim < x.ndim or x.shape[self.channel_dim] != channels:
            raise ValueError(
                f"AffineGate: expected {channels} neurons along dim {self.channel_dim} "
                f"(got an input of shape {list(x.shape)})"
            )
        shape = [1] * x.ndim
        shape[self.channel_dim] = channels
        return x * self.scale.view(shape).to(x.dtype) + self.offset.view(shape).to(x.dtype)

    def is_identity(self) -> bool:
        """Whether every neuron passes unchanged, i.e. all pairs are (1, 0)."""
        return bool((self.scale == 1).all()) and bool((self.offset == 0).all())

    def is_constant(self) -> bool:
        """Whether no neuron depends on the input, i.e. every scale is 0."""
        return bool((self.scale == 0).all())

    def extra_repr(self) -> str:
        text = f"{self.scale.shape[0]}, channel_dim={self.channel_dim}"
        if self.scale.is_meta:
            return text
        passing = int(((self.scale == 1) & (self.offset == 0)).sum())
        off = int(((self.scale == 0) & (self.offset == 0)).sum())
        constant = int((self.scale == 0).sum()) - off
        other = self.scale.shape[0] - passing - off - constant
        return f"{text}, on={passing}, off={off}, constant={constant}, other={other}"


class ConstantBias(nn.Module):
    """``y = x + value``: what is left of a branch that no longer depends on its input.

    Args:
        value: floating point without the batch dim, aligned with the input's last dims: [D] for
            tokens, [C, 1, 1] for images, [C, H, W] for a map that depends on the position (a
            zero-padded convolution of a constant). A map serves inputs of its own size only. It is
            copied.

    Raises:
        TypeError: ``value`` is not a floating-point tensor.
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", _floating("ConstantBias: value", value))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [N, ...] whose last dims ``value`` fits; returns the same shape and dtype."""
        tail = x.shape[x.ndim - self.value.ndim :] if self.value.ndim <= x.ndim else None
        fits = tail is not None and all(
            here in (1, there) for here, there in zip(self.value.shape, tail, strict=True)
        )
        if not fits:
            raise ValueError(
                f"ConstantBias: its value of shape {list(self.value.shape)} serves inputs of that "
                f"size only (got {list(x.shape)}); fold again with example inputs of the new size"
            )
        return x + self.value.to(x.dtype)

    def extra_repr(self) -> str:
        return f"shape={list(self.value.shape)}"


class FixedSize(nn.Module):
    """Hands its input on if it has the size that a network was folded for, and raises if not.

    Some folds are exact for one input size only and would silently be wrong at another, as would
    graphs of torch.export, which hold the sizes of the example as numbers.

    Args:
        shape: of the input without its first dim, the batch.
        step: 0, or by whole multiples of which an image may be larger: folds on which strides must
            end as they did.
        batch: the only size of the first dim, where that is part of the graph; None: any.
    """

    def __init__(self, shape: Sequence[int], step: int = 0, batch: int | None = None) -> None:
        super().__init__()
        self.step, self.batch = step, batch
        self.shape = tuple(int(size) for size in shape)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [N, ...]; returned as it is.

        Raises:
            ValueError: any other size.
        """
        if self.batch not in (None, x.shape[0]) or not self._fits(tuple(x.shape[1:])):
            sizes = ["N" if self.batch is None else self.batch, *self.shape]
            larger = f", or larger by multiples of {self.step}," if self.step else ""
            raise ValueError(
                "this network was folded for inputs of shape "
                f"[{', '.join(map(str, sizes))}]{larger} only (got {list(x.shape)}); "
                "fold again with example inputs of the new size"
            )
        return x

    def _fits(self, shape: tuple[int, ...]) -> bool:
        if not self.step:
            return shape == self.shape
        return len(shape) == len(self.shape) and all(
            here >= there and (here - there) % self.step == 0
            for here, there in zip(shape, self.shape, strict=True)
        )

    def extra_repr(self) -> str:
        batch = "" if self.batch is None else f", batch={self.batch}"
        return f"shape={list(self.shape)}, step={self.step}{batch}"


def smallest_form(value: Tensor, tolerance: float = 1e-12) -> Tensor:
    """The smallest tensor that broadcasts to ``value``: [N, C, H, W] uniform maps become [C, 1, 1].

    A dim along which nothing changes by more than ``tolerance`` times the largest magnitude is
    reduced to size 1 (matrix products may round rows differently); leading ones are dropped.
    """
    value = value.detach()
    limit = tolerance * float(value.abs().max()) if value.numel() else 0.0
    for dim in range(value.ndim):
        first = value.narrow(dim, 0, min(1, value.shape[dim]))
        if value.shape[dim] > 1 and bool(((value - first).abs() <= limit).all()):
            value = first
    while value.ndim > 1 and value.shape[0] == 1:
        value = value[0]
    form: Tensor = torch.atleast_1d(value).contiguous()
    return form


def reinitialise_(model: nn.Module, seed: int) -> None:
    """Give every layer of a folded model fresh weights: what it was trained to is forgotten.

    Layers start as torch initialises them, gates as the identity, constants at 0; parameters that
    belong to none of these stay.
    """
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, ConstantBias):
            module.value.zero_()
        elif isinstance(module, AffineGate):
            module.scale.fill_(1.0)
            module.offset.zero_()
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
