"""Rectifiers that are written otherwise are named, never silently missed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layer_collapse import fold


class Act(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def gelu_new(x: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


NAMED = {
    "clamp": lambda x: x.clamp(min=0),
    "clamp6": lambda x: torch.clamp(x, 0, 6),
    "clamp_min": lambda x: torch.clamp_min(x, 0.0),
    "threshold": lambda x: F.threshold(x, 0, 0),
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
    "gelu_new": gelu_new,
    "gelu_erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
OTHERS = {
    "clamp": lambda x: x.clamp(min=-1),
    "threshold": lambda x: F.threshold(x, 1.0, 0.0),
    "hardtanh": F.hardtanh,
    "tanh": torch.tanh,
    "gated": lambda x: torch.sigmoid(x.mean(-1, keepdim=True)) * x,
    "relu": F.relu,
    "silu": F.silu,
}


def network(act: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), act, nn.Linear(8, 3))


@pytest.mark.parametrize("name", sorted(NAMED))
def test_named_in_a_warning_and_in_the_report(name: str) -> None:
    with pytest.warns(UserWarning, match="'1' acts as a rectifier"):
        report = fold(network(Act(NAMED[name])), torch.randn(2, 4)).report
    assert [(r.name, r.rule) for r in report.refusals] == [("1", "trace")]


@pytest.mark.parametrize(
    ("module", "instead"),
    [(nn.Hardtanh(0.0, 6.0), "nn.ReLU6"), (nn.Threshold(0.0, 0.0), "nn.ReLU")],
)
def test_modules_are_named_with_what_to_use(module: nn.Module, instead: str) -> None:
    with pytest.warns(UserWarning, match=rf"'1' acts .* use {instead}$"):
        fold(network(module), torch.randn(2, 4))


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_other_activations_raise_no_warning(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold(network(Act(OTHERS[name])), torch.randn(2, 4))
