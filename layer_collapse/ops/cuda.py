"""The CUDA side of the ops: a library of its own, loaded if torch has CUDA and it was built."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NoReturn

import torch

from .. import _C  # noqa: F401 - defines the ops

_OPS = (
    "rectify",
    "rectify_",
    "layer_entropies",
    "masked_sgd_",
    "masked_adamw_",
    "apply_masks_",
    "magnitude_shares",
    "magnitude_prune_",
    "magnitude_histogram",
)
#: What a CPU-only build answers to a CUDA tensor.
REFUSAL = "layer_collapse was built without CUDA; rebuild with LAYER_COLLAPSE_CUDA=1"


#: Ops that have no CUDA kernel in any build, and their answer to a CUDA tensor.
CPU_OPS = ("bn_rectify", "bn_rectify_backward")
CPU_ONLY = (
    "bn_rectify runs on the CPU; on CUDA call layer_collapse.ops.batch_norm.bn_rectify, which is "
    "torch's batch norm followed by the fused rectifier"
)


def _load() -> bool:
    """Whether the CUDA ops are there now."""
    if torch.version.cuda is None:
        return False
    if importlib.util.find_spec("layer_collapse._C_cuda") is None:
        return False
    importlib.import_module("layer_collapse._C_cuda")
    return True


def _refuse(*arguments: Any, **named: Any) -> NoReturn:
    raise RuntimeError(REFUSAL)


def _refuse_norm(*arguments: Any, **named: Any) -> NoReturn:
    raise RuntimeError(CPU_ONLY)


#: Whether this build has CUDA kernels and this torch can use them.
BUILT = _load()

_refusals = torch.library.Library("layer_collapse", "IMPL")
for _op in CPU_OPS:
    _refusals.impl(_op, _refuse_norm, "CUDA")
if not BUILT:
    for _op in _OPS:
        _refusals.impl(_op, _refuse, "CUDA")
