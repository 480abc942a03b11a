"""TLC: which rectifier is nearly linear is read off the batch norm in front of it, without data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..graph import BATCH_NORM, trace
from ..measure.report import EntropyReport
from ..measure.sites import Site, find_sites
from .base import Loop, NotApplicable, Outcome
from .segments import run_segments

__all__ = ["Tlc", "minority"]


@torch.no_grad()
def minority(norm: nn.Module) -> Tensor:
    """Share of the values behind a batch norm that lie on the rarer side of zero: float64 [C].

    A normalised channel is taken to be Gaussian, z ~ N(beta, gamma²), so P(z > 0) =
    Phi(beta / |gamma|) and the rarer side has Phi(-|beta| / |gamma|). A channel with gamma = 0 is
    constant: 0.
    """
    gamma, beta = norm.weight, norm.bias
    assert isinstance(gamma, Tensor)
    assert isinstance(beta, Tensor)
    scale = gamma.double().abs()
    ratio = torch.where(scale > 0, beta.double().abs() / scale, torch.inf)
    return torch.special.ndtr(-ratio)


class Tlc:
    """Liao, Hezbri, Quétu, Nguyen, Tartaglione, "Till the Layers Collapse: Compressing a Deep
    Neural Network through the Lenses of Batch Normalization Layers", AAAI 2025 (arXiv 2412.15077).

    Next goes the rectifier whose neurons err least, in the mean, when each is taken to stay on its
    more frequent side: the error likelihood Phi(-|beta| / |gamma|) of a neuron, from the parameters
    of the batch norm right before it and without data. The rectifier becomes the
    identity, then the network is retrained. Deviations: every neuron is linearised, where the paper
    switches the mostly-OFF ones off (that costs far more before the retraining); the number of
    layers is given; all trainings share the epochs that other strategies have. A rectifier behind a
    residual sum has no batch norm of its own and stays.
    """

    name = "tlc"

    def run(self, model: nn.Module, loop: Loop, epochs: float, remove: int) -> Outcome:
        """See :meth:`layer_collapse.removal.Removal.run`.

        Raises:
            NotApplicable: no rectifier reads a batch norm, or none can be replaced in place.
            ValueError: bad arguments.
        """
        sites = find_sites(trace(model, loop.example_inputs))
        if remove and not any(_norm(model, site) for site in sites):
            raise NotApplicable(
                "tlc: no rectifier of this network reads a batch norm with weights, whose "
                "parameters it ranks layers by"
            )

        def lowest(model: nn.Module, sites: list[Site], report: EntropyReport) -> str | None:
            errors = {
                site.name: float(minority(norm).mean())
                for site in sites
                if (norm := _norm(model, site)) is not None
            }
            return min(errors, key=lambda name: errors[name]) if errors else None

        return run_segments(self.name, model, loop, epochs, remove, lowest)


def _norm(model: nn.Module, site: Site) -> nn.Module | None:
    """The batch norm of the layer that alone feeds a rectifier, or None."""
    if not site.candidate or not site.norm:
        return None
    norm = model.get_submodule(site.norm[-1])
    return norm if isinstance(norm, BATCH_NORM) and norm.affine else None
