"""The rules of folding, one file each.

A rule is a function ``(work, node) -> Plan | None``: it looks at one node of the graph and proposes
one exact rewriting, answers None where it does not apply, and raises :class:`Refused` with the
reason where it nearly does. Proof, bookkeeping and undoing are not its business. A new rule is a
new file and a line in :data:`RULES`; they are tried in this order until none applies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from ..work import Plan, Work
from .absorb import absorb
from .batch_norm import batch_norm
from .constant import constant
from .convolution import convolution
from .forward import forward
from .gate import gate
from .linear import linear, merged_size
from .neurons import neurons
from .residual import residual

Rule = Callable[[Work, fx.Node], Plan | None]

RULES: Mapping[str, Rule] = {
    "batch norm": batch_norm,
    "gate": gate,
    "constant": constant,
    "absorb": absorb,
    "neurons": neurons,
    "linear": linear,
    "convolution": convolution,
    "residual": residual,
    "forward": forward,
}

#: Rules that begin at the nodes for which this is smallest; the others go along the graph.
FIRST: Mapping[str, Callable[[Work, fx.Node], int]] = {"linear": merged_size}
