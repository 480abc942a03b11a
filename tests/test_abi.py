"""The one symbol of libtorch that is used outside of the stable ABI does what is relied on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from layer_collapse.measure.rectifiers import KINDS, Call
from layer_collapse.ops.rectify import POSITIONS, new_ledger, rectify

RELU = KINDS["relu"]


def test_graph_task_id_is_minus_one_outside_of_a_backward_pass() -> None:
    seen: list[int] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append(torch._C._current_graph_task_id())
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append(torch._C._current_graph_task_id())
            return grad

    Look.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert seen[0] == -1
    assert seen[1] >= 0
    assert torch._C._current_graph_task_id() == -1


def test_a_replay_under_backward_is_not_counted() -> None:
    for use_reentrant in (True, False):
        ledger = new_ledger(RELU, 3)
        runs: list[int] = []

        def block(x: Tensor, ledger: Tensor = ledger, runs: list[int] = runs) -> Tensor:
            runs.append(1)
            return rectify(Call(RELU, x * 1.0), ledger, 1).exp()

        x = torch.randn(5, 3, requires_grad=True)
        y = checkpoint(block, x, use_reentrant=use_reentrant)
        y.sum().backward()
        assert len(runs) == 2
        assert ledger[POSITIONS] == 5
        expected = torch.randn(5, 3)
        rectify(Call(RELU, expected), ledger, 1)  # after the backward it counts again
        assert ledger[POSITIONS] == 10


def test_a_failed_backward_leaves_counting_on() -> None:
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise ArithmeticError

    ledger = new_ledger(RELU, 3)
    with pytest.raises(ArithmeticError):
        Fail.apply(torch.ones(2, 3, requires_grad=True)).sum().backward()
    rectify(Call(RELU, torch.randn(5, 3)), ledger, 1)
    assert ledger[POSITIONS] == 5
