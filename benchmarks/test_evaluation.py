"""An evaluation pass of a tracked network costs what it costs untracked; with hooks it does not."""

from __future__ import annotations

import copy

import pytest
import torch

import layer_collapse
from benchmarks.cases import full, need
from benchmarks.networks import NETWORKS, evaluation
from benchmarks.peers import EasierHook, EGPHook, SignHook, hook_rectifiers
from layer_collapse.ops.rectify import POSITIONS, counts_of


@pytest.mark.parametrize("network", ["encoder", *(full(n) for n in NETWORKS if n != "encoder")])
def test_evaluation(bench, network):
    plain, inputs = NETWORKS[network]()
    tracked, counted = copy.deepcopy(plain), copy.deepcopy(plain)
    with layer_collapse.track(tracked, inputs) as tracker:
        ours, peers = evaluation(tracked, inputs), {"evaluation": evaluation(plain, inputs)}
        dims = {site.name: site.channel_dim for site in tracker.sites}
        signs = hook_rectifiers(counted, SignHook, dims)
        assert torch.equal(ours(), peers["evaluation"]())
        evaluation(counted, inputs)()
        check_counts(tracker, signs, inputs[1] if network == "encoder" else None)
        if not bench.quick:
            for claim, hook in (("evaluation_egp", EGPHook), ("evaluation_easier", EasierHook)):
                hooked = copy.deepcopy(plain)
                hook_rectifiers(hooked, hook, dims)
                peers[claim] = evaluation(hooked, inputs)
        bench(network, ours, peers, inputs[0])


def check_counts(tracker, signs, attention_mask):
    """The tracker has seen what the hooks saw, but for padding."""
    ledgers = tracker.state_dict()
    for site in tracker.sites:
        if attention_mask is not None:
            assert ledgers[site.name][POSITIONS] == attention_mask.sum()
            continue
        assert ledgers[site.name][POSITIONS] == signs[site.name].positions
        positive = counts_of(ledgers[site.name], site.kind)[0]
        assert torch.equal(positive, signs[site.name].positive)


def test_evaluation_with_bn_fused(bench):
    need("fuse_bn")
    plain, inputs = NETWORKS["resnet18"]()
    tracked = copy.deepcopy(plain)
    with layer_collapse.track(tracked, inputs, fuse_bn=True):
        ours, peer = evaluation(tracked, inputs), evaluation(plain, inputs)
        torch.testing.assert_close(ours(), peer(), rtol=1e-3, atol=1e-4)
        bench("resnet18, fuse_bn=True", ours, {"evaluation_bn": peer}, inputs[0])
