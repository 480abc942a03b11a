"""What the tests of this folder share; runs in the processes of the pool."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from layer_collapse import Masks
from layer_collapse.sharding import full


class Net(nn.Module):
    """A residual net with a module and a functional rectifier, sizes that no 2 or 4 divides."""

    def __init__(self, hidden: int = 13) -> None:
        super().__init__()
        self.stem, self.first = nn.Linear(6, 9), nn.Linear(9, hidden)
        self.act = nn.ReLU()
        self.second, self.head = nn.Linear(hidden, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.second(self.act(self.first(x)))
        return self.head(torch.relu(x))


def net(hidden: int = 13) -> Net:
    torch.manual_seed(0)
    return Net(hidden)


def data(samples: int = 37) -> tuple[Tensor, Tensor]:
    """The same on every process."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def mine(values: Tensor) -> Tensor:
    """This process's share, of uneven size."""
    return values[dist.get_rank() :: dist.get_world_size()]


def whole_masks(masks: Masks) -> dict[str, Tensor]:
    return {name: full(masks.bool_mask(name)) for name in masks.names}


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(p.detach()).clone() for name, p in model.named_parameters()}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@contextmanager
def all_reduces() -> Iterator[list[int]]:
    """Counts them: the sizes that were reduced."""
    sizes: list[int] = []
    original: Callable[..., Any] = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting)
        yield sizes


@contextmanager
def refused(message: str) -> Iterator[None]:
    """Every process must raise the same sentence."""
    with pytest.raises((RuntimeError, ValueError, AssertionError), match=re.escape(message)):
        yield
