"""A folder of tensors in safetensors files, by every process its part; nothing is unpickled.

torch.distributed.checkpoint decides who writes what, and reads it for any number of processes. What
it would trust in a file (sizes, offsets) is compared with what is expected before anything is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from ..files import check_header
from ..ranks import Group
from ..sharding import local

__all__ = ["check_content", "read_tensors", "write_tensors"]


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], group: Group) -> None:
    """Write tensors, spread or not; a tensor that is not spread is the same on all processes.

    Raises:
        OSError: on all processes if one cannot write its part.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # safetensors takes each byte once, in C order: a copy of what shares its memory (tied weights).
    seen: set[int] = set()
    own: dict[str, Any] = {}
    for name, tensor in tensors.items():
        storage = local(tensor).untyped_storage().data_ptr()
        shared = storage != 0 and storage in seen
        own[name] = tensor.detach().clone() if shared else tensor.detach()
        own[name] = own[name].contiguous()
        seen.add(storage)
    _quietly(
        lambda **how: save(
            own, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True), **how
        ),
        group,
    )


def check_content(folder: Path, expected: Mapping[str, Any]) -> None:
    """Whether the headers of the files in ``folder`` describe the tensors of ``expected``, each
    element once: nothing is missing, nothing overlaps.

    Args:
        expected: shape and dtype by name, see :func:`~layer_collapse.resume.tree.described`.

    Raises:
        ValueError: they do not.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    for path in sorted((folder / "tensors").iterdir()):
        check_header(path)
    try:
        metadata = HuggingFaceStorageReader(str(folder / "tensors")).read_metadata()
    except (
        *(SafetensorError, KeyError, TypeError, AttributeError, IndexError, ValueError),
        RecursionError,
    ) as error:
        raise ValueError(f"a header is malformed ({error!s:.80})") from error
    found = metadata.state_dict_metadata
    if odd := sorted(set(found) ^ set(expected)):
        raise ValueError(f"the files lack, or should not have, {odd[0]!r:.80}")
    for name, (shape, dtype) in expected.items():
        _check_parts(name, list(shape), dtype, found[name])


def _check_parts(name: str, shape: list[int], dtype: str, found: Any) -> None:
    parts = sorted((list(part.offsets), list(part.sizes)) for part in found.chunks)
    known = str(found.properties.dtype) == f"torch.{dtype}"
    for offsets, sizes in parts:
        fits = len(offsets) == len(sizes) == len(shape) and all(
            type(o) is int and o >= 0 and o + s <= n
            for o, s, n in zip(offsets, sizes, shape, strict=True)
        )
        if not (known and fits):
            raise ValueError(f"{name!r:.80} has another shape or dtype in the files")
    held = [p for p in parts if 0 not in p[1]]
    volume = sum(_product(sizes) for _, sizes in held)
    for i, (offsets, sizes) in enumerate(held):
        for others, lengths in held[i + 1 :]:
            if shape and others[0] >= offsets[0] + sizes[0]:
                break  # sorted by the first dim: all that follow lie behind
            if all(o < p + m and p < o + n for o, n, p, m in zip(offsets, sizes, others, lengths)):  # noqa: B905
                raise ValueError(f"parts of {name!r:.80} overlap in the files")
    if volume != _product(shape):
        raise ValueError(f"parts of {name!r:.80} are missing in the files")


def _product(sizes: list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def read_tensors(folder: Path, tensors: dict[str, Tensor], group: Group) -> None:
    """Fill ``tensors`` in place with this process's part of what :func:`write_tensors` wrote.

    Raises:
        OSError: on all processes if one cannot read.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    _quietly(
        lambda **how: load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), **how),
        group,
    )


def _quietly(call: Any, group: Group) -> None:
    """``call``, alone or with the other processes; what goes wrong, in one sentence."""
    from torch.distributed.checkpoint.api import CheckpointException

    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are no processes, or an old layout
            call(process_group=group, no_dist=alone)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise OSError(
            f"rank {rank}: {str(cause).splitlines()[0] if str(cause) else cause!r}"
        ) from error
    except SafetensorError as error:
        raise OSError(f"{error!s:.300}") from error
