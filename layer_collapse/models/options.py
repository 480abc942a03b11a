"""Checks of the options that the networks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

__all__ = ["activation_module", "check_positive", "image_shape"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


def activation_module(name: str) -> nn.Module:
    """Return a new activation, ``relu`` or ``gelu``; ValueError for any other name."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"model: expected activation {' or '.join(_ACTIVATIONS)} (got {name!r})")
    return _ACTIVATIONS[name]()


def check_positive(**sizes: object) -> None:
    """Raise ValueError, naming the option, unless every size is an int >= 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"model: expected {name} to be a whole number >= 1 (got {size!r})")


def image_shape(input_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return ``input_shape`` as (channels, height, width); ValueError if it is none."""
    shape = tuple(input_shape)
    if len(shape) != 3:
        raise ValueError(
            f"model: expected an input shape of (channels, height, width) (got {shape})"
        )
    check_positive(channels=shape[0], height=shape[1], width=shape[2])
    return shape[0], shape[1], shape[2]
