"""A job for torchrun that trains, prunes and saves, and is killed where its test says.

torchrun ... faults_job.py KIND FOLDER STEPS [FAULT ...]: the i-th start meets the i-th FAULT,
``rank:phase:number``, the number-th event of a phase on a rank. At the end each rank writes the
hash of all it holds.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import layer_collapse as lc
from layer_collapse.resume.generators import random_state
from layer_collapse.resume.processes import Processes
from layer_collapse.sharding import full

sys.path.insert(0, str(Path(__file__).parent))
from spread import data, mine

SAVE_EVERY, PRUNE_AT = 2, 3


class Net(nn.Module):
    """Batch norms see other samples on each rank; sizes that no 2 or 4 divides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.first = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 13)
        self.second, self.head = nn.Linear(13, 9), nn.Linear(9, 3)
        self.act, self.drop = nn.ReLU(), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = x + self.drop(self.second(self.act(self.first(x))))
        return self.head(torch.relu(x))


class Run:
    """The three lines around a loop, and a schedule; ``kind``: ddp or fsdp."""

    def __init__(self, kind: str, folder: str | Path, hidden: int = 13) -> None:
        torch.manual_seed(0)
        net = Net()
        if hidden != 13:
            net.first, net.second = nn.Linear(9, hidden), nn.Linear(hidden, 9)
        if kind == "fsdp":
            fully_shard(net.first)
            fully_shard(net)
        self.net, self.kind = net, kind
        self.model: Any = DistributedDataParallel(net) if kind == "ddp" else net
        self.tracker = lc.track(self.model)
        self.masks = lc.Masks(lc.candidate_weights(net, self.tracker.sites))
        self.optimizer = lc.MaskedAdamW(self.model.parameters(), 0.05, masks=self.masks)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.checkpoints = lc.Checkpoints(
            folder,
            self.model,
            self.optimizer,
            self.masks,
            self.tracker,
            others={"schedule": self.schedule},
        )
        # Ranks draw differently, and from all three generators.
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(dist.get_rank() if dist.is_initialized() else 0)
        self.x, self.y = data(40)
        if dist.is_initialized():
            self.x, self.y = mine(self.x), mine(self.y)

    def step(self, number: int) -> None:
        batch = torch.randperm(len(self.x))[: 4 + random.randrange(3)]
        noise = 0.1 * float(np.random.standard_normal()) + 0.1 * random.gauss(0, 1)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x[batch] + noise), self.y[batch]).backward()
        self.optimizer.step()
        self.schedule.step()
        if number % 4 == PRUNE_AT:
            group = dist.group.WORLD if dist.is_initialized() else None
            report = self.tracker.entropy(group)
            lc.prune_round(self.net, self.masks, report, self.tracker.sites, fraction=0.3)

    def load(self) -> int:
        """The step to go on from."""
        return self.checkpoints.load(warm_up=lambda: self.model(self.x[:4]).sum().backward()) or 0

    def hashes(self) -> dict[str, str]:
        """Of all that this rank holds, by name."""
        held: dict[str, Any] = {f"model {n}": full(t) for n, t in self.net.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            alive = torch.tensor(
                True
            )  # the state of what was just pruned is cleared before the next step
            if (masked := self.masks.name_of(parameter)) is not None:
                alive = full(self.masks.bool_mask(masked))
            for key, value in self.optimizer.state.get(parameter, {}).items():
                kept = alive if value.dim() else torch.tensor(True)
                held[f"optimizer {name} {key}"] = full(value).where(kept, 0)
        held |= {f"mask {n}": full(self.masks.bool_mask(n)) for n in self.masks.names}
        held |= {f"counts {n}": t for n, t in self.tracker.state_dict().items()}
        held |= {"lr": self.schedule.get_last_lr(), **random_state()}
        return {name: _hash(value) for name, value in held.items()}


def _hash(value: Any) -> str:
    data = value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(phase: str, number: int) -> None:
    """Kill this process at the number-th event of a phase.

    ``step``: before a step. ``file``: at a change in the file system (open, make, rename, remove).
    ``write``: in the middle of a write, with half of the file on the disk. ``load``: before a stage
    of loading that all processes go through together.
    """
    seen = 0

    def event() -> bool:
        nonlocal seen
        seen += 1
        return seen == number

    if phase == "step":
        original = Run.step

        def step(self: Run, at: int) -> None:
            if event():
                die()
            original(self, at)

        Run.step = step  # type: ignore[method-assign]
    elif phase == "write":
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            if event():
                if stat.S_ISREG(os.fstat(descriptor).st_mode):  # and not a folder
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                die()
            sync(descriptor)

        os.fsync = fsync  # type: ignore[assignment]
    elif phase == "load":
        together = Processes.together

        def counted(self: Processes, *arguments: Any, **options: Any) -> Any:
            if event():
                die()
            return together(self, *arguments, **options)

        Processes.together = counted  # type: ignore[method-assign]
    else:
        assert phase == "file"

        def audit(name: str, arguments: tuple[Any, ...]) -> None:
            # shutil.rmtree goes through os.remove and os.rmdir, relative to a descriptor.
            changes = name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
                name == "open" and "step-" in str(arguments[0])
            )
            if changes and event():
                die()

        sys.addaudithook(audit)


def main(kind: str, folder: str, steps: str, *faults: str) -> None:
    dist.init_process_group("gloo")
    run = Run(kind, Path(folder) / "checkpoints")
    rank = dist.get_rank()
    armed = len(list(Path(folder).glob("fault-*")))
    dist.barrier()  # all have counted

    def meet(while_loading: bool) -> None:
        victim, phase, number = (faults[armed:] or ["-1::"])[0].split(":")
        if rank == int(victim) and (phase == "load") == while_loading:
            (Path(folder) / f"fault-{armed}").touch()
            arm(phase, int(number))

    meet(while_loading=True)
    start = run.load()
    dist.barrier()
    if rank == 0:
        print(f"starts at {start}, has met {armed} faults", flush=True)
    meet(while_loading=False)
    for step in range(start, int(steps)):
        run.step(step)
        if (step + 1) % SAVE_EVERY == 0:
            run.checkpoints.save(step + 1)
    run.masks.check_()
    run.masks.check_ranks()
    text = "".join(f"{name}: {value}\n" for name, value in run.hashes().items())
    (Path(folder) / f"hashes-{rank}").write_text(text)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
