"""A job for torchrun: Hugging Face's or Lightning's Trainer on several processes, with a callback.

torchrun ... loops_job.py LOOP KIND FOLDER: trains in one go, then half of it, then goes on from
the checkpoint of that; every rank writes what it saw as JSON. LOOP: hugging_face or lightning;
KIND: ddp, or for lightning fsdp.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from layer_collapse import Guards
from layer_collapse.prune.schedule import Rounds
from layer_collapse.sharding import full

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()
OPTIONS: dict[str, Any] = {"fraction": 0.5, "rounds": 2, "every": 2, "guards": Guards(floor=4)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.act = nn.Linear(6, 9), nn.Linear(9, 9), nn.ReLU()
        self.head = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.head(x + self.act(self.second(x)))


def watch(rounds: Rounds, seen: list[Any]) -> None:
    """Notes, after every epoch, how many weights are alive and how many positions were counted."""
    end = rounds.end_epoch

    def watched(epoch: int) -> dict[str, float]:
        assert rounds.tracker is not None
        positions = {row.positions for row in rounds.tracker.entropy(dist.group.WORLD)}
        scalars = end(epoch)
        rounds.masks.check_()
        rounds.masks.check_ranks()
        alive = sum(map(rounds.masks.alive, rounds.masks.names))
        seen.append([alive, *positions])
        return scalars

    rounds.end_epoch = watched  # type: ignore[method-assign]


def summary(net: nn.Module, rounds: Rounds, seen: list[Any], wrapped: Any) -> dict[str, Any]:
    def hashed(tensor: Tensor) -> str:
        return hashlib.sha256(full(tensor.detach()).numpy().tobytes()).hexdigest()[:16]

    return {
        "seen": seen,
        "weights": {name: hashed(p) for name, p in net.named_parameters()},
        "masks": {n: hashed(rounds.masks.bool_mask(n)) for n in rounds.masks.names},
        "class": type(net.act).__name__,
        "wrapped": type(wrapped).__name__,
    }


def lightning(kind: str, folder: Path, epochs: int, resume: bool) -> dict[str, Any]:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from layer_collapse.integrations.lightning import Collapse

    wrapped: list[Any] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def configure_model(self) -> None:
            if kind == "fsdp":
                fully_shard(self.net.first, mesh=self.device_mesh["data_parallel"])
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            wrapped.append(self.trainer.strategy.model if kind == "ddp" else self.net)
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.net(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1)

    module, callback = Module(), Collapse(**OPTIONS, network="net")
    seen: list[Any] = []
    watch(callback.rounds, seen)
    world = dist.get_world_size()
    sharding: Any = ModelParallelStrategy(world, 1, process_group_backend="gloo")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if kind == "ddp" else sharding,
        max_epochs=epochs,
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(X, Y), 6)
    path = folder / "last.ckpt"
    trainer.fit(module, loader, loader, ckpt_path=str(path) if resume else None)
    trainer.save_checkpoint(path)
    return summary(module.net, callback.rounds, seen, wrapped[0])


def hugging_face(_: str, folder: Path, epochs: int, resume: bool) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    from layer_collapse.integrations.hugging_face import Collapse

    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    callback = Collapse(**OPTIONS, example_inputs={"x": X[:2], "labels": Y[:2]})
    seen: list[Any] = []
    watch(callback.rounds, seen)
    trainer = Trainer(
        Labelled(),
        TrainingArguments(
            str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=6,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            use_cpu=True,
            ddp_backend="gloo",
            disable_tqdm=True,
            save_strategy="epoch",
            report_to="none",
        ),
        train_dataset=[{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)],
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return summary(trainer.model.net, callback.rounds, seen, trainer.model_wrapped)


def main(loop: str, kind: str, where: str) -> None:
    dist.init_process_group("gloo")
    folder = Path(where)
    fit = {"lightning": lightning, "hugging_face": hugging_face}[loop]
    result = {
        "whole": fit(kind, folder / "whole", 6, False),
        "part": fit(kind, folder / "part", 3, False),
        "resumed": fit(kind, folder / "part", 6, True),
    }
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(*sys.argv[1:])
