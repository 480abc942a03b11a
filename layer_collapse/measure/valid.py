"""Masks of the positions that count: padding tokens must not be measured."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def positions_mask(mask: Tensor, shape: Sequence[int], channel_dim: int, name: str) -> Tensor:
    """Bring a mask over samples or tokens into the positions of one rectifier.

    Args:
        mask: bool or 0/1 of any dtype, e.g. [B, T].
        shape: shape of the rectifier's input.
        channel_dim: its channel dim.
        name: of the rectifier, for the error.

    Returns:
        bool, ``shape`` without the channel dim. The mask's dims are the leading ones and are
        broadcast over the rest ([B, T] over [B, T, heads]); [B, T] is flattened for tokens packed
        as [B * T]; a value of one position per sample [B] counts where any token is valid.

    Raises:
        RuntimeError: the mask fits none of these.
    """
    dim = channel_dim % len(shape)
    positions = [size for d, size in enumerate(shape) if d != dim]
    valid = mask != 0
    lead = list(valid.shape)
    if positions[: len(lead)] == lead:
        extra = len(positions) - len(lead)
        return valid.reshape(lead + [1] * extra).expand(positions)
    if len(positions) == 1 and positions[0] == valid.numel():
        return valid.reshape(-1)
    if len(positions) == 1 and positions[0] == lead[0]:
        return valid.flatten(1).any(1)
    raise RuntimeError(
        f"rectifier {name!r}: the mask of valid positions has shape {tuple(mask.shape)}, which "
        f"does not fit its positions {tuple(positions)}; pass a mask over samples or tokens, [B] "
        "or [B, T]"
    )
