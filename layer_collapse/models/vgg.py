"""A small plain network of convolutions with batch normalisation: nothing leads around a layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from layer_collapse.models.options import activation_module, check_positive, image_shape

__all__ = ["VGG"]


class VGG(nn.Module):
    """VGG with BN: stages of 3x3 convolutions, images halved between them, two linear layers.

    Args:
        input_shape: (channels, height, width).
        classes: number of logits.
        widths: channels of each stage.
        convolutions: per stage, one rectifier each; the hidden linear layer has one more.
        hidden: features of the hidden linear layer.
        activation: ``relu`` or ``gelu``.

    Raises:
        ValueError: a size below 1, no width, an image too small to be halved, or an unknown
            activation.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        widths: Sequence[int] = (16, 32, 64),
        convolutions: int = 2,
        hidden: int = 64,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        inputs, rows, columns = image_shape(input_shape)
        if not isinstance(widths, (list, tuple)):
            raise ValueError(f"model: expected widths to be a list of sizes (got {widths!r})")
        check_positive(
            classes=classes, convolutions=convolutions, hidden=hidden, stages=len(widths)
        )
        if min(rows, columns) >> (len(widths) - 1) < 1:
            raise ValueError(
                f"model: expected at least {2 ** (len(widths) - 1)} pixels a side for "
                f"{len(widths)} stages (got {rows} x {columns})"
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for stage, width in enumerate(widths, start=1):
            check_positive(widths=width)
            if stage > 1:
                layers[f"pool{stage}"] = nn.MaxPool2d(2)
            for number in range(1, convolutions + 1):
                name = f"{stage}_{number}"
                layers[f"conv{name}"] = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
                layers[f"bn{name}"] = nn.BatchNorm2d(width)
                layers[f"act{name}"] = activation_module(activation)
                inputs = width
        self.features = nn.Sequential(layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, hidden)
        self.act = activation_module(activation)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, *input_shape] to logits [N, classes]."""
        out: Tensor = self.head(self.act(self.fc(self.flatten(self.pool(self.features(x))))))
        return out
