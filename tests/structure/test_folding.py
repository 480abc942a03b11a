"""Public models with a third of their rectifiers linear: folded, exported, saved, all equal."""

# ruff: noqa: E402 - what is missing skips before it is imported
from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("torchvision", "timm", "transformers", "onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(needed, reason=f"needs {needed}: `make structure` installs it")

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from layer_collapse import fold, load_folded, save_folded
from layer_collapse.graph import ordered_inputs
from layer_collapse.reduce.fold import FoldResult
from layer_collapse.reduce.proof import difference, doubled

from .architectures import ARCHITECTURES, build, call, inputs
from .gating import force_gates
from .parity import onnx_error

#: onnxruntime's kernels round differently from torch's; through 50 layers this adds up.
ONNX_TOLERANCE = 1e-4


def check(name: str, full: bool = False) -> tuple[nn.Module, FoldResult]:
    """Fold a gated model and compare with the gated one, in float64 and in a fresh copy of each."""
    model, example = build(name, full), inputs(name, full)
    gated, modes = force_gates(model, example)
    assert {"on", "mixed"} <= set(modes) or len(modes) == 1
    result = fold(gated, example)
    assert result.report.folds
    assert not [refusal for refusal in result.report.refusals if refusal.rule == "cut"]
    unfolded = call(copy.deepcopy(gated).double(), doubled(example))
    folded = call(copy.deepcopy(result.model).double(), doubled(example))
    assert float(tree_leaves(unfolded)[0].std()) > 1e-6  # there is something to compare
    assert difference(folded, unfolded)[1] <= 1e-5
    exact = fold(copy.deepcopy(gated).double(), doubled(example))
    assert exact.report.max_rel <= 1e-10
    assert difference(call(exact.model, doubled(example)), unfolded)[1] <= 1e-10
    assert result.report.traced_by == ARCHITECTURES[name].traced_by
    return gated, result


def mentioned(result: FoldResult) -> set[str]:
    """Every layer that the report says a fold has changed."""
    words = {word for f in result.report.folds for word in f"{f.name} {f.detail}".split()}
    constants = {name for name, _ in result.model.named_modules() if name.startswith("constant_")}
    return {word.rstrip(":,") for word in words} | constants


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_small_models_fold(name: str, tmp_path: Path) -> None:
    gated, result = check(name)
    example = inputs(name)
    weights = gated.state_dict()
    for key, value in result.model.state_dict().items():
        if key.rpartition(".")[0] not in mentioned(result):
            assert torch.equal(value, weights[key])

    save_folded(result.model, tmp_path / "folded.safetensors")
    loaded = load_folded(tmp_path / "folded.safetensors")
    assert difference(call(loaded, example), call(result.model, example)) == (0.0, 0.0)
    assert onnx_error(result.model, example) <= ONNX_TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_sizes_fold(name: str) -> None:
    _, result = check(name, full=True)
    assert onnx_error(result.model, inputs(name, full=True)) <= ONNX_TOLERANCE


@pytest.mark.parametrize("name", ["mobilenet_v2", "bert"])
def test_folded_models_compile_and_export(name: str) -> None:
    example = inputs(name)
    gated, _ = force_gates(build(name), example)
    folded = fold(gated, example).model
    expected = call(folded, example)
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    assert difference(call(compiled, example), expected)[1] <= 1e-6
    ordered = tuple(ordered_inputs(folded, example))
    with torch.no_grad():
        program = torch.export.export(folded, ordered)
    assert difference(program.module()(*ordered), expected)[1] <= 1e-6


@pytest.mark.parametrize("name", ["swin_t", "minilm", "efficientnet_lite0"])
def test_a_process_without_the_class_loads_the_folded_model(name: str, tmp_path: Path) -> None:
    example = inputs(name)
    gated, _ = force_gates(build(name), example)
    folded = fold(gated, example).model
    save_folded(folded, tmp_path / "folded.safetensors")
    torch.save((ordered_inputs(folded, example), call(folded, example)), tmp_path / "example.pt")
    script = f"""
import sys
for module in ("torchvision", "timm", "transformers"):
    sys.modules[module] = None
import torch, layer_collapse
from layer_collapse.reduce.proof import difference
model = layer_collapse.load_folded({str(tmp_path / "folded.safetensors")!r})
example, expected = torch.load({str(tmp_path / "example.pt")!r})
torch.set_num_threads(1)
with torch.no_grad():
    assert difference(model(*example), expected)[1] <= 1e-6
"""
    subprocess.run([sys.executable, "-c", script], check=True)
