"""What it costs to have every layer's entropy at hand after every forward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import layer_collapse
from benchmarks.cases import full, need
from benchmarks.networks import NETWORKS, evaluation

SHAPES = ((4, 256), full((4, 4096)), (1024, 256), full((4096, 1024)))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_rectifier(bench, shape):
    need("live")
    model = nn.Sequential(nn.Linear(shape[1], shape[1]), nn.ReLU())
    compare(bench, "ReLU on " + "x".join(map(str, shape)), model, 1, (torch.randn(shape),))


@pytest.mark.full
def test_network(bench):
    need("live")
    model, inputs = NETWORKS["vit"]()
    compare(bench, "vit, evaluation pass", model, None, inputs)


def compare(bench, case, model, layer, inputs):
    """Two tracked copies, one of them live; ``layer`` picks the part that is run."""
    sides = []
    for live in (True, False):
        copied = copy.deepcopy(model)
        tracker = layer_collapse.track(copied, inputs, live=live)
        sides.append((tracker, evaluation(copied if layer is None else copied[layer], inputs)))
    (ours, run_ours), (peer, run_peer) = sides
    assert torch.equal(run_ours(), run_peer())
    assert ours.entropy() == peer.entropy()
    bench(case, run_ours, {"live": run_peer}, inputs[0])
