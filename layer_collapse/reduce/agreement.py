"""How far a changed network is from the one it was made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..graph import training_mode
from ..measure.scan import Batch, call_model, logits_of


@dataclass(frozen=True)
class Agreement:
    """Two networks on the same samples.

    Attributes:
        samples: how many.
        same_class: share of samples on which the largest logit is the same one.
        max_abs: largest difference of a logit.
        relative: root mean square of the difference over that of the original's logits.
    """

    samples: int
    same_class: float
    max_abs: float
    relative: float


@torch.no_grad()
def agreement(original: nn.Module, changed: nn.Module, batches: Iterable[Batch]) -> Agreement:
    """Compare two networks in evaluation mode; both are left as they were.

    Exactness of a fold is proven against the *linearised* network; this tells what the
    linearisation itself changed. A neuron that never switched on the scanned data can switch on
    other data, so pass samples that were not scanned.

    Args:
        batches: as for :func:`layer_collapse.scan`.

    Raises:
        ValueError: there is no sample.
    """
    samples = same = 0
    worst = gap = size = 0.0
    device = next((p.device for p in original.parameters()), torch.device("cpu"))
    with training_mode(original, False), training_mode(changed, False):
        for batch in batches:
            theirs = logits_of(call_model(original, batch, device)).double()
            ours = logits_of(call_model(changed, batch, device)).double()
            if not theirs.numel():
                continue
            samples += len(theirs)
            equal = theirs.argmax(-1) == ours.argmax(-1)
            same += int(equal.reshape(len(equal), -1).all(dim=1).sum())
            difference = (ours - theirs).abs()
            worst = max(worst, float(difference.max()))
            gap += float((difference * difference).sum())
            size += float((theirs * theirs).sum())
    if not samples:
        raise ValueError("agreement: expected at least one sample (got none)")
    return Agreement(samples, same / samples, worst, (gap / size) ** 0.5 if size else 0.0)
