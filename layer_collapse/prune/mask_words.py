"""Packed mask words and what a parameter must be to have them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from layer_collapse import _C

__all__ = ["check_parameters", "check_words", "full_words", "packed"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_BITS = 32  # weights per word


def full_words(count: int, device: torch.device) -> Tensor:
    """``[ceil(count / 32)]`` int32 in which ``count`` weights are alive and no stray bit is set."""
    words = torch.full((-(-count // _BITS),), -1, dtype=torch.int32, device=device)
    if rest := count % _BITS:
        words[-1] = (1 << rest) - 1
    return words


def packed(bools: Tensor) -> Tensor:
    """``[ceil(n / 32)]`` int32 words of n bools, on their device."""
    return torch.from_numpy(_C.pack_mask(bools.flatten().cpu().numpy())).to(bools.device)


def check_words(what: str, words: Tensor, count: int) -> None:
    """Raises ValueError, naming ``what``, unless ``words`` can be the mask of ``count`` weights."""
    shape = [-(-count // _BITS)]
    if words.dtype != torch.int32 or list(words.shape) != shape:
        raise ValueError(
            f"{what} must be int32 of shape {shape} (got {words.dtype} of {list(words.shape)})"
        )
    if (rest := count % _BITS) and (int(words[-1]) & 0xFFFFFFFF) >> rest:
        raise ValueError(
            f"{what} must have no bit set beyond its {count} weights "
            "(got stray bits in the last word)"
        )


def check_parameters(
    method: str, named_parameters: Mapping[str, Parameter]
) -> dict[str, Parameter]:
    """A copy of the mapping.

    Raises:
        ValueError: no parameters, or one parameter under two names.
        TypeError: something that is no parameter, or of a dtype without a masked step.
    """
    if not named_parameters:
        raise ValueError(f"{method}: named_parameters must not be empty (got none)")
    names: dict[Parameter, str] = {}
    for name, parameter in named_parameters.items():
        if not isinstance(parameter, Parameter) or parameter.dtype not in _DTYPES:
            kind = getattr(parameter, "dtype", type(parameter).__name__)
            raise TypeError(
                f"{method}: {name!r} must be a parameter of dtype float32, float64, bfloat16 or "
                f"float16 (got {type(parameter).__name__} of {kind})"
            )
        if parameter in names:
            raise ValueError(
                f"{method}: a parameter must have one name (got {names[parameter]!r} and {name!r})"
            )
        names[parameter] = name
    return dict(named_parameters)
