"""What several test files share."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from layer_collapse.measure.rectifiers import KINDS, Call, Kind
from layer_collapse.ops.rectify import new_ledger, rectify_reference

ALL_KINDS = tuple(KINDS.values())
#: The kinds whose torch kernel the fused op replaces, and those that torch can run in place.
INPLACE_KINDS = tuple(kind for kind in ALL_KINDS if kind.name not in ("prelu", "gelu", "gelu_tanh"))
SLOPE = 0.3
INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    """Equal in dtype, shape, strides and bits (-0.0 is not 0.0); NaN stands for every NaN."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.stride() == expected.stride()
    assert torch.equal(got.isnan(), expected.isnan())
    integer = INTEGERS[got.dtype]
    same = got.contiguous().view(integer) == expected.contiguous().view(integer)
    assert (same | got.isnan()).all()


def special_values(dtype: torch.dtype) -> Tensor:
    """Where activations bend, what is not finite, both zeros, denormals and the extremes."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal / 4
    nan, inf = float("nan"), float("inf")
    values = [0.0, -0.0, nan, inf, -inf, tiny, -tiny, info.max, info.min, 1e-3, -1e-3, 1.0, -1.0]
    knees = torch.tensor([-3.0, 3.0, 6.0], dtype=dtype)
    around = [torch.nextafter(knees, torch.full_like(knees, side)) for side in (-inf, inf)]
    return torch.cat([torch.tensor(values, dtype=dtype), knees, *around])


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values on both sides of every knee, a fifth of them special."""
    return _sample(shape, dtype, seed).clone()


@cache
def _sample(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * 4).to(dtype)
    special = special_values(dtype)
    chosen = special[torch.randint(len(special), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.2, chosen, x)


def call_of(kind: Kind, x: Tensor, channel_dim: int = 1, inplace: bool = False) -> Call:
    """A call of ``kind`` on x; PReLU gets a slope per channel where torch can apply it."""
    weight = None
    if kind.name == "prelu":
        on_dim_one = x.dim() > 1 and channel_dim % x.dim() == 1
        weight = torch.linspace(-0.5, 1.5, x.shape[1] if on_dim_one else 1, dtype=x.dtype)
        weight = weight.to(x.device)
    slope = SLOPE if kind.name == "leaky_relu" else 0.0
    return Call(kind, x, slope=slope, weight=weight, inplace=inplace)


def reference_of(
    kind: Kind, x: Tensor, channel_dim: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and ledger of the plain-PyTorch twin."""
    ledger = new_ledger(kind, x.shape[channel_dim], x.device)
    return rectify_reference(call_of(kind, x, channel_dim), ledger, channel_dim, valid), ledger


class Switch(nn.Module):
    """Control flow that depends on data, around a rectifier: nothing can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) if float(x.sum()) > 0 else x
