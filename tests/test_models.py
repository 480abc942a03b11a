"""The networks have the structure that layer removal relies on."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from layer_collapse import models

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
RECTIFIERS = {"resmlp": 6, "mlp": 6, "vit": 6, "resnet": 19, "vgg": 7}


def leaf_calls(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    graph = fx.symbolic_trace(model).graph
    modules = dict(model.named_modules())
    return [
        str(node.target)
        for node in graph.nodes
        if node.op == "call_module" and isinstance(modules[str(node.target)], kind)
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", models.NAMES)
def test_maps_images_to_logits_and_every_parameter_learns(
    name: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = models.build(name, shape, 7)
    logits = model(torch.randn(3, *shape))
    assert logits.shape == (3, 7)
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("name", models.NAMES)
def test_each_rectifier_is_its_own_module_called_once(name: str, activation: str) -> None:
    kind = {"relu": nn.ReLU, "gelu": nn.GELU}[activation]
    model = models.build(name, (1, 28, 28), 10, activation=activation)
    calls = leaf_calls(model, kind)
    owned = [key for key, module in model.named_modules() if isinstance(module, kind)]
    assert sorted(calls) == sorted(owned)
    assert len(set(calls)) == RECTIFIERS[name]
    assert not any(isinstance(m, nn.ReLU) and m.inplace for m in model.modules())


@pytest.mark.parametrize("name", models.NAMES)
def test_the_trace_holds_for_any_batch(name: str) -> None:
    model = models.build(name, (1, 28, 28), 10).eval()
    traced = fx.symbolic_trace(model)
    for count in (1, 5):
        x = torch.randn(count, 1, 28, 28)
        assert torch.equal(traced(x), model(x))


def test_first_rectifier_of_a_basic_block_is_fed_by_its_own_bn_the_second_by_the_sum() -> None:
    model = models.build("resnet", (1, 8, 8), 10, blocks=2)
    modules = dict(model.named_modules())
    seen = {"bn": 0, "sum": 0}
    for node in fx.symbolic_trace(model).graph.nodes:
        if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.ReLU):
            continue
        feeder = node.args[0]
        if str(node.target).endswith("act2"):
            assert feeder.op == "call_function"
            seen["sum"] += 1
        else:
            assert isinstance(modules[str(feeder.target)], nn.BatchNorm2d)
            assert len(feeder.users) == 1
            seen["bn"] += 1
    assert seen == {"bn": 1 + 6, "sum": 6}


@pytest.mark.parametrize("name", ["resmlp", "vit", "resnet"])
def test_a_branch_can_be_emptied_without_cutting_the_network(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, (1, 8, 8), 10).eval()
    for key, module in model.named_modules():
        if key.endswith(("fc1", "conv1")):
            nn.init.zeros_(module.weight)
    logits = model(torch.randn(4, 1, 8, 8)).detach()
    assert float(logits.std(0).max()) > 1e-3


def test_vit_attention_mixes_tokens() -> None:
    torch.manual_seed(0)
    block = models.vit.ViTBlock(8, 2, 16, "relu")
    x = torch.randn(1, 5, 8)
    y = x.clone()
    y[0, 4, 0] += 1.0  # one feature: the norm takes out a shift of all
    assert not torch.equal(block(x)[0, 0], block(y)[0, 0])


def test_options_reach_the_network() -> None:
    count = len(leaf_calls(models.build("resmlp", (1, 8, 8), 10, blocks=2), nn.ReLU))
    assert count == 2
    assert models.build("vit", (1, 28, 28), 10, patch=4).position.shape == (1, 49, 64)
    assert models.build("resnet", (1, 8, 8), 10, widths=[4]).head.in_features == 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenet", {}, r"expected one of resmlp, mlp, vit, resnet, vgg \(got 'lenet'\)"),
        (
            "mlp",
            {"blocks": 3},
            r"an option of mlp among width, layers, activation \(got 'blocks'\)",
        ),
        ("mlp", {"layers": 0}, r"expected layers to be a whole number >= 1 \(got 0\)"),
        ("mlp", {"width": "9"}, r"expected width .* \(got '9'\)"),
        ("resmlp", {"hidden": 1.5}, r"expected hidden .* \(got 1.5\)"),
        ("resmlp", {"activation": "tanh"}, r"activation relu or gelu \(got 'tanh'\)"),
        ("vit", {"patch": 5}, r"a patch that divides 28 x 28 pixels \(got 5\)"),
        ("vit", {"heads": 5}, r"a multiple of 5 heads \(got 64\)"),
        ("vgg", {"widths": (4,) * 6}, r"at least 32 pixels a side for 6 stages \(got 28 x 28\)"),
        ("vgg", {"widths": 16}, r"widths to be a list of sizes \(got 16\)"),
        ("resnet", {"widths": 16}, r"widths to be a list of sizes \(got 16\)"),
        ("resnet", {"widths": ()}, r"expected stages .* \(got 0\)"),
        ("resnet", {"widths": (16, 0)}, r"expected widths .* \(got 0\)"),
    ],
)
def test_refuses_in_one_sentence(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        models.build(name, (1, 28, 28), 10, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_image_networks_refuse_other_shapes(name: str) -> None:
    with pytest.raises(ValueError, match=r"channels, height, width\) \(got \(784,\)\)"):
        models.build(name, (784,), 10)
