"""What rectifies without calling a rectifier is named; what merely looks so is not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layer_collapse as lc

RELU, RELU6, SMOOTH = "call F.relu to", "call F.relu6 to", "call F.gelu or F.silu to"


class Net(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 6), nn.Linear(6, 6), nn.ReLU()
        self.beta = nn.Parameter(torch.ones(6))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(self.body(self.first(x))[..., :4])))


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


DISGUISED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "clamp": (lambda x: x.clamp(min=0), RELU),
    "clamp by position": (lambda x: torch.clamp(x, 0.0), RELU),
    "clamp_min": (lambda x: torch.clamp_min(x, 0), RELU),
    "clip in place": (lambda x: x.clamp_(0, math.inf), RELU),
    "clamp to 6": (lambda x: x.clamp(0, 6), RELU6),
    "hardtanh": (lambda x: F.hardtanh(x, 0.0, 6.0), RELU6),
    "Hardtanh": (nn.Hardtanh(0, 6), RELU6),
    "threshold": (lambda x: F.threshold(x, 0.0, 0.0), RELU),
    "Threshold": (nn.Threshold(0, 0), RELU),
    "gelu_new": (gelu_new, SMOOTH),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), SMOOTH),
    "erf gelu": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), SMOOTH),
    "silu by a method": (lambda x: x.sigmoid().mul(x), SMOOTH),
    "Sigmoid": (lambda x: x * nn.Sigmoid()(x), SMOOTH),
}


@pytest.mark.parametrize("name", DISGUISED)
def test_a_disguised_rectifier_is_named(name: str) -> None:
    body, instead = DISGUISED[name]
    with pytest.warns(UserWarning, match="which is not measured") as caught:
        tracker = lc.track(Net(body), torch.randn(3, 4))
    tracker.remove()
    assert [site.name for site in tracker.sites] == ["act"]
    assert [instead in str(one.message) for one in caught] == [True]


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "other bounds": lambda x: x.clamp(-1, 1),
    "a floor for a norm": lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=0),
    "hardtanh": F.hardtanh,
    "threshold with another value": lambda x: F.threshold(x, 0.0, -1.0),
    "tanh alone": lambda x: 2.0 * torch.tanh(x),
    "two bounded factors": lambda x: torch.sigmoid(x) * torch.tanh(x),
    "gated by something else": lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True)),
    "squared": lambda x: x * x,
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_merely_looks_so_is_not(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lc.track(Net(PLAIN[name]), torch.randn(3, 4)).remove()
