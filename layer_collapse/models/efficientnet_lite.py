"""EfficientNet-Lite0: inverted residuals with ReLU6 and BN, with the published ImageNet weights."""

from __future__ import annotations

from collections import OrderedDict

from safetensors.torch import load_file
from torch import Tensor, nn

from .. import assets

__all__ = ["EfficientNetLite", "efficientnet_lite0"]

# Of each stage: blocks, kernel size, stride of the first block, expansion, output channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _TOP = 32, 1280


def _unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int, act: bool) -> nn.Module:
    """Convolution, BN, ReLU6; strided ones pad as TensorFlow does: less on the left and top."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    padding = kernel // 2
    if stride == 2:
        layers["pad"] = nn.ZeroPad2d((padding - 1, padding, padding - 1, padding))
        padding = 0
    layers["conv"] = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    layers["bn"] = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
    if act:
        layers["act"] = nn.ReLU6()
    return nn.Sequential(layers)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise k x k, 1x1 projection; a way around where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = _unit(inputs, hidden, 1, 1, 1, True) if expansion != 1 else nn.Identity()
        self.depthwise = _unit(hidden, hidden, kernel, stride, hidden, True)
        self.project = _unit(hidden, outputs, 1, 1, 1, False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return out + x if self.residual else out


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0.

    Args:
        classes: number of logits.

    Images float32 [N, 3, H, W] with even H and W at every strided layer (224 and 96 are), scaled as
    (pixel / 255 - 0.498) / 0.502; logits float32 [N, classes].
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = _unit(3, _STEM, 3, 2, 1, True)
        blocks, inputs = list[nn.Module](), _STEM
        for number, kernel, stride, expansion, outputs in _STAGES:
            for i in range(number):
                strided = stride if i == 0 else 1
                blocks.append(InvertedResidual(inputs, outputs, kernel, strided, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.top = _unit(inputs, _TOP, 1, 1, 1, True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(_TOP, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.flatten(self.pool(self.top(self.blocks(self.stem(x)))))
        out: Tensor = self.head(self.dropout(features))
        return out


def efficientnet_lite0() -> EfficientNetLite:
    """EfficientNet-Lite0 with its ImageNet weights (downloaded once, see :mod:`..assets`).

    Raises:
        OSError: the weights cannot be downloaded.
    """
    model = EfficientNetLite()
    model.load_state_dict(load_file(assets.fetch("efficientnet-lite0") / "weights.safetensors"))
    return model.eval()
