"""Parameters spread over processes (torch's DTensor: FSDP2, tensor parallel), as seen from one.

Importing DTensor costs a second, so it is told by what it can do, and only imported where one is
there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "count_over_shards",
    "full",
    "global_index",
    "is_sharded",
    "like_shards",
    "local",
    "local_part",
    "plain_view",
    "reshard",
    "sum_over_shards",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor."""
    if torch.compiler.is_compiling():  # which knows a DTensor's class, and none of its methods
        from torch.distributed.tensor import DTensor

        return isinstance(tensor, DTensor)
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, in the same memory; any other tensor is its own part."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def full(tensor: Tensor) -> Tensor:
    """The whole tensor. For a DTensor all of its processes must ask."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()  # type: ignore[attr-defined]


def like_shards(part: Tensor, tensor: Any) -> Tensor:
    """``part``, of the shape of ``local(tensor)``, as a tensor that is spread as ``tensor`` is."""
    if not is_sharded(tensor):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def local_part(values: Any, tensor: Any) -> Tensor:
    """What of ``values``, of the shape of ``tensor`` and spread or not, lies at ``local(tensor)``.

    Only a change from one way of spreading to another needs the other processes.
    """
    if not is_sharded(tensor):
        return full(values)
    if is_sharded(values):
        if (values.device_mesh, values.placements) == (tensor.device_mesh, tensor.placements):
            return local(values)
        values = full(values)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements
    return local(distribute_tensor(values.detach(), mesh, placements, src_data_rank=None))


def _shard_groups(tensor: Any) -> tuple[dist.ProcessGroup, ...]:
    """The process groups that the parts of ``tensor`` are spread over; none for copies."""
    if not is_sharded(tensor):
        return ()
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            "a parameter must be sharded or replicated over its device mesh (got placements "
            f"{tensor.placements})"
        )
    # Not is_shard(), which is false for the strided shards of FSDP over tensor parallel.
    return tuple(
        tensor.device_mesh.get_group(dim)
        for dim, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    )


def sum_over_shards(tensors: Sequence[Tensor], values: Tensor) -> Tensor:
    """Sums over the parts of each tensor what every process counted on its own part.

    Args:
        tensors: T tensors, spread or not, in the same order on all processes.
        values: [T, ...] int64 on their device; overwritten.

    Returns:
        ``values``. One all-reduce for all tensors that are spread alike, none for the others.
    """
    rows: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for row, tensor in enumerate(tensors):
        rows.setdefault(_shard_groups(tensor), []).append(row)
    for groups, chosen in rows.items():
        part = values[chosen]
        for group in groups:
            dist.all_reduce(part, group=group)
        values[chosen] = part
    return values


def count_over_shards(tensors: Sequence[Tensor], found: Sequence[int]) -> list[int]:
    """:func:`sum_over_shards` of one number per tensor; no tensor spread: no process is asked."""
    if not any(map(is_sharded, tensors)):
        return list(found)
    return sum_over_shards(tensors, torch.tensor(found, device=tensors[0].device)).tolist()


def global_index(tensor: Any, places: Tensor) -> Tensor:
    """Indices into ``tensor.flatten()`` of ``places``, which are indices into its local part's."""
    if not is_sharded(tensor):
        return places
    from torch.distributed.tensor import Replicate, distribute_tensor

    def along(dim: int) -> Tensor:
        """The indices in this dim that the local part holds, by the placements' own split."""
        placements: list[Any] = []
        for placement in tensor.placements:
            if placement.is_replicate() or placement.dim % tensor.dim() != dim:
                placements.append(Replicate())
            elif hasattr(placement, "split_factor"):
                placements.append(type(placement)(0, split_factor=placement.split_factor))
            else:
                placements.append(type(placement)(0))
        indices = torch.arange(tensor.shape[dim], device=places.device)
        return local(distribute_tensor(indices, tensor.device_mesh, placements, src_data_rank=None))

    result = torch.zeros_like(places)
    coordinates = torch.unravel_index(places, local(tensor).shape)
    for dim, coordinate in enumerate(coordinates):
        result = result * tensor.shape[dim] + along(dim)[coordinate]
    return result


def reshard(model: nn.Module) -> None:
    """Drops the gathered copies that FSDP2 keeps after a forward: they would hide new weights."""
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()  # type: ignore[operator]


@contextmanager
def plain_view(model: nn.Module) -> Iterator[None]:
    """Inside, a model of spread parameters looks as before it was spread, to be traced.

    Its parameters are fake tensors (shapes, no memory), and neither FSDP2 nor tensor parallel
    styles act on a call. A model without spread parameters stays as it is.
    """
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        yield
        return
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.fsdp import FSDPModule

    fakes: dict[Tensor, nn.Parameter] = {}
    undo: list[tuple[dict[str, Any], dict[str, Any]]] = []
    classes: list[tuple[nn.Module, type[nn.Module]]] = []
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        for module in model.modules():
            undo.append((module._parameters, dict(module._parameters)))  # type: ignore[arg-type]
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if parameter not in fakes:
                    with mode:
                        fake = torch.empty(
                            parameter.shape, dtype=parameter.dtype, device=parameter.device
                        )
                    fakes[parameter] = nn.Parameter(fake, parameter.requires_grad)
                module._parameters[name] = fakes[parameter]
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                undo.append((hooks, dict(hooks)))  # type: ignore[arg-type]
                for key, hook in list(hooks.items()):
                    if getattr(hook, "__module__", "").startswith("torch.distributed."):
                        del hooks[key]
            if isinstance(module, FSDPModule):
                classes.append((module, type(module)))
                order = type(module).__mro__
                module.__class__ = order[order.index(FSDPModule) + 1]
        with mode:
            yield
    finally:
        for holder, content in undo:
            holder.clear()
            holder.update(content)
        for module, original in classes:
            module.__class__ = original
