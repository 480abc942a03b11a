"""In which dtype a model's tensors wait while it is folded, and in which they are stored.

Large weights (parameters of rank 2 and more) stay in the dtype they are stored in, those that no
fold touches in the very memory of the user's model; all other tensors are float64. What folds give
stays float64, to be rounded once at the end, up to :data:`BUDGET` bytes together; beyond that every
fold rounds what it gives.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .float64 import wide
from .holdings import attribute, like, put, sharing_copy, tensors

#: Bytes of large weights that may wait in float64 until the end of folding: 32 MiB.
BUDGET = 2**25


Dtypes = Mapping[str, torch.dtype]


class Waiting:
    """The modules that folds have given, until they are finished."""

    def __init__(self) -> None:
        self._modules = weakref.WeakSet[nn.Module]()

    def take(self, path: str, module: nn.Module, dtypes: Dtypes) -> nn.Module:
        """The module as it waits for further folds: not rounded while the budget lasts."""
        if sum(map(_wide_bytes, self._modules)) + _wide_bytes(module) > BUDGET:
            module = rounded(path, module, dtypes)
        widen_small(module)
        self._modules.add(module)
        return module.eval()


def rounded(path: str, module: nn.Module, dtypes: Dtypes) -> nn.Module:
    """A module as it will be stored; what has its dtype already is shared with ``module``."""
    module = sharing_copy(module)
    round_all(module, dtypes, f"{path}.")
    return module.eval()


def round_all(module: nn.Module, dtypes: Dtypes, prefix: str = "") -> None:
    """Every tensor to the dtype noted under its path; each leaves before the next is made."""
    for name in list(tensors(module)):
        tensor = attribute(module, name)
        dtype = dtypes.get(prefix + name, tensor.dtype)
        if tensor.dtype != dtype:
            put(module, name, like(tensor, tensor.detach().to(dtype)))


def widen_small(module: nn.Module) -> None:
    """Buffers and parameters of rank 0 and 1 to float64, in objects of their own.

    Not those of parametrisations, which compute with tensors of one dtype.
    """
    buffers = dict(module.named_buffers(remove_duplicate=False))
    made: dict[int, Tensor] = {}
    for name, tensor in tensors(module).items():
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()
        computes = "parametrizations" in name.split(".")
        if plain and not computes and (tensor.ndim < 2 or name in buffers):
            new = made.setdefault(id(tensor), like(tensor, wide(tensor)))
            put(module, name, new)


def _wide_bytes(module: nn.Module) -> int:
    """Bytes of the large weights that are float64."""
    large = (p for p in module.parameters() if p.ndim >= 2 and p.dtype == torch.float64)
    return sum(p.nbytes for p in large)
