"""A tracked BN -> ReLU pair in one pass against the eager pair, untracked."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import layer_collapse
from benchmarks.cases import Layout, full, need
from benchmarks.peers import two_sided

SHAPES = (
    full((128, 64, 32, 32)),
    (64, 128, 16, 16),
    full((128, 256, 8, 8)),
    full((128, 512, 4, 4)),
)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("claim", ["bn_forward", "bn_both"])
def test_batch_norm(bench, claim, shape, name, training):
    need("fuse_bn")
    layout = Layout(name, shape)
    x = layout.sample()
    plain = nn.Sequential(nn.BatchNorm2d(shape[1]), nn.ReLU()).train(training)
    nn.init.uniform_(plain[0].weight, 0.5, 1.5)
    nn.init.normal_(plain[0].bias)
    tracked = copy.deepcopy(plain)
    backward = claim == "bn_both"
    x.requires_grad_(backward or training)
    grad = torch.randn_like(x)

    def run(model):
        y = model(x)
        if backward:  # not y.backward(), which would add to the gradients of the calls before
            torch.autograd.grad(y, [x, *model.parameters()], grad)

    with layer_collapse.track(tracked, x, fuse_bn=True) as tracker:
        near = _same(plain, tracked, x, grad)
        (row,) = tracker.entropy()
        assert row.positions == x.numel() // shape[1]
        assert abs(row.entropy - _entropy(plain, x)) <= 1e-3 + near
        with torch.set_grad_enabled(x.requires_grad):
            bench(
                f"{layout} {'train' if training else 'eval'}",
                lambda: run(tracked),
                {claim: lambda: run(plain)},
                x,
            )


def _same(plain, tracked, x, grad):
    """Outputs, running statistics and gradients agree; returns the share of values near the bend.

    Where |z| is nearly 0 rounding decides the sign, and with it whether a gradient passes: there
    the gradients are not compared.
    """
    sides = []
    for model in (copy.deepcopy(plain), tracked):
        leaf = x.detach().requires_grad_()
        y = model(leaf)
        y.backward(grad)
        sides.append((y.detach(), leaf.grad, model[0]))
        model.zero_grad()
    (y, slope, norm), (y2, slope2, norm2) = sides
    torch.testing.assert_close(y2, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm2.running_var, norm.running_var, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm2.running_mean, norm.running_mean, rtol=1e-4, atol=1e-5)
    away = copy.deepcopy(plain)[0](x.detach()).abs() > 1e-4
    torch.testing.assert_close(slope2[away], slope[away], rtol=1e-3, atol=1e-3)
    return 1 - away.float().mean().item()


def _entropy(plain, x):
    share = (copy.deepcopy(plain)[0](x.detach()) > 0).double().mean((0, 2, 3))
    return two_sided(share).mean().item()
