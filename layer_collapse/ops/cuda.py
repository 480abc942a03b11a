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
    "magnitude_prune_.on_device",
    "magnitude_histogram",
)
_REBUILD = "rebuild with LAYER_COLLAPSE_CUDA=1"

#: Ops that have no CUDA kernel in any build, and their answer to a CUDA tensor.
CPU_OPS = ("bn_rectify", "bn_rectify_backward")
CPU_ONLY = (
    "bn_rectify runs on the CPU; on CUDA call layer_collapse.ops.batch_norm.bn_rectify, which is "
    "torch's batch norm followed by the fused rectifier"
)


def _load() -> str:
    """Loads the CUDA ops; what keeps them out, or "" if nothing does."""
    if importlib.util.find_spec("layer_collapse._C_cuda") is None:
        return f"layer_collapse was built without CUDA; {_REBUILD}"
    if torch.version.cuda is None:
        return "layer_collapse was built with CUDA, but this torch has none; install one that has"
    try:
        importlib.import_module("layer_collapse._C_cuda")
    except ImportError as error:  # built for another release of CUDA than torch brings
        return f"layer_collapse's CUDA kernels do not load beside this torch ({error}); {_REBUILD}"
    return ""


#: Why a CUDA tensor is refused; "" if it is not.
REFUSAL = _load()
#: Whether this build has CUDA kernels and this torch can use them.
BUILT = not REFUSAL


def _refuse(*arguments: Any, **named: Any) -> NoReturn:
    raise RuntimeError(REFUSAL)


def _refuse_norm(*arguments: Any, **named: Any) -> NoReturn:
    raise RuntimeError(CPU_ONLY)


_refusals = torch.library.Library("layer_collapse", "IMPL")
for _op in CPU_OPS:
    _refusals.impl(_op, _refuse_norm, "CUDA")
if not BUILT:
    for _op in _OPS:
        _refusals.impl(_op, _refuse, "CUDA")
