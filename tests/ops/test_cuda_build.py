"""What a build without CUDA says, and what one with CUDA says on a machine without a GPU."""

from __future__ import annotations

import importlib
import re

import pytest
import torch

from layer_collapse.measure.rectifiers import KINDS
from layer_collapse.ops import cuda
from layer_collapse.ops.rectify import new_ledger


@pytest.mark.skipif(cuda.BUILT, reason="this build has CUDA")
def test_a_build_without_cuda_refuses_cuda_tensors_in_one_sentence() -> None:
    # No CUDA tensor exists here: the kernel is called as the dispatcher would call it.
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    op = torch.ops.layer_collapse.rectify.default
    with pytest.raises(RuntimeError, match=re.escape(cuda.REFUSAL)):
        op.redispatch(keys, torch.ones(2, 3), new_ledger(KINDS["relu"], 3), 0, 1, 0.0, None, None)


def test_what_keeps_the_kernels_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    built = True

    def import_module(name: str) -> None:
        assert name == "layer_collapse._C_cuda"
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if built else None)
    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    said = cuda._load()
    assert said.startswith("layer_collapse's CUDA kernels do not load beside this torch (libcudart")
    assert said.endswith("; rebuild with LAYER_COLLAPSE_CUDA=1")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda._load() == (
        "layer_collapse was built with CUDA, but this torch has none; install one that has"
    )
    built = False
    assert cuda._load() == (
        "layer_collapse was built without CUDA; rebuild with LAYER_COLLAPSE_CUDA=1"
    )
    built = True
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    assert cuda._load() == ""


def test_batch_norms_name_what_to_call_on_cuda() -> None:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    op = torch.ops.layer_collapse.bn_rectify.default
    x, ledger = torch.ones(2, 3), new_ledger(KINDS["relu"], 3)
    with pytest.raises(RuntimeError, match="torch's batch norm followed by the fused rectifier"):
        op.redispatch(keys, x, None, None, None, None, ledger, True, 0.1, 1e-5, 0, 0.0)


@pytest.mark.skipif(not cuda.BUILT, reason="this build has no CUDA")
def test_a_cuda_build_registers_every_op() -> None:
    for op in cuda._OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"layer_collapse::{op}", "CUDA")


@pytest.mark.skipif(
    not cuda.BUILT or torch.cuda.is_available(), reason="needs a CUDA build and no GPU"
)
def test_without_a_driver_torch_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"no NVIDIA driver|No CUDA GPUs"):
        torch.ones(2, 3, device="cuda")
