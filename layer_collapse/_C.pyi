"""Types of the native module (csrc/module.cpp)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def build_info() -> dict[str, Any]: ...
def rectify_memory(
    ledger: int,
    channels: int,
    kind: int,
    slope: float,
    x: int,
    y: int,
    shape: tuple[int, ...],
    channel_dim: int,
    dtype: int,
    channels_last: bool,
    /,
) -> bool: ...
def masked_sgd_memory(
    tensors: bytes,
    grads: list[int],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    /,
) -> None: ...
def masked_adamw_memory(
    tensors: bytes,
    grads: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    /,
) -> None: ...
def entropy_budget(
    entropy: Sequence[float], importance: Sequence[float], caps: Sequence[int], total: int
) -> list[int]: ...
def round_to_total(wanted: Sequence[float], caps: Sequence[int], total: int) -> list[int]: ...
def pack_mask(alive: NDArray[np.bool_]) -> NDArray[np.int32]: ...
def unpack_mask(words: NDArray[np.int32], n: int) -> NDArray[np.bool_]: ...
def count_alive(words: NDArray[np.int32]) -> int: ...
