"""A masked optimiser step gets cheaper as weights go; a dense one costs what torch's costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.cases import full
from benchmarks.networks import resnet18
from benchmarks.peers import Reparametrised, step_and_multiply
from layer_collapse import MaskedAdamW, MaskedSGD, Masks

OPTIMIZERS = {
    "sgd": (
        lambda p, masks: MaskedSGD(p, 0.01, 0.9, weight_decay=1e-4, masks=masks),
        lambda p, **how: torch.optim.SGD(p, 0.01, 0.9, weight_decay=1e-4, **how),
    ),
    "adamw": (
        lambda p, masks: MaskedAdamW(p, 1e-3, masks=masks),
        lambda p, **how: torch.optim.AdamW(p, 1e-3, **how),
    ),
}
SPARSITIES = {"dense": 0.0, "95": 0.95, "99": 0.99, "rows": 0.95}


def matrices():
    return [torch.randn(1024, 1024) for _ in range(4)]


def resnet_weights():
    return [p.detach().clone() for p in resnet18()[0].parameters() if p.dim() > 1]


NETWORKS = {"4 x 1024x1024": matrices, "ResNet-18, 11 M weights": resnet_weights}


@pytest.mark.parametrize("network", [next(iter(NETWORKS)), full(list(NETWORKS)[1])])
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step(bench, name, sparsity, network):
    weights = NETWORKS[network]()
    grads = [torch.randn_like(weight) for weight in weights]
    ours = parameters_of(weights, grads)
    masks = Masks({str(i): p for i, p in enumerate(ours)})
    prune(masks, weights, SPARSITIES[sparsity], by_row=sparsity == "rows")
    alive = [masks.bool_mask(name) for name in masks.names]
    make_ours, make_peer = OPTIMIZERS[name]

    theirs = {"": parameters_of(weights, grads)}
    steps = {"": make_peer(theirs[""], fused=True).step}
    if sparsity == "95":
        theirs["foreach"] = parameters_of(weights, grads)
        steps["foreach"] = make_peer(theirs["foreach"], foreach=True).step
        theirs["multiplied"] = parameters_of(weights, grads)
        optimizer = make_peer(theirs["multiplied"], fused=True)
        steps["multiplied"] = step_and_multiply(optimizer, alive)
        pruned = Reparametrised(weights, alive)
        steps["reparametrised"] = pruned.step(make_peer(pruned.parameters, fused=True), grads)

    step = make_ours(ours, masks).step
    step()
    for peer, take in steps.items():
        take()
        after = pruned.weights if peer == "reparametrised" else theirs[peer]
        for mine, other, mask in zip(ours, after, alive, strict=True):
            torch.testing.assert_close(mine[mask], other[mask])
            assert not mine[~mask].any()
            assert peer in ("", "foreach") or not other[~mask].any()
    like = weights[0] if len(weights) == 4 else torch.cat([w.flatten() for w in weights])
    bench(network, step, {f"{name}_{peer or sparsity}": take for peer, take in steps.items()}, like)


def parameters_of(weights, grads):
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    return parameters


def prune(masks, weights, sparsity, by_row):
    """Prunes a share of the weights at random places, or as many whole rows (output channels)."""
    for name, weight in zip(masks.names, weights, strict=True):
        places = torch.rand(len(weight) if by_row else weight.shape)
        pruned = places < torch.quantile(places.flatten()[: 1 << 20], sparsity)
        if by_row:
            pruned = pruned.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)
        masks.prune_where_(name, pruned)
