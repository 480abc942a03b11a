"""Folding widens a block at a time: what that costs in memory, and that it costs no accuracy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layer_collapse.reduce import float64, storing
from layer_collapse.reduce.fold import fold
from layer_collapse.reduce.gate import AffineGate

from . import models

LIMIT = 1.5  # times the model's size, beyond the model itself


class Block(nn.Module):
    """Attention, and an MLP whose rectifier is a gate with a third of its neurons off."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        scale = (torch.arange(4 * width) % 3 > 0).to(torch.get_default_dtype())
        self.act = AffineGate(scale, torch.zeros(4 * width), -1)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        split = self.qkv(self.norm1(x)).view(n, tokens, 3, 4, width // 4)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.proj(mixed.reshape(n, tokens, width))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


def transformer(width: int, depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, width), *(Block(width) for _ in range(depth)), nn.Linear(width, 10)
    )


def gated(width: int, depth: int) -> nn.Sequential:
    """Every layer changes and none leaves: the most that may wait."""
    torch.manual_seed(0)
    layers = list[nn.Module]()
    for _ in range(depth):
        gate = AffineGate(torch.rand(width), torch.randn(width), 1)
        layers += [nn.Linear(width, width), gate, nn.ReLU()]
    return nn.Sequential(*layers)


def headed(width: int, depth: int) -> nn.Sequential:
    """Convolutions and, with four fifths of all weights, one Linear: what VGG looks like.

    A third of its neurons is off, the others are scaled.
    """
    torch.manual_seed(0)
    layers = list[nn.Module]()
    for number in range(depth):
        layers += [nn.Conv2d(width if number else 3, width, 3, padding=1), nn.ReLU()]
    hidden = 9 * depth * width // 16
    layers += [nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(49 * width, hidden)]
    scale = torch.rand(hidden) * (torch.arange(hidden) % 3 > 0)
    return nn.Sequential(
        *layers, AffineGate(scale, torch.zeros(hidden)), nn.Linear(hidden, hidden // 8), nn.ReLU(),
        nn.Linear(hidden // 8, 10),
    )  # fmt: skip


def classifier(width: int, depth: int) -> nn.Sequential:
    """VGG's own head behind one convolution: 25088-4096-4096-1000 at a width of 512.

    Two gates, of which a few neurons are off: all three layers become one.
    """
    torch.manual_seed(0)
    hidden = 8 * width

    def gate() -> AffineGate:
        scale = torch.rand(hidden) * (torch.arange(hidden) % 100 > 0)
        return AffineGate(scale, torch.zeros(hidden))

    return nn.Sequential(
        nn.Conv2d(3, width, depth, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(7), nn.Flatten(),
        nn.Linear(49 * width, hidden), gate(), nn.Dropout(),
        nn.Linear(hidden, hidden), gate(), nn.Dropout(), nn.Linear(hidden, 2 * width),
    )  # fmt: skip


def normed(width: int, depth: int) -> nn.Sequential:
    """Convolutions, each with a batch norm to fold, one rectifier in three a gate."""
    torch.manual_seed(0)
    layers = list[nn.Module]()
    for number in range(depth):
        conv = nn.Conv2d(width if number else 3, width, 3, padding=1, bias=False)
        gate = AffineGate(torch.rand(width) * (torch.arange(width) % 3 > 0), torch.zeros(width))
        norm = nn.BatchNorm2d(width)
        layers += [conv, norm, gate if number % 3 == 1 else nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def size(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that live at once, made since it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.live = dict[int, tuple[StorageWeakRef, int]]()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        before = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        self.live = {key: one for key, one in self.live.items() if not one[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(nbytes for _, nbytes in self.live.values()))
        return result


def peak(call: Callable[[], object]) -> int:
    """Most bytes in tensors that ``call`` made and that lived at once."""
    with Memory() as memory:
        call()
    return memory.most


def test_the_accounting_sees_what_lives_together() -> None:
    def two_then_one() -> None:
        a = torch.zeros(1000)
        b = torch.zeros(500)
        del a, b
        torch.zeros(1200)

    assert peak(two_then_one) == 6000
    kept = torch.zeros(10)
    assert peak(lambda: kept.view(2, 5).add_(1)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [transformer, gated, headed, classifier, normed])
def test_peak_of_a_small_model(monkeypatch, build, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    # wide enough for what is kept per channel to be small beside the weights, as it is at full size
    widths = {
        transformer: (64, 8), gated: (480, 8), headed: (64, 8), classifier: (32, 3),
        normed: (64, 12),
    }  # fmt: skip
    model = build(*widths[build]).to(dtype)
    whole = size(model)
    monkeypatch.setattr(storing, "BUDGET", whole // 12)  # as 32 MiB to 100 M float32 parameters
    monkeypatch.setattr(float64, "BLOCK", whole // 384)
    # images small enough for activations not to matter beside the weights
    shapes = {transformer: (1, 2, 8), gated: (2, 480), normed: (1, 3, 4, 4)}
    x = torch.randn(shapes.get(build, (1, 3, 8, 8)))
    used = peak(lambda: fold(model, x.to(dtype)))
    print(f"{used / whole:.2f} x the model")
    assert 0.3 * whole < used <= LIMIT * whole


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "build",
    ["transformer(1024, 8)", "gated(3200, 10)", "classifier(512, 3)", "normed(512, 44)"],
)
def test_peak_of_100_million_parameters(build: str, dtype: str) -> None:
    code = f"""
import resource, time, torch
from layer_collapse.reduce.fold import fold
from tests.reduce.test_memory import *
def highest():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.set_default_dtype(torch.{dtype})  # no larger copy to be made first
fold(transformer(32, 1), torch.randn(1, 2, 8))  # what torch itself loads and keeps
model = {build}
first = model[0]
x = torch.randn(2, 64, 8) if isinstance(model[1], Block) else torch.randn(
    *(4, 3200) if isinstance(first, nn.Linear) else (2, 3, 14, 14))
before, start = highest(), time.perf_counter()
report = fold(model, x).report
seconds = time.perf_counter() - start
parameters = sum(p.numel() for p in model.parameters())
print(parameters, (highest() - before) / size(model), seconds, len(report.folds), report.max_rel)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, cwd=root,
        # What is freed goes back to the system: glibc would raise this threshold by itself and keep
        # up to a third of the model's size in pieces, more or less from run to run.
        env={**os.environ, "PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": str(1 << 17)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parameters, ratio, seconds, folds, error = map(float, done.stdout.split())
    print(f"{build} {dtype}: {ratio:.2f} x the model, {seconds:.1f} s, {error:.1e} relative")
    assert parameters > 1e8
    assert folds >= (6 if "classifier" in build else 10)
    assert ratio <= LIMIT


# The same result in blocks, and nearly the same with every fold rounded


@pytest.mark.parametrize("name", sorted(models.MODELS))
@pytest.mark.parametrize("kinds", [["on", "mixed", "off"], ["six", "slope", "empty"]])
def test_blocks_change_nothing(monkeypatch, name: str, kinds: list[str]) -> None:
    model = models.make(name, kinds, 1, 0.3).double()
    x = models.inputs(model, torch.float64)
    expected = fold(model, x)
    monkeypatch.setattr(float64, "BLOCK", 7)
    monkeypatch.setattr(storing, "BUDGET", 0)
    result = fold(model, x)
    assert [(f.name, f.rule) for f in result.report.folds] == [
        (f.name, f.rule) for f in expected.report.folds
    ]
    for key, value in expected.model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_rounding_every_fold_stays_within_the_tolerance(
    monkeypatch, name: str, dtype: torch.dtype
) -> None:
    """Norms, gates and merges on one layer: as many roundings as there are folds."""
    model = models.make(name, ["on", "slope", "six"], 2).to(dtype)
    x = models.inputs(model, dtype)
    once = fold(model, x).report
    monkeypatch.setattr(float64, "BLOCK", 7)
    monkeypatch.setattr(storing, "BUDGET", 0)
    report = fold(model, x).report
    print(f"{name} {dtype}: rounded once {once.max_rel:.1e}, every time {report.max_rel:.1e}")
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert len(report.folds) == len(once.folds) >= 2
    assert report.max_rel <= limit


def test_weights_in_float64_wait_up_to_the_budget(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    waiting = storing.Waiting()
    monkeypatch.setattr(storing, "BUDGET", 8 * 16 * 2)
    dtypes = {f"{n}.{t}": torch.float32 for n in "abc" for t in ("weight", "bias")}
    taken = {n: waiting.take(n, nn.Linear(4, 4).double(), dtypes) for n in "abc"}
    assert [m.weight.dtype for m in taken.values()] == [torch.float64] * 2 + [torch.float32]
    assert all(m.bias.dtype == torch.float64 for m in taken.values())
    del taken["a"]  # it left the graph: there is room again
    assert waiting.take("c", nn.Linear(4, 4).double(), dtypes).weight.dtype == torch.float64


def test_product_and_linear_by_blocks(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    outer, inner = torch.randn(13, 7), torch.randn(7, 11)
    expected = outer.double() @ inner.double()
    assert float64.product(outer, inner).dtype == torch.float64
    torch.testing.assert_close(float64.product(outer, inner), expected)
    layer, x = nn.Linear(7, 13), torch.randn(2, 3, 7).double()
    whole = float64.call(layer, [x])
    monkeypatch.setattr(float64, "BLOCK", 20)
    assert float64.product(outer, inner).dtype == torch.float32
    assert torch.equal(float64.product(outer, inner), expected.float())
    torch.testing.assert_close(float64.call(layer, [x]), whole, rtol=1e-14, atol=1e-14)
    assert layer.weight.dtype == torch.float32
    assert [s.stop - s.start for s in float64.blocks(layer.weight)] == [2] * 6 + [1]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution_by_blocks(monkeypatch, mode: str, dims: int) -> None:  # type: ignore[no-untyped-def]
    """Some output channels at a time: the same numbers, and never all of the weight widened."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(3, 7, 3, stride=2, padding=1, dilation=2, padding_mode=mode).to(torch.bfloat16)
    given = [torch.randn(2, 3, *[8] * dims).double(), torch.randn(3, *[8] * dims).double()]
    whole = [float64.call(layer, [x]) for x in given]
    monkeypatch.setattr(float64, "BLOCK", layer.weight.numel() // 3)
    widened = list[int]()
    monkeypatch.setattr(float64, "wide", lambda t: widened.append(t.numel()) or t.double())
    for x, expected in zip(given, whole, strict=True):
        torch.testing.assert_close(float64.call(layer, [x]), expected, rtol=1e-13, atol=1e-13)
    assert max(widened) <= float64.BLOCK


@pytest.mark.parametrize(
    "layer",
    [nn.Embedding(5, 3), nn.Embedding(5, 3, max_norm=0.5), nn.EmbeddingBag(5, 3)],
    ids=["plain", "renormalised", "bag"],
)
def test_embeddings_in_float64(layer: nn.Module) -> None:
    index = torch.tensor([[0, 4], [2, 1]])
    got = float64.call(layer.eval(), [index])
    expected = layer.double()(index)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
