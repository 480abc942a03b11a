"""A callback for Lightning: ``Trainer(callbacks=[Collapse(fraction=0.8, rounds=3)])``."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from ..prune.schedule import Rounds


class Collapse(pl.Callback):
    """Counts in every training step, prunes by rounds, keeps pruned weights zero, logs.

    The scalars of ``tracker.scalars()`` go to the module's loggers once per epoch. Checkpoints
    carry masks and counts. Validation is not counted.

    Args:
        fraction, rounds, every, options: of :class:`layer_collapse.prune.schedule.Rounds`.
        example_inputs: of :func:`layer_collapse.track`.
        network: path of the network in the LightningModule, e.g. ``"net"``; "": the module itself.
    """

    def __init__(
        self,
        fraction: float,
        rounds: int,
        every: int = 1,
        *,
        example_inputs: Any = None,
        network: str = "",
        **options: Any,
    ) -> None:
        self.rounds = Rounds(fraction, rounds, every, **options)
        self.example_inputs, self.network = example_inputs, network

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = pl_module.get_submodule(self.network)
        self.rounds.start(model, trainer.optimizers, self.example_inputs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log_dict(self.rounds.end_epoch(trainer.current_epoch + 1))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rounds.pause(True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rounds.pause(False)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.rounds.stop()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.rounds.tensors())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rounds.load_tensors(state_dict)
