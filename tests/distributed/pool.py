"""Several processes to test with, started once: importing torch takes longer than most tests."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_ROOT = Path(__file__).parents[2]
_MOST = 4
_PATIENCE = 120  # seconds, for a test whose processes wait for each other


def _work(rank: int, orders: Connection) -> None:
    torch.set_num_threads(1)
    while (order := orders.recv()) is not None:
        world, rendezvous, function, args = order
        try:
            torch.manual_seed(0)
            store = dist.FileStore(rendezvous, world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            try:
                orders.send((True, function(*args)))
            finally:
                dist.destroy_process_group()
        except BaseException:
            orders.send((False, traceback.format_exc()))


class Ranks:
    """``ranks(2, function, *args)``: what each of 2 processes of a group returns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workers: list[tuple[Any, Connection]] = []
        self.calls = 0

    def __call__(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        self._start()
        self.calls += 1
        order = (world, str(self.folder / f"rendezvous-{self.calls}"), function, args)
        chosen = [orders for _, orders in self.workers[:world]]
        for orders in chosen:
            orders.send(order)
        results = []
        for rank, orders in enumerate(chosen):
            if not orders.poll(_PATIENCE):
                self.stop()
                pytest.fail(f"rank {rank} of {world} said nothing for {_PATIENCE} s")
            ok, result = orders.recv()
            if not ok:
                self.stop()  # the others may wait for it for ever
                pytest.fail(f"rank {rank} of {world}:\n{result}")
            results.append(result)
        return results

    def _start(self) -> None:
        context = mp.get_context("spawn")
        for rank in range(len(self.workers), _MOST):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, there), daemon=True)
            process.start()
            self.workers.append((process, here))

    def stop(self) -> None:
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.workers.clear()


def torchrun(world: int, script: str, *args: str, restarts: int = 0) -> tuple[str, str]:
    """What a script of this folder prints on all of its processes; it must succeed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world}", f"--max-restarts={restarts}"]
    command += ["--monitor-interval=0.1", str(Path(__file__).with_name(script)), *args]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(_ROOT),
        # Otherwise a restarted gloo may find addresses of killed processes, and fails once more.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    patience = 280 + 60 * restarts  # each imports torch anew, on a machine that may be busy
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=patience, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr
