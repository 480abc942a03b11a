"""What the cases on single tensors share: shapes, the fused op, and the check against its twin."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import layer_collapse
from layer_collapse.measure.rectifiers import RELU, RELU6, Call, Kind
from layer_collapse.ops.eager import rectify_eager
from layer_collapse.ops.rectify import counts_of, new_ledger, rectify_reference

MB = 1 << 20


@dataclass(frozen=True)
class Layout:
    """How a tensor of a network lies in memory; ``str`` of it names the case."""

    name: str  # "nchw", "channels_last" or "tokens"
    shape: tuple[int, ...]

    @property
    def channel_dim(self) -> int:
        return -1 if self.name == "tokens" else 1

    def sample(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random signs; as many bytes in a half type as in float32."""
        first = self.shape[0] * (4 // dtype.itemsize)
        x = torch.randn(first, *self.shape[1:], dtype=dtype)
        channels_last = self.name == "channels_last"
        return x.to(memory_format=torch.channels_last) if channels_last else x

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}"


def full(value: Any) -> Any:
    """A parameter that ``--quick`` leaves out."""
    return pytest.param(value, marks=pytest.mark.full)


LARGE = (
    Layout("nchw", (64, 64, 16, 16)),
    full(Layout("nchw", (64, 512, 7, 7))),
    full(Layout("nchw", (128, 64, 32, 32))),
    Layout("channels_last", (64, 64, 16, 16)),
    full(Layout("channels_last", (64, 512, 7, 7))),
    full(Layout("channels_last", (128, 64, 32, 32))),
    full(Layout("tokens", (256, 64, 64))),
    Layout("tokens", (128, 65, 192)),
    full(Layout("tokens", (16, 128, 1024))),
    Layout("tokens", (8, 128, 4096)),
)
KINDS = (RELU, RELU6)
#: What torch.relu and F.relu6 call.
TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": torch._C._nn.relu6,
}
TORCH_INPLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": torch._C._nn.relu6_,
}


def fused(
    kind: Kind, x: Tensor, channel_dim: int, inplace: bool = False
) -> Callable[[Tensor], Callable[[], Any]]:
    """``fused(...)(z)`` is the call that a tracked model makes in eager mode; checked by its twin.

    It is a Python function: its frame is ours to pay. What a tracked module costs on top has a
    claim of its own, see ``test_call_overhead.py``.
    """
    channels = x.shape[channel_dim]
    ledger, twin = new_ledger(kind, channels), new_ledger(kind, channels)

    def call(z: Tensor) -> Callable[[], Any]:
        return partial(rectify_eager, kind, z, ledger, channels, channel_dim, 0.0, inplace)

    own = x.clone()
    result = call(own)()
    expected = rectify_reference(Call(kind, x), twin, channel_dim)
    torch.testing.assert_close(own if inplace else result, expected, rtol=0, atol=0)
    assert torch.equal(counts_of(ledger, kind), counts_of(twin, kind))
    return call


def need(option: str) -> None:
    """Skip a case whose option ``track`` does not have."""
    if option not in inspect.signature(layer_collapse.track).parameters:
        pytest.skip(f"layer_collapse.track has no {option}")
