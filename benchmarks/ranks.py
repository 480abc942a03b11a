"""Two processes with a job each side: torch's DDP and fused optimiser, and ours, in turns."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import layer_collapse
from benchmarks.networks import CLASSES, NETWORKS

WORLD = 2


def _step(model: nn.Module, inputs: tuple[Any, ...], optimizer: Any) -> Callable[[], float]:
    targets = torch.arange(len(inputs[0])) % CLASSES

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(*inputs), targets)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def _work(rank: int, folder: str, network: str, orders: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=WORLD)
    plain, inputs = NETWORKS[network]()
    inputs = tuple(part[rank::WORLD] for part in inputs)
    tracked = copy.deepcopy(plain)
    tracker = layer_collapse.track(tracked, inputs)
    masks = layer_collapse.Masks(layer_collapse.candidate_weights(tracked, tracker.sites))
    ours = DistributedDataParallel(tracked)
    peer = DistributedDataParallel(plain)
    sides = {
        "ours": _step(
            ours,
            inputs,
            layer_collapse.MaskedSGD(ours.parameters(), 0.01, momentum=0.9, masks=masks),
        ),
        "peer": _step(
            peer, inputs, torch.optim.SGD(peer.parameters(), 0.01, momentum=0.9, fused=True)
        ),
    }
    while (side := orders.recv()) is not None:
        orders.send(sides[side]())
    tracker.remove()
    dist.destroy_process_group()


class Job:
    """Both sides in both processes; ``job.step("ours")`` is one step of all of them."""

    def __init__(self, network: str) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._ends: list[Connection] = []
        self._workers: list[Any] = []
        for rank in range(WORLD):
            here, there = context.Pipe()
            arguments = (rank, self._folder.name, network, there)
            worker = context.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            self._ends.append(here)
            self._workers.append(worker)

    def step(self, side: str) -> list[float]:
        """The loss of every process."""
        for end in self._ends:
            end.send(side)
        return [end.recv() for end in self._ends]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            end.send(None)
        for worker in self._workers:
            worker.join(30)
        self._folder.cleanup()
