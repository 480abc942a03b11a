"""From counts to entropy: ``layer_entropies`` reduces all ledgers of a model in one call.

H of a neuron is the entropy of the state of its pre-activation over all counted positions, from
the summed counts (TMLR 2026, section 3): p = share of z > 0, H = -p log2 p - (1 - p) log2(1 - p);
three states (below 0, between, above 6) for ReLU6. A neuron in {0, +} or {0, -} has H = 0: it is
linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C  # noqa: F401 - importing the module registers the ops
from ..measure.rectifiers import KINDS, Kind
from .rectify import HEADER, LIVE_WORDS, POSITIONS, counts_of

_KIND_OF_CODE = {kind.code: kind for kind in KINDS.values()}


class Column(IntEnum):
    """Columns of the summary of :func:`layer_entropies`."""

    POSITIONS = 0
    ENTROPY = 1
    ENTROPY_ACTIVE = 2
    ON = 3
    OFF = 4
    SATURATED = 5
    MIXED = 6
    NONFINITE = 7


class State(IntEnum):
    """What a neuron did over all counted positions, as in csrc/core/entropy.h."""

    MIXED = 0
    ON = 1
    OFF = 2
    SATURATED = 3
    NONFINITE = 4


class LiveEntropy(NamedTuple):
    """What the last forward made of a rectifier's counts so far.

    ``entropy``: mean H over all neurons, in bits; ``entropy_active``: over those with H > 0;
    ``mixed``: number of neurons that are not linear. 0 before the first forward.
    """

    entropy: float
    entropy_active: float
    mixed: int


def layer_entropies(
    ledgers: Sequence[Tensor], kinds: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy and neuron states of every ledger.

    Args:
        ledgers: at least one, each as ``new_ledger`` lays it out for C neurons of its kind.
        kinds: ``Kind.code`` of each ledger.

    Returns:
        Summary [L, 8] float64 with the columns of :class:`Column` (entropies are NaN without a
        counted position or with a NaN); H per neuron in bits [N] float64; :class:`State` per neuron
        [N] uint8. N runs over the neurons of all ledgers; without a position both are 0.

    Raises:
        RuntimeError: a ledger of wrong dtype or size, an unknown kind.
    """
    if not ledgers:
        raise RuntimeError("layer_entropies: ledgers must hold at least one tensor (got none)")
    summary, bits, states = torch.ops.layer_collapse.layer_entropies(ledgers, kinds)
    return summary, bits, states


def live_entropy(ledger: Tensor) -> LiveEntropy:
    """The live words of a ledger; on a GPU this waits for its forward."""
    words = ledger[LIVE_WORDS].cpu()
    entropy, active = words[:2].view(torch.float64).tolist()
    return LiveEntropy(entropy, active, int(words[2]))


@torch.library.register_fake("layer_collapse::layer_entropies")
def _(ledgers: Sequence[Tensor], kinds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    like = ledgers[0]
    neurons = sum(
        (ledger.numel() - HEADER) // _KIND_OF_CODE[kind].rows
        for ledger, kind in zip(ledgers, kinds, strict=True)
    )
    return (
        like.new_empty((len(ledgers), len(Column)), dtype=torch.float64),
        like.new_empty((neurons,), dtype=torch.float64),
        like.new_empty((neurons,), dtype=torch.uint8),
    )


def _term(counts: Tensor, positions: int) -> Tensor:
    share = counts.double() / positions
    return -torch.special.xlogy(share, share) / torch.log(torch.tensor(2.0, dtype=torch.float64))


def _neurons(ledger: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    positions, counts = int(ledger[POSITIONS]), counts_of(ledger, kind)
    bits = torch.zeros(counts.shape[1], dtype=torch.float64)
    states = torch.full((counts.shape[1],), State.MIXED, dtype=torch.uint8)
    if positions == 0:
        return bits, states
    positive, negative, nan = counts[0], counts[1], counts[2]
    extra = counts[3] if kind.rows > 3 else torch.zeros_like(nan)
    on, off, saturated = negative == 0, positive == 0, torch.zeros_like(nan, dtype=torch.bool)
    bits = _term(positive - extra if kind.name == "relu6" else positive, positions)
    bits += _term(positions - positive, positions)
    if kind.name == "relu6":
        bits += _term(extra, positions)
        saturated = extra == positions
        on &= extra == 0
        one_piece = on | off | saturated
    else:
        one_piece = on | off
    if kind.name == "hardswish":
        on, off = on & (extra == 0), off & (extra == 0)
    bits[one_piece] = 0.0
    states[on] = State.ON
    states[saturated] = State.SATURATED
    states[off] = State.OFF
    states[nan > 0] = State.NONFINITE
    bits[nan > 0] = torch.nan
    return bits, states


def layer_entropies_reference(
    ledgers: Sequence[Tensor], kinds: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """``layer_entropies`` in plain PyTorch."""
    rows, all_bits, all_states = [], [], []
    for ledger, code in zip(ledgers, kinds, strict=True):
        bits, states = _neurons(ledger, _KIND_OF_CODE[code])
        positions = int(ledger[POSITIONS])
        measured = positions > 0 and len(bits) > 0
        entropic = bits[bits != 0]
        row = [float(positions), torch.nan, torch.nan, 0, 0, 0, 0, 0]
        if measured:
            row[1] = float(bits.mean())
            row[2] = float(entropic.mean()) if len(entropic) else 0.0
            order = (State.ON, State.OFF, State.SATURATED, State.MIXED, State.NONFINITE)
            row[3:] = [int((states == state).sum()) for state in order]
        rows.append(row)
        all_bits.append(bits)
        all_states.append(states)
    summary = torch.tensor(rows, dtype=torch.float64)
    return summary, torch.cat(all_bits), torch.cat(all_states)
