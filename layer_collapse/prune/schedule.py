"""Pruning by rounds in a loop that somebody else owns: what its callback has to do, and when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from ..checkpoint import with_prefix, without_prefix
from ..measure.ranks import summed_ledgers
from ..measure.tracker import EntropyTracker, track
from ..ranks import Group
from ..sharding import full
from .masks import Masks
from .optim import keep_pruned
from .rounds import candidate_weights, check_fraction, prune_round


class Rounds:
    """Prunes ``fraction`` of the layers that still switch after each of the first epochs.

    Args:
        fraction: of the weights alive, per round, above 0 and below 1.
        rounds: how many; the epochs after them are for recovery.
        every: epochs between two rounds.
        options: of :func:`layer_collapse.prune_round` (strategy, guards).

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, fraction: float, rounds: int, every: int = 1, **options: Any) -> None:
        check_fraction(fraction)
        if rounds < 1 or every < 1:
            raise ValueError(f"expected rounds and every of 1 or more (got {rounds} and {every})")
        self.fraction, self.rounds, self.every, self.options = fraction, rounds, every, options
        self.tracker: EntropyTracker | None = None
        self._handles: list[RemovableHandle] = []
        self._saved: dict[str, Tensor] = {}
        self._started = False

    def start(self, model: nn.Module, optimizers: Iterable[Optimizer], inputs: Any) -> None:
        """Before the first step; on all processes, once model and optimisers are spread."""
        self.tracker = track(model, inputs)
        self.masks = Masks(candidate_weights(model, self.tracker.sites))
        self._handles = [keep_pruned(optimizer, self.masks) for optimizer in optimizers]
        self._started = True
        self._restore()

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """After ``epoch`` epochs; on all processes. Returns what :meth:`scalars` says of them."""
        assert self.tracker is not None
        group = _everyone()
        scalars = self.tracker.scalars(group, self.masks)
        if epoch % self.every == 0 and epoch <= self.rounds * self.every:
            report = self.tracker.entropy(group)
            model, sites = self.tracker.model, self.tracker.sites
            prune_round(model, self.masks, report, sites, self.fraction, **self.options)
            if group is not None:
                self.masks.check_ranks()
        if epoch % self.every == 0:
            self.tracker.reset()
        return scalars

    def pause(self, paused: bool) -> None:
        """Whether forwards are not counted, as in a validation."""
        if self.tracker is not None:
            self.tracker.pause() if paused else self.tracker.resume()

    def stop(self) -> None:
        """Gives model and optimisers back; masks and counts stay readable."""
        if self.tracker is not None:
            self.tracker.remove()
        for handle in self._handles:
            handle.remove()
        self._started = False

    def tensors(self) -> dict[str, Tensor]:
        """Masks, and counts of all processes together, for a checkpoint; on all processes."""
        if self.tracker is None:
            return self._saved
        counts = self.tracker.state_dict()
        if (group := _everyone()) is not None:
            device = next(self.tracker.model.parameters()).device
            summed = summed_ledgers([ledger.to(device) for ledger in counts.values()], group)
            counts = dict(zip(counts, summed, strict=True))
        masks = {name: full(self.masks.saved(name)) for name in self.masks.names}
        return with_prefix("counts/", counts) | with_prefix("masks/", masks)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from :meth:`tensors`, before :meth:`start` or after it.

        After it the model must have its weights back, as pruned ones are set to zero then.

        Raises:
            ValueError: they are of another model.
        """
        self._saved = dict(tensors)
        self._restore()

    def _restore(self) -> None:
        if not self._saved or not self._started or self.tracker is None:
            return
        masks = without_prefix("masks/", self._saved)
        if odd := sorted(set(masks) ^ set(self.masks.names)):
            raise ValueError(
                "the checkpoint's masks belong to another model: parameters differ "
                f"({odd[0]!r:.80}); resume with the model that it was saved from"
            )
        self.tracker.load_state_dict(without_prefix("counts/", self._saved))
        if _everyone() is not None and dist.get_rank() != 0:
            self.tracker.reset()  # one process has the sum, the others none
        self.masks.load_words(masks)


def _everyone() -> Group:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
