"""Lightning on scikit-learn's digits, with one more callback.

python examples/lightning_trainer.py
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import layer_collapse as lc
from layer_collapse import data, models
from layer_collapse.integrations.lightning import Collapse


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = models.ResMLP((1, 8, 8), 10, width=64, hidden=64, blocks=4)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        right = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", right, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 2e-3)


def main(rounds: int, epochs: int, folder: str) -> None:
    pl.seed_everything(0)
    digits = data.load("digits")
    train = DataLoader(TensorDataset(digits.train.x, digits.train.y), 64, shuffle=True)
    validation = DataLoader(TensorDataset(digits.validation.x, digits.validation.y), 256)
    module = Digits()
    collapse = Collapse(fraction=0.9, rounds=rounds, every=epochs, network="net")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=(rounds + 1) * epochs,
        callbacks=[collapse],
        default_root_dir=Path(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=8,
    )
    trainer.fit(module, train, validation)
    scalars = {name: round(float(value), 3) for name, value in trainer.logged_metrics.items()}
    print(f"round {rounds}", scalars)

    report = lc.scan(module.net, digits.train.x.split(256))
    folded = lc.fold(lc.linearize(module.net, report).model, digits.train.x[:2]).model
    with torch.no_grad():
        right = (folded(digits.test.x).argmax(1) == digits.test.y).double().mean()
    print(f"{len(report.zero_entropy)} of {len(report)} rectifiers have gone; {right:.1%} right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--folder", default="runs/lightning", help="of logs and checkpoints")
    main(**vars(parser.parse_args()))
