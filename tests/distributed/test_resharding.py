"""torch.distributed.checkpoint: what 2 processes save, 4 load, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from pool import Ranks
from spread import assert_equal, data, net, whole_masks, whole_weights
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from layer_collapse import MaskedAdamW, MaskedSGD, Masks
from layer_collapse.sharding import full, is_sharded


def _job(kind: str, layout: str = "fsdp") -> tuple[Any, Masks, Any]:
    """``layout``: "whole", "fsdp", "tensor" parallel, or "both" on 2 x 2 processes."""
    tensor_parallel = layout in ("tensor", "both")
    model: Any = net(hidden=12 if tensor_parallel else 13)
    mesh = None
    if tensor_parallel:
        uneven = RowwiseParallel(input_layouts=Replicate())  # 6 and 9 columns
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        plan |= {"stem": uneven, "head": uneven}
        rows = 2 if layout == "both" else 1
        grid = (rows, dist.get_world_size() // rows)
        meshes = init_device_mesh("cpu", grid, mesh_dim_names=("data", "tensor"))
        parallelize_module(model, meshes["tensor"], plan)
        mesh = meshes["data"]
    if layout in ("fsdp", "both"):
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    masks = Masks({n: p for n, p in model.named_parameters() if n != "stem.bias"})
    if kind == "sgd":
        return model, masks, MaskedSGD(model.parameters(), 0.1, 0.9, masks=masks)
    return model, masks, MaskedAdamW(model.parameters(), 0.01, masks=masks)


def _step(model: Any, optimizer: Any) -> None:
    x, y = data(40)  # all of it on every process, as tensor parallelism asks
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def _everything(model: Any, masks: Masks, optimizer: Any) -> dict[str, Tensor]:
    """Weights, masks and optimiser state, whole."""
    result = {f"weight {name}": value for name, value in whole_weights(model).items()}
    result |= {f"mask {name}": value for name, value in whole_masks(masks).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            result[f"{key} {name}"] = full(value).clone()
    return result


def _save(
    folder: Path, kind: str, old: Path | None = None, layout: str = "fsdp"
) -> dict[str, Tensor]:
    """Train, prune and save; from an older checkpoint if there is one."""
    model, masks, optimizer = _job(kind, layout)
    if old is None:
        _step(model, optimizer)
        masks.prune_(masks.shares(120))
        _step(model, optimizer)
        assert 0.3 < masks.sparsity() < 0.4
    else:
        _load_into(old, model, masks, optimizer)
    dcp.save(
        {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
            "masks": masks,
        },
        checkpoint_id=folder,
    )
    return _everything(model, masks, optimizer)


def _load_into(folder: Path, model: Any, masks: Masks, optimizer: Any) -> None:
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "masks": masks,
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    masks.check_()
    masks.check_ranks()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_from_two_ranks_to_four_and_back(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    saved = ranks(2, _save, tmp_path / "two", kind)
    on_four = ranks(4, _save, tmp_path / "four", kind, tmp_path / "two")
    back = ranks(2, _save, tmp_path / "back", kind, tmp_path / "four")
    for state in (*saved, *on_four, *back):
        assert_equal(state, saved[0])


@pytest.mark.parametrize("layout", ["tensor", "both"])
def test_tensor_parallel_weights_and_masks(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    """Split along either dim, or along both meshes; "both" is on 4 processes alone."""
    saved = ranks(2, _save, tmp_path / "two", "adamw", None, "tensor")
    on_four = ranks(4, _save, tmp_path / "four", "adamw", tmp_path / "two", layout)
    back = ranks(2, _save, tmp_path / "back", "adamw", tmp_path / "four", "tensor")
    for state in (*saved, *on_four, *back):
        assert_equal(state, saved[0])


def _optimizer_brings_masks(folder: Path) -> None:
    """The optimiser's own state is enough: it holds the masks too."""
    model, masks, optimizer = _job("adamw")
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    assert masks.is_dense
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert 0.3 < masks.sparsity() < 0.4
    masks.check_()


def test_the_optimizer_state_brings_the_masks(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, _save, tmp_path / "two", "adamw")
    ranks(4, _optimizer_brings_masks, tmp_path / "two")


def _into_one_process(folder: Path) -> dict[str, Tensor]:
    """A plain model, e.g. to fold it, takes masks that were saved from shards."""
    model = net()
    masks = Masks({n: p for n, p in model.named_parameters() if n != "stem.bias"})
    bools = {name: masks.bool_mask(name) for name in masks.names}
    state: Any = {"model": model.state_dict(), "masks": {"words": bools}}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    masks.load_words(state["masks"]["words"])
    masks.check_()
    return {f"mask {name}": masks.bool_mask(name) for name in masks.names}


def test_a_single_process_reads_the_masks_of_shards(ranks: Ranks, tmp_path: Path) -> None:
    saved = ranks(4, _save, tmp_path / "four", "sgd")[0]
    (masks,) = ranks(1, _into_one_process, tmp_path / "four")
    assert_equal(masks, {name: mask for name, mask in saved.items() if name.startswith("mask")})


def _replicated(folder: Path, load: bool) -> dict[str, Tensor]:
    model, masks, optimizer = _job("adamw", "whole")
    parallel = DistributedDataParallel(model)
    if load:
        _load_into(folder, model, masks, optimizer)
    else:
        _step(parallel, optimizer)
        masks.prune_(masks.shares(120))
        _step(parallel, optimizer)
        optim = get_optimizer_state_dict(model, optimizer)
        state = {"model": get_model_state_dict(model), "optimizer": optim, "masks": masks}
        dcp.save(state, checkpoint_id=folder)
    assert not any(is_sharded(p) for p in model.parameters())
    return _everything(model, masks, optimizer)


def test_replicated_masks_load_on_any_number_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    saved = ranks(2, _replicated, tmp_path / "ddp", False)
    for state in (*saved, *ranks(4, _replicated, tmp_path / "ddp", True)):
        assert_equal(state, saved[0])


def _refuses_other_masks() -> None:
    _, masks, _ = _job("sgd")
    before = whole_masks(masks)
    for wrong in (torch.ones(13, 8, dtype=torch.bool), torch.ones(13, 9)):
        with pytest.raises(
            ValueError, match=r"the words of 'first\.weight' must be int32 of shape"
        ):
            masks.load_words({"head.weight": masks.bool_mask("head.weight"), "first.weight": wrong})
    assert_equal(whole_masks(masks), before)
    dist.barrier()


def test_masks_of_another_shape_are_refused(ranks: Ranks) -> None:
    ranks(2, _refuses_other_masks)
