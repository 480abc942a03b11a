"""What every op that writes into its arguments owes autograd."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["bump_versions"]


def bump_versions(*groups: Iterable[Tensor]) -> None:
    """Tells autograd that these tensors were written by a kernel that torch cannot see into.

    Without it a backward pass that saved one of them would silently use the new values; with it
    backward raises. Compiled graphs keep their own account, so nothing is done while tracing.
    """
    if torch.compiler.is_compiling():
        return
    for tensors in groups:
        torch.autograd.graph.increment_version(list(tensors))
