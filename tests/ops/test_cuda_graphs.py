"""Ops and whole training steps inside a CUDA graph; the harness replays the same cases on a CPU
(tests/cuda_on_cpu/test_graphs.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_cases import CASES, Case, assert_replayed
from torch import Tensor, nn

from layer_collapse import MaskedAdamW, MaskedSGD, Masks, track


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Not run; the call was made once before, as torch asks for."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replayed(case: Case, cuda_device: torch.device) -> None:
    given = [t.to(cuda_device) for t in case.make(0)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case.call(torch.ops.layer_collapse, [t.clone() for t in given])
    torch.cuda.current_stream().wait_stream(side)
    graph, got = torch.cuda.CUDAGraph(), ([], [])
    with torch.cuda.graph(graph):
        got = case.call(torch.ops.layer_collapse, given)
    for seed in (1, 2, 3):
        for one, other in zip(given, case.make(seed), strict=True):
            one.copy_(other)
        graph.replay()
        assert_replayed(case, got, seed)


class Job:
    """A tracked model, half of its matrices pruned, and a step on static tensors."""

    def __init__(self, kind: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4), nn.ReLU6()
        ).to(device)
        self.masks = Masks({n: p for n, p in self.model.named_parameters() if p.dim() > 1})
        self.masks.prune_(self.masks.shares(600))
        parameters = self.model.parameters()
        self.optimizer = (
            MaskedSGD(parameters, 0.05, 0.9, masks=self.masks)
            if kind == "sgd"
            else MaskedAdamW(parameters, 0.01, masks=self.masks)
        )
        self.tracker = track(self.model, live=True)
        self.x = torch.zeros(16, 8, device=device)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        self.model(self.x).square().sum().backward()
        self.optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_whole_step_on_either_side(kind: str, device: torch.device) -> None:
    """Forward, counts, backward and masked step; on CUDA replayed as one graph."""
    jobs = [Job(kind, device) for _ in range(2)]
    batches = [torch.randn(16, 8, device=device) for _ in range(4)]
    for job in jobs:
        job.x.copy_(batches[0])
        side = torch.cuda.Stream() if device.type == "cuda" else None
        with torch.cuda.stream(side):  # None: no stream
            if side is not None:
                side.wait_stream(torch.cuda.default_stream())
            job.step()
            job.step()
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)
    replay: Callable[[], object] = jobs[0].step
    if device.type == "cuda":
        replay = captured(jobs[0].step).replay
    for batch in batches:
        for job in jobs:
            job.x.copy_(batch)
        replay()
        jobs[1].step()
    compare(*jobs)
    for name in jobs[0].masks.names:
        assert not jobs[0].model.get_parameter(name)[~jobs[0].masks.bool_mask(name)].any()


def compare(job: Job, other: Job) -> None:
    weights: list[list[Tensor]] = [list(j.model.parameters()) for j in (job, other)]
    for one, two in zip(*weights, strict=True):
        torch.testing.assert_close(one, two)
    rows = job.tracker.entropy().rows
    assert {row.positions for row in rows} == {6 * 16}
    assert rows == other.tracker.entropy().rows
    assert job.tracker.live() == other.tracker.live()
