"""Callbacks prune when they should, keep pruned weights zero, log, resume, and leave nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from layer_collapse import Guards, Masks, integrations
from layer_collapse.integrations.hugging_face import Collapse as HuggingFace
from layer_collapse.integrations.lightning import Collapse as Lightning
from layer_collapse.prune.schedule import Rounds

_X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
_Y = (_X[:, 0] > 0).long()
_OPTIONS = {"fraction": 0.5, "rounds": 2, "every": 2, "guards": Guards(floor=4)}
_EPOCHS = 6
#: Alive weights of 112 after each epoch.
_ALIVE = [112, 56, 56, 28, 28, 28]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.act = nn.Linear(6, 8), nn.Linear(8, 8), nn.ReLU()
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.head(x + self.act(self.second(x)))


class _Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = _Net()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1)


class _Labelled(nn.Module):
    """What Hugging Face's Trainer asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _Net()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def _watch(rounds: Rounds, seen: list[int]) -> None:
    """Notes the weights alive after every epoch, and that the pruned ones are zero."""
    end = rounds.end_epoch

    def watched(epoch: int) -> dict[str, float]:
        scalars = end(epoch)
        rounds.masks.check_()
        seen.append(sum(map(rounds.masks.alive, rounds.masks.names)))
        return scalars

    rounds.end_epoch = watched  # type: ignore[method-assign]


def _lightning(
    folder: Path, epochs: int, resume: str | None = None
) -> tuple[nn.Module, Masks, Any, list[int]]:
    module, callback = _Module(), Lightning(**_OPTIONS, network="net")
    seen: list[int] = []
    _watch(callback.rounds, seen)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(_X, _Y), 8)
    trainer.fit(module, loader, loader, ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module.net, callback.rounds.masks, trainer.logged_metrics, seen


def _hugging_face(
    folder: Path, epochs: int, resume: str | None = None
) -> tuple[nn.Module, Masks, Any, list[int]]:
    model = _Labelled()
    callback = HuggingFace(**_OPTIONS, example_inputs={"x": _X[:2]})
    seen: list[int] = []
    _watch(callback.rounds, seen)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=8,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="epoch",
            report_to="none",
        ),
        train_dataset=[{"x": x, "labels": y} for x, y in zip(_X, _Y, strict=True)],
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    logged = [line for line in trainer.state.log_history if "entropy/mean" in line]
    assert len(logged) == epochs
    return model.net, callback.rounds.masks, logged[-1], seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fit", "checkpoint"), [(_lightning, "last.ckpt"), (_hugging_face, "checkpoint-15")]
)
def test_prunes_by_rounds_and_resumes(fit: Any, checkpoint: str, tmp_path: Path) -> None:
    net, masks, logged, alive = fit(tmp_path / "whole", _EPOCHS)
    assert alive == _ALIVE
    assert type(net.act) is nn.ReLU
    assert type(net) is _Net
    assert not net._forward_hooks
    assert float(logged["sparsity/all"]) == pytest.approx(0.75)
    assert 0 <= float(logged["entropy/mean"]) <= 1
    fit(tmp_path / "part", 3)  # stopped one epoch after the first round, in the middle of two
    part = tmp_path / "part"
    again, masks_again, _, alive = fit(part, _EPOCHS, str(part / checkpoint))
    assert alive == _ALIVE[3:]
    masks_again.check_()
    for name in masks.names:
        assert torch.equal(masks.bool_mask(name), masks_again.bool_mask(name))
    for ours, theirs in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_validation_is_not_counted(tmp_path: Path) -> None:
    rounds = Rounds(0.5, 1)
    rounds.start(net := _Net(), [torch.optim.SGD(net.parameters(), 0.1)], None)
    net(_X)
    rounds.pause(True)
    net(_X)
    rounds.pause(False)
    assert rounds.tracker is not None
    assert {row.positions for row in rounds.tracker.entropy()} == {40}
    rounds.stop()
    rounds.stop()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 1), "fraction must be above 0 and below 1 (got 1.0)"),
        ((0.5, 0), "expected rounds and every of 1 or more (got 0 and 1)"),
        ((0.5, 1, 0), "expected rounds and every of 1 or more (got 1 and 0)"),
    ],
)
def test_numbers_out_of_range(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Lightning(*arguments)


def test_the_package_needs_neither_library() -> None:
    code = """
import sys
sys.modules.update(transformers=None, lightning=None, pytorch_lightning=None)
import layer_collapse, layer_collapse.cli
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_are_short() -> None:
    for path in Path(str(integrations.__file__)).parent.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path
