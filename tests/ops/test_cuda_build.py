"""What a build without CUDA says, and what one with CUDA says on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch

from layer_collapse.measure.rectifiers import KINDS
from layer_collapse.ops import cuda
from layer_collapse.ops.rectify import new_ledger


@pytest.mark.skipif(cuda.BUILT, reason="this build has CUDA")
def test_a_cpu_build_refuses_cuda_tensors_in_one_sentence() -> None:
    # No CUDA tensor exists here: the kernel is called as the dispatcher would call it.
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    op = torch.ops.layer_collapse.rectify.default
    with pytest.raises(
        RuntimeError, match="built without CUDA; rebuild with LAYER_COLLAPSE_CUDA=1"
    ):
        op.redispatch(keys, torch.ones(2, 3), new_ledger(KINDS["relu"], 3), 0, 1, 0.0, None, None)


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
