"""One pruning round: who may lose weights, how many each, and what must never happen.

Guards (each was needed in experiments): a layer without a way around keeps a floor of weights, or
the network is cut and every layer then measures zero entropy; few layers may be emptied at once; a
network that is cut is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..graph import BATCH_NORM
from ..measure.report import NONFINITE, UNMEASURED, EntropyReport
from ..measure.sites import Site
from ..measure.tracker import unwrapped
from ..sharding import full, reshard
from .masks import Masks
from .strategies import EntropyGuided, PrunableLayer, Strategy


@dataclass(frozen=True)
class Guards:
    """Limits on a round.

    Attributes:
        floor: weights that a layer without a way around keeps at least, and that a layer over the
            limit below keeps.
        max_emptied: how many layers may lose their last weight in one round.
    """

    floor: int = 64
    max_emptied: int = 2

    def __post_init__(self) -> None:
        if self.floor < 1 or self.max_emptied < 0:
            raise ValueError(
                f"expected floor >= 1 and max_emptied >= 0 (got {self.floor}, {self.max_emptied})"
            )


_BY_ENTROPY, _GUARDS = EntropyGuided(), Guards()


class CutError(RuntimeError):
    """The network's output no longer depends on its input."""


def candidate_weights(model: nn.Module, sites: Sequence[Site]) -> dict[str, nn.Parameter]:
    """The weights that pruning may touch: of layers that alone feed a rectifier, by name.

    Args:
        model: that was tracked, or the same inside DistributedDataParallel or torch.compile; names
            are those within it.
        sites: ``tracker.sites``.
    """
    model, found = unwrapped(model), {}
    for site in sites:
        if site.candidate and site.feeding is not None:
            weight = model.get_submodule(site.feeding).weight
            assert isinstance(weight, nn.Parameter)
            found[f"{site.feeding}.weight"] = weight
    return found


def prunable_layers(
    model: nn.Module, masks: Masks, report: EntropyReport, guards: Guards
) -> list[PrunableLayer]:
    """The candidates of a round with their entropies and caps.

    Raises:
        ValueError: a candidate is unmeasured or nonfinite; names it.
    """
    layers = []
    for row in report:
        name = f"{row.feeding}.weight"
        if not row.candidate or name not in masks.names:
            continue
        if row.state in (UNMEASURED, NONFINITE):
            reason = "saw no data" if row.state == UNMEASURED else "saw NaN"
            raise ValueError(
                f"rectifier {row.name!r} {reason}, so its layer cannot be pruned by entropy; check "
                "the data and the weights"
            )
        weight = model.get_parameter(name).detach()
        alive = masks.alive(name)
        # gathered, because the order of the sum decides its last bits and they the budget
        total = float(full(weight).abs().sum(dtype=torch.float64))
        if not math.isfinite(total):
            raise ValueError(f"weights of {name!r} are not finite; the training has diverged")
        layers.append(
            PrunableLayer(
                weight=name,
                rectifier=row.name,
                entropy=row.entropy,
                entropy_active=row.entropy_active,
                alive=alive,
                mean_magnitude=total / alive if alive else 0.0,
                fan_in=weight[0].numel(),
                cap=alive if row.way_around else max(0, alive - guards.floor),
            )
        )
    return layers


def check_fraction(fraction: float) -> None:
    """Raises ValueError unless ``fraction`` is above 0 and below 1."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be above 0 and below 1 (got {fraction})")


def plan(
    layers: Sequence[PrunableLayer],
    fraction: float,
    strategy: Strategy,
    masks: Masks,
    guards: Guards,
) -> dict[str, int]:
    """Weights to prune per layer: ``fraction`` of those alive in the candidates with H > 0.

    Raises:
        ValueError: ``fraction`` is not between 0 and 1, or there is no candidate.
    """
    check_fraction(fraction)
    if not layers:
        raise ValueError(
            "no rectifier is a candidate: none is fed by a layer of its own alone, so pruning a "
            "layer cannot make one linear"
        )
    total = round(fraction * sum(layer.alive for layer in layers if layer.entropy > 0))
    allowed = list(layers)
    spared: set[str] = set()
    while True:
        counts = strategy.budget(allowed, total, masks)
        emptied = [
            layer
            for layer, count in zip(allowed, counts, strict=True)
            if layer.alive and count == layer.alive
        ]
        if len(emptied) <= guards.max_emptied:
            return {layer.weight: count for layer, count in zip(allowed, counts, strict=True)}
        # The least important stay marked for emptying; the others keep their floor this round.
        emptied.sort(key=lambda layer: layer.entropy * layer.mean_magnitude)
        spared |= {layer.weight for layer in emptied[guards.max_emptied :]}
        allowed = [
            replace(layer, cap=min(layer.cap, max(0, layer.alive - guards.floor)))
            if layer.weight in spared
            else layer
            for layer in allowed
        ]


@torch.no_grad()
def reset_dead_batch_norms(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Give batch norms behind emptied filters the statistics of what they now see.

    A dead filter sends its bias b (or 0), so mean = b and variance = 0 and z = beta; with stale
    statistics evaluation would read other signs.

    Returns:
        The names of the batch norms that were changed.
    """
    changed = []
    for site in sites:
        if site.feeding is None:
            continue
        feeding = model.get_submodule(site.feeding)
        weight = feeding.weight
        assert isinstance(weight, torch.Tensor)
        if isinstance(feeding, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            continue  # its filters lie on dim 1 and per group; the next training epoch refreshes
        dead = ~full(weight).flatten(1).any(1)
        norms = [model.get_submodule(path) for path in site.norm]
        if not norms or not isinstance(norms[0], BATCH_NORM) or not bool(dead.any()):
            continue
        norm = norms[0]
        if norm.running_mean is None or norm.running_var is None:
            continue
        bias = feeding.bias if isinstance(feeding.bias, torch.Tensor) else torch.zeros(len(dead))
        norm.running_mean[dead] = full(bias).to(norm.running_mean)[dead]
        norm.running_var[dead] = 0.0
        changed.append(site.norm[0])
    return changed


def prune_round(
    model: nn.Module,
    masks: Masks,
    report: EntropyReport,
    sites: Sequence[Site],
    fraction: float,
    strategy: Strategy = _BY_ENTROPY,
    guards: Guards = _GUARDS,
) -> dict[str, int]:
    """Prune once: plan, clear the mask bits, zero the weights, reset dead batch norms.

    With several processes, ``report`` must be that of all of them (``tracker.entropy(group)``): the
    same weights then go everywhere.

    Args:
        model: as for :func:`candidate_weights`.
        masks: of :func:`candidate_weights`, or of some of them.
        report: entropies since the last round.
        sites: ``tracker.sites``.
        fraction: of the weights alive in the layers with H > 0, above 0 and below 1.
        strategy: how many weights each layer loses.
        guards: what must not happen.

    Returns:
        Number of weights pruned by parameter name.

    Raises:
        CutError: ``report`` shows that the network is cut.
        ValueError: see :func:`plan` and :func:`prunable_layers`; nothing is pruned then.
    """
    if report.cut:
        raise CutError(
            f"the network is cut ({report.cut_by}): its output is constant and its entropies say "
            "nothing; go back to the round before and prune less"
        )
    model = unwrapped(model)
    reshard(model)
    layers = prunable_layers(model, masks, report, guards)
    counts = plan(layers, fraction, strategy, masks, guards)
    masks.prune_(counts)
    reset_dead_batch_norms(model, sites)
    return counts
