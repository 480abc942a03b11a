"""The architectures that folding is tried on: unmodified public code with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision.models as tv
import transformers
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock, Bottleneck

from layer_collapse.graph import without_cache


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        full: the published size.
        small: the same classes, small enough for continuous integration.
        rectifiers: of the published size, counted by hand from the paper or the code.
        traced_by: "fx" or "export".
        tokens: whether it reads token ids, not images.
    """

    full: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    rectifiers: int
    traced_by: str = "fx"
    tokens: bool = False


def _vgg(norm: bool) -> nn.Module:
    """VGG16 whose head, nine tenths of the weights, is narrow."""
    model: Any = (tv.vgg16_bn if norm else tv.vgg16)(init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    for place, sizes in ((0, (512, 64)), (3, (64, 64)), (6, (64, 10))):
        model.classifier[place] = nn.Linear(*sizes)
    return model


def _convnext() -> nn.Module:
    stages = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, 64, 3), CNBlockConfig(64, None, 2)]
    return tv.ConvNeXt(stages, stochastic_depth_prob=0.1, num_classes=10)


def _swin() -> nn.Module:
    return tv.SwinTransformer([4, 4], 24, [2, 4], [2, 4], [7, 7], stochastic_depth_prob=0.2)


def _vit() -> nn.Module:
    return tv.VisionTransformer(64, 16, 4, 4, 64, 128, num_classes=10)


def _bert(layers: int, hidden: int, implementation: str = "sdpa", **more: Any) -> nn.Module:
    config = transformers.BertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 32,
        intermediate_size=4 * hidden,
        attn_implementation=implementation,
        **more,
    )
    return transformers.BertModel(config)


def _opt(layers: int, hidden: int, **more: Any) -> nn.Module:
    config = transformers.OPTConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_attention_heads=hidden // 32,
        ffn_dim=4 * hidden,
        activation_function="relu",
        **more,
    )
    return transformers.OPTForCausalLM(config)


_TINY = {"vocab_size": 500, "max_position_embeddings": 64}

ARCHITECTURES = {
    "resnet18": Architecture(tv.resnet18, tv.resnet18, 1 + 2 * 8),
    "resnet34": Architecture(tv.resnet34, lambda: tv.ResNet(BasicBlock, [1, 2, 1, 1]), 1 + 2 * 16),
    "resnet50": Architecture(tv.resnet50, lambda: tv.ResNet(Bottleneck, [1, 1, 1, 1]), 1 + 3 * 16),
    "vgg16": Architecture(tv.vgg16, lambda: _vgg(False), 13 + 2),
    "vgg16_bn": Architecture(tv.vgg16_bn, lambda: _vgg(True), 13 + 2),
    # the first block does not expand
    "mobilenet_v2": Architecture(
        tv.mobilenet_v2, lambda: tv.mobilenet_v2(width_mult=0.25), 1 + 1 + 2 * 16 + 1
    ),
    "efficientnet_lite0": Architecture(
        lambda: timm.create_model("efficientnet_lite0"),
        lambda: timm.create_model("efficientnet_lite0"),
        1 + 1 + 2 * 15 + 1,
    ),
    "densenet121": Architecture(
        tv.densenet121, lambda: tv.DenseNet(8, (2, 2, 2, 2), 16), 1 + 2 * 58 + 3 + 1
    ),
    "squeezenet1_1": Architecture(tv.squeezenet1_1, tv.squeezenet1_1, 1 + 3 * 8 + 1),
    "convnext_tiny": Architecture(tv.convnext_tiny, _convnext, 3 + 3 + 9 + 3),
    "swin_t": Architecture(tv.swin_t, _swin, 2 + 2 + 6 + 2, "export"),
    "vit_b_16": Architecture(tv.vit_b_16, _vit, 12),
    "deit_tiny": Architecture(
        lambda: timm.create_model("deit_tiny_patch16_224"),
        lambda: timm.create_model(
            "deit_tiny_patch16_224", img_size=64, embed_dim=48, depth=4, num_heads=3
        ),
        12,
    ),
    "bert": Architecture(lambda: _bert(12, 768), lambda: _bert(4, 64, **_TINY), 12, "export", True),
    "minilm": Architecture(
        lambda: _bert(6, 384),
        lambda: _bert(4, 64, "eager", **_TINY),
        6,
        "export",
        True,
    ),
    "opt": Architecture(
        lambda: _opt(12, 768), lambda: _opt(4, 64, **_TINY), 12, "export", tokens=True
    ),
}


def build(name: str, full: bool = False) -> nn.Module:
    """A model in evaluation mode, its weights and running statistics random and none of them 0."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = (architecture.full if full else architecture.small)()
    for parameter in model.parameters():
        if not parameter.any():  # some heads start at zero, and with them all outputs
            nn.init.normal_(parameter, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval()


def inputs(name: str, full: bool = False, batch: int = 2) -> Tensor | dict[str, Tensor]:
    """Example inputs: images, or tokens of which the second sample has some padding."""
    generator = torch.Generator().manual_seed(1)
    if ARCHITECTURES[name].tokens:
        length = 64 if full else 12
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[1:, 3 * length // 4 :] = 0
        ids = torch.randint(0, 500, (batch, length), generator=generator)
        return {"input_ids": ids, "attention_mask": mask}
    size = 224 if full else 64
    return torch.randn(batch, 3, size, size, generator=generator)


def call(model: nn.Module, example: Tensor | dict[str, Tensor]) -> Any:
    """Run a model on example inputs; it returns no cache, as no traced graph does."""
    with torch.no_grad(), without_cache(model):
        return model(**example) if isinstance(example, dict) else model(example)
