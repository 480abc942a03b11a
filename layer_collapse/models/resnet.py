"""A small residual network of convolutions with batch normalisation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from layer_collapse.models.options import activation_module, check_positive, image_shape

__all__ = ["ResNet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BN and a way around them.

    ``act1`` sees its own convolution alone and can be removed; ``act2`` sees the sum and cannot be
    made linear by pruning the branch.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = activation_module(activation)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                    bn=nn.BatchNorm2d(outputs),
                )
            )
        self.act2 = activation_module(activation)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        out: Tensor = self.act2(branch + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """CIFAR-style ResNet: stem, one stage per width (halving the image between), mean, head.

    Args:
        input_shape: (channels, height, width).
        classes: number of logits.
        widths: channels of each stage.
        blocks: :class:`BasicBlock` per stage, two rectifiers each; the stem has one more.
        stem_stride: stride of the first convolution; None halves images of 16 pixels and more,
            which makes an epoch four times cheaper.
        activation: ``relu`` or ``gelu``.

    Raises:
        ValueError: a size below 1, no width, or an unknown activation.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 3,
        stem_stride: int | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        channels, rows, _ = image_shape(input_shape)
        if not isinstance(widths, (list, tuple)):
            raise ValueError(f"model: expected widths to be a list of sizes (got {widths!r})")
        stem_stride = (2 if rows >= 16 else 1) if stem_stride is None else stem_stride
        check_positive(classes=classes, blocks=blocks, stem_stride=stem_stride, stages=len(widths))
        for width in widths:
            check_positive(widths=width)
        stem, stride = widths[0], stem_stride
        self.conv = nn.Conv2d(channels, stem, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(stem)
        self.act = activation_module(activation)
        stages: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(zip((stem, *widths), widths, strict=False)):
            first = BasicBlock(inputs, outputs, 2 if i else 1, activation)
            others = (BasicBlock(outputs, outputs, 1, activation) for _ in range(blocks - 1))
            stages.append(nn.Sequential(first, *others))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, *input_shape] to logits [N, classes]."""
        features = self.stages(self.act(self.bn(self.conv(x))))
        out: Tensor = self.head(self.flatten(self.pool(features)))
        return out
