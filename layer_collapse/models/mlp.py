"""Fully connected networks: with a way around every block, and plain."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from layer_collapse.models.options import activation_module, check_positive

__all__ = ["MLP", "ResMLP"]


class MLPBlock(nn.Module):
    """x + fc2(act(fc1(x))) on [N, width]."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = activation_module(activation)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(self.act(self.fc1(x)))
        return out


class ResMLP(nn.Module):
    """Residual MLP without normalisation: stem, ``blocks`` times :class:`MLPBlock`, head.

    Args:
        input_shape: shape of one sample, any rank.
        classes: number of logits.
        width: features on the residual path.
        hidden: features inside a block.
        blocks: number of blocks, one rectifier each.
        activation: ``relu`` or ``gelu``.

    Raises:
        ValueError: a size below 1 or an unknown activation.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        width: int = 256,
        hidden: int = 512,
        blocks: int = 6,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        features = math.prod(input_shape)
        check_positive(
            features=features, classes=classes, width=width, hidden=hidden, blocks=blocks
        )
        self.flatten = nn.Flatten()
        self.stem = nn.Linear(features, width)
        self.blocks = nn.Sequential(*(MLPBlock(width, hidden, activation) for _ in range(blocks)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, *input_shape] to logits [N, classes]."""
        out: Tensor = self.head(self.blocks(self.stem(self.flatten(x))))
        return out


class MLP(nn.Sequential):
    """Plain MLP, no way around any layer: ``layers`` of (linear, rectifier), then a head.

    Args:
        input_shape: shape of one sample, any rank.
        classes: number of logits.
        width: features of every hidden layer.
        layers: hidden layers, one rectifier each.
        activation: ``relu`` or ``gelu``.

    Raises:
        ValueError: a size below 1 or an unknown activation.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        width: int = 256,
        layers: int = 6,
        activation: str = "relu",
    ) -> None:
        features = math.prod(input_shape)
        check_positive(features=features, classes=classes, width=width, layers=layers)
        modules: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for i in range(layers):
            modules[f"fc{i + 1}"] = nn.Linear(width if i else features, width)
            modules[f"act{i + 1}"] = activation_module(activation)
        modules["head"] = nn.Linear(width, classes)
        super().__init__(modules)
