"""What the Python around a tracked rectifier costs: 64 floats, forward and backward, eager."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import layer_collapse


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6()], ids=["relu", "relu6"])
def test_call(bench, act):
    plain = nn.Sequential(nn.Linear(64, 64), act)
    tracked = copy.deepcopy(plain)
    x, grad = torch.randn(1, 64, requires_grad=True), torch.randn(1, 64)

    def run(rectifier):
        x.grad = None
        rectifier(x).backward(grad)
        return x.grad

    with layer_collapse.track(tracked) as tracker:
        assert torch.equal(run(tracked[1]), run(plain[1]))
        assert tracker.entropy()["1"].positions == 1
        peer, ours = plain[1], tracked[1]
        bench(type(act).__name__, lambda: run(ours), {"call": lambda: run(peer)}, x)
