"""Residual branches that hardly matter leave, and the result says what that changed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layer_collapse
from layer_collapse import BlockRemoval, fold, refresh_batch_norm, remove_blocks
from layer_collapse.reduce.gate import ConstantBias

from . import models
from .test_channels import ResNet


def batches(model: nn.Module, count: int = 3, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (size, *model.example[1:])  # type: ignore[index]
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def weakened(layer: nn.Module, factor: float) -> None:
    """The layer's weights and its bias's distance from zero, times a factor."""
    with torch.no_grad():
        layer.weight *= factor  # type: ignore[operator]


def row(result: BlockRemoval, name: str):  # type: ignore[no-untyped-def]
    return next(r for r in result.rows if r.name == name)


def names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules()}


def by_hand(model: nn.Module, data: list[Tensor], number: int) -> tuple[float, Tensor]:
    """Contribution and mean of block ``number`` of a :class:`models.ResNet`, in float64."""
    model = copy.deepcopy(model).eval().double()
    streams, sums = [], []
    with torch.no_grad():
        for batch in data:
            x = F.relu(model.bn(model.stem(batch.double())))
            for block in model.blocks[:number]:
                x = block(x)
            block = model.blocks[number]
            streams.append(x)
            sums.append(x + block.bn2(block.conv2(block.act(block.bn1(block.conv1(x))))))
    stream, whole = torch.cat(streams), torch.cat(sums)
    branch = whole - stream
    mean = branch.mean((0, 2, 3))
    gap = branch - mean.view(1, -1, 1, 1)
    return float(gap.square().mean().sqrt() / whole.square().mean().sqrt()), mean


def test_the_branch_below_the_tolerance_becomes_its_mean() -> None:
    model = models.make("resnet", ["relu", "relu", "relu"], 3)
    data = batches(model)
    model.blocks[1].conv2.weight.data *= 1e-3
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = remove_blocks(model, data, data[0], tolerance=0.02)
    assert [r.removed for r in result.rows] == [False, True, False]
    assert [r.name for r in result.rows] == [f"blocks.{i}.bn2" for i in range(3)]
    gone = row(result, "blocks.1.bn2")
    assert gone.layers == tuple(f"blocks.1.{n}" for n in ("conv1", "bn1", "act", "conv2", "bn2"))
    for number, seen in enumerate(result.rows):
        assert seen.contribution == pytest.approx(by_hand(model, data, number)[0], rel=1e-4)
    assert "above the tolerance of 0.02" in result.rows[0].reason
    assert not {"blocks.1.conv1", "blocks.1.bn2"} & names(result.model)
    constant = result.model.get_submodule("mean_of_branch_0")
    assert constant.value.shape == (6, 1, 1)
    mean = by_hand(model, data, 1)[1]
    assert torch.allclose(constant.value.flatten().double(), mean, rtol=1e-4, atol=1e-6)
    # what the result says about the error is what it is
    with torch.no_grad():
        was = torch.cat([copy.deepcopy(model).eval()(x) for x in data])
        now = torch.cat([result.model(x) for x in data])
    assert result.max_change == pytest.approx(float((now - was).abs().max()))
    assert result.rms_change == pytest.approx(float((now - was).square().mean().sqrt()))
    assert result.rms_logits == pytest.approx(float(was.square().mean().sqrt()))
    assert 0 < result.rms_change < 0.02 * result.rms_logits
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    kept = {k: v for k, v in result.model.state_dict().items() if k in before}
    assert all(torch.equal(v, before[k]) for k, v in kept.items())
    x = torch.randn(1, 3, 9, 5)  # a mean per channel serves every size
    assert result.model(x).shape == (1, 3)


def test_all_branches_and_none() -> None:
    model = models.make("resnet", ["relu", "mixed"], 4)
    data = batches(model)
    nothing = remove_blocks(model, data, data[0], tolerance=0)
    assert not any(r.removed for r in nothing.rows)
    assert (nothing.max_change, nothing.rms_change) == (0, 0)
    all_of_them = remove_blocks(model, data, data[0], tolerance=10)
    assert all(r.removed for r in all_of_them.rows)
    assert sum(isinstance(m, nn.Conv2d) for m in all_of_them.model.modules()) == 1
    assert all_of_them.max_change > 0
    folded = fold(all_of_them.model, data[0])
    assert torch.allclose(folded.model(data[1]), all_of_them.model(data[1]), atol=1e-5)


def test_constant_branches_leave_at_tolerance_zero() -> None:
    model = models.make("resnet", ["relu", "relu"], 5)
    nn.init.zeros_(model.blocks[0].conv2.weight)
    data = batches(model)
    result = remove_blocks(model, data, data[0], tolerance=0)
    assert [r.removed for r in result.rows] == [True, False]
    assert result.rows[0].contribution == 0
    assert result.refreshed == ("blocks.0.bn2",)
    stale = remove_blocks(model, data, data[0], tolerance=0, refresh=False)
    assert stale.refreshed == ()
    assert stale.max_change < 1e-5 < result.max_change


def test_a_shortcut_that_changes_the_shape_stays() -> None:
    torch.manual_seed(0)
    model = models.lively(ResNet())
    data = batches(model)
    result = remove_blocks(model, data, data[0], tolerance=10)
    assert [r.removed for r in result.rows] == [True, False]
    assert "a shortcut with weights stays" in result.rows[1].reason
    assert math.isnan(result.rows[1].contribution)
    assert {"short.0", "blocks.1.0"} <= names(result.model)
    assert "blocks.0.0" not in names(result.model)


def test_attention_free_block_leaves_wholly() -> None:
    model = models.make("vit", ["relu", "off", "gelu"], 6)
    weakened(model.proj[1], 1e-4)
    data = batches(model)
    result = remove_blocks(model, data, data[0], tolerance=1e-3)
    removed = {r.name for r in result.rows if r.removed}
    assert removed == {"proj.1", "fc2.1"}  # attention by the tolerance, the MLP as it is constant
    assert not {"norm1.1", "qkv.1", "proj.1"} & names(result.model)
    assert result.model.get_submodule("mean_of_branch_0").value.shape == (8,)
    folded = fold(result.model, data[0])
    block = {f"{name}.1" for name in ("norm1", "qkv", "proj", "norm2", "fc1", "acts", "fc2")}
    assert not block & names(folded.model)
    assert not any(isinstance(m, ConstantBias) for m in folded.model.modules())
    assert folded.report.after.depth == folded.report.before.depth
    assert torch.allclose(folded.model(data[1]), result.model(data[1]), atol=1e-5)
    # The exact rule takes the constant MLP by itself, too.
    alone = fold(remove_blocks(model, data, data[0], tolerance=1e-9).model, data[0])
    assert not {"fc1.1", "fc2.1"} & names(alone.model)
    assert "qkv.1" in names(alone.model)


class Odd(nn.Module):
    """Branches that must stay, each for another reason."""

    example = (2, 4)

    def __init__(self) -> None:
        super().__init__()
        self.hooked, self.used, self.late = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.shared = nn.Linear(4, 4)
        self.position = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        x = x + torch.tanh(self.hooked(x))
        y = self.used(x)
        x = (x + y) * y
        x = F.dropout(x, 0.1, self.training) + torch.tanh(self.late(x)).cumsum(1)
        x = x + torch.tanh(self.shared(x))
        return x + torch.tanh(self.shared(x))


def test_reasons_to_stay() -> None:
    torch.manual_seed(1)
    model = Odd()
    model.hooked.register_forward_hook(lambda *_: None)
    data = batches(model)
    result = remove_blocks(model, data, data[0], tolerance=10)
    assert [r.name for r in result.rows] == ["hooked", "used", "late", "shared", "shared"]
    assert "'hooked' has hooks" in result.rows[0].reason
    assert "used elsewhere" in result.rows[1].reason
    assert [r.removed for r in result.rows] == [False, False, True, True, True]
    assert "shared" not in names(result.model)


def test_accuracy_and_report() -> None:
    model = models.make("residual", ["relu", "gelu"], 7)
    data = [(x, torch.zeros(len(x))) for x in batches(model)]
    asked: list[nn.Module] = []

    def accuracy(given: nn.Module) -> float:
        asked.append(given)
        return 0.5 if given is model else 0.25

    result = remove_blocks(model, data, data[0][0], tolerance=10, accuracy=accuracy)
    assert asked == [model, result.model]
    assert (result.accuracy_before, result.accuracy_after) == (0.5, 0.25)
    text = str(result)
    assert "accuracy 0.5 before, 0.25 after" in text
    assert f"logits changed by at most {result.max_change:.3g}" in text
    assert "second.0" in text
    assert json.loads(json.dumps(result.to_dict()))["rows"][0]["removed"]


def test_mappings_and_bad_arguments() -> None:
    model = models.make("residual", ["relu"], 8)
    data = [{"x": x, "labels": x} for x in batches(model)]
    assert remove_blocks(model, data, {"x": data[0]["x"]}, tolerance=10).rows[0].removed
    x = data[0]["x"]
    with pytest.raises(ValueError, match=r"tolerance of 0 or more \(got -1\)"):
        remove_blocks(model, [x], x, tolerance=-1)
    with pytest.raises(ValueError, match="got nan"):
        remove_blocks(model, [x], x, tolerance=math.nan)
    with pytest.raises(ValueError, match="iterated again"):
        remove_blocks(model, iter([x]), x, tolerance=1)
    with pytest.raises(ValueError, match="got no batch"):
        remove_blocks(model, [], x, tolerance=1)


# Statistics


def test_refresh_takes_norms_that_read_constants() -> None:
    """Right after a filter is emptied its norm answers with the sign of stale statistics."""
    torch.manual_seed(2)
    model = models.make("resnet", ["relu", "relu"], 9)
    data = batches(model)
    with torch.no_grad():
        model.blocks[0].conv1.weight[2] = 0
    before = copy.deepcopy(model.state_dict())
    norm = model.blocks[0].bn1
    assert refresh_batch_norm(model, data) == ["blocks.0.bn1"]
    assert (float(norm.running_mean[2]), float(norm.running_var[2])) == (0.0, 0.0)
    beta = float(norm.bias.detach()[2])
    given = norm.eval()(torch.zeros(1, 6, 1, 1))[0, 2]
    assert float(given.detach()) == pytest.approx(beta)
    norm.train()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed <= {f"blocks.0.bn1.{n}" for n in ("running_mean", "running_var")} | {
        "blocks.0.bn1.num_batches_tracked"
    }
    assert (norm.momentum, norm.training) == (0.1, True)
    # the live channels: the average over the batches
    model.eval()
    inputs = []
    with torch.no_grad():
        for x in data:
            inputs.append(model.blocks[0].conv1(F.relu(model.bn(model.stem(x)))))
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0)
    assert torch.allclose(norm.running_mean, mean, atol=1e-5)
    assert torch.allclose(norm.running_var, var, atol=1e-5)


def test_refresh_all_and_nothing() -> None:
    model = models.make("resnet", ["relu"], 10)
    data = batches(model)
    before = copy.deepcopy(model.state_dict())
    assert refresh_batch_norm(model, data) == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert refresh_batch_norm(model, data, every=True) == [
        "bn", "blocks.0.bn1", "blocks.0.bn2",
    ]  # fmt: skip
    assert int(model.bn.num_batches_tracked) == len(data)
    assert refresh_batch_norm(models.make("residual", ["relu"], 1), [torch.randn(3, 5)]) == []


def test_statistics_are_whole_when_the_data_fail() -> None:
    model = models.make("resnet", ["relu"], 11)
    data = batches(model)

    class Failing:
        def __iter__(self) -> Iterator[Tensor]:
            yield data[0]
            raise RuntimeError("disk")

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="disk"):
        refresh_batch_norm(model, Failing(), every=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.bn.momentum == 0.1


def test_exported() -> None:
    assert {"BlockRemoval", "remove_blocks", "refresh_batch_norm"} <= set(layer_collapse.__all__)
