"""Small networks for the experiments.

Each rectifier is a module of its own, used at one call site, and no forward pass looks at the
data: torch.fx can trace them all. Residual and normalised, plain, attention, convolution: one
network for each case that layer removal has to handle.

All take images float32 [N, *input_shape] and return logits float32 [N, classes].
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from layer_collapse.models.mlp import MLP, ResMLP
from layer_collapse.models.resnet import ResNet
from layer_collapse.models.vgg import VGG
from layer_collapse.models.vit import ViT

__all__ = ["MLP", "NAMES", "VGG", "ResMLP", "ResNet", "ViT", "build"]

_MODELS: dict[str, type[nn.Module]] = {
    "resmlp": ResMLP,
    "mlp": MLP,
    "vit": ViT,
    "resnet": ResNet,
    "vgg": VGG,
}
NAMES = tuple(_MODELS)


def build(name: str, input_shape: Sequence[int], classes: int, **options: Any) -> nn.Module:
    """Build a network by name, initialised from torch's global generator.

    Args:
        name: one of :data:`NAMES`.
        input_shape: shape of one sample, as ``Dataset.input_shape``.
        classes: number of logits.
        options: keyword arguments of the network, e.g. ``blocks=8``.

    Raises:
        ValueError: unknown name, unknown option, or a value the network refuses.
    """
    if name not in _MODELS:
        raise ValueError(f"model: expected one of {', '.join(NAMES)} (got {name!r})")
    known = list(inspect.signature(_MODELS[name]).parameters)[2:]
    for option in options:
        if option not in known:
            raise ValueError(
                f"model: expected an option of {name} among {', '.join(known)} (got {option!r})"
            )
    return _MODELS[name](input_shape, classes, **options)
