"""A whole training step of a tracked network costs what it costs untracked."""

from __future__ import annotations

import copy

import pytest
import torch

import layer_collapse
from benchmarks.cases import full, need
from benchmarks.networks import NETWORKS, training_step


def compare(bench, network, claim, case, **options):
    """Both copies take one step from equal weights, are compared, and then train on in turns."""
    plain, inputs = NETWORKS[network]()
    tracked = copy.deepcopy(plain)
    with layer_collapse.track(tracked, inputs, **options) as tracker:
        ours, peer = training_step(tracked, inputs), training_step(plain, inputs)
        exact = {} if options else {"rtol": 0, "atol": 0}  # a fused BN rounds elsewhere
        torch.testing.assert_close(ours(), peer(), **exact)
        if not options:
            for mine, other in zip(tracked.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(mine, other, **exact)
        assert all(row.positions for row in tracker.entropy())
        bench(case, ours, {claim: peer}, inputs[0])


def test_resnet(bench):
    compare(bench, "resnet18", "step_resnet", "drop-in")


def test_resnet_with_bn_fused(bench):
    need("fuse_bn")
    compare(bench, "resnet18", "step_resnet_bn", "fuse_bn=True", fuse_bn=True)


@pytest.mark.parametrize("network", ["vit", full("encoder")])
def test_transformers(bench, network):
    compare(bench, network, "step_transformers", network)
