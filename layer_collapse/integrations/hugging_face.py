"""For Hugging Face's Trainer: ``callbacks=[Collapse(fraction=0.8, rounds=3, ...)]``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..checkpoint import load, save
from ..prune.schedule import Rounds


class Collapse(TrainerCallback):
    """Counts in every training step, prunes by rounds, keeps pruned weights zero, logs.

    The scalars of ``tracker.scalars()`` go to ``state.log_history`` once per epoch. Checkpoints
    carry masks and counts, in ``layer_collapse.safetensors``. Evaluation between epochs is counted
    like training.

    Args:
        fraction, rounds, every, options: of :class:`layer_collapse.prune.schedule.Rounds`.
        example_inputs: of :func:`layer_collapse.track`.
        log: also takes the scalars, e.g. ``trainer.log``, which tells every other callback.
    """

    log: Callable[[dict[str, float]], Any] | None = None

    def __init__(
        self, fraction: float, rounds: int, every: int = 1, *, example_inputs: Any, **options: Any
    ) -> None:
        self.rounds = Rounds(fraction, rounds, every, **options)
        self.example_inputs = example_inputs

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:  # the Trainer resumes from a checkpoint
            self.rounds.load_tensors(load(_file(args, state))[0])
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # accelerate's
        self.rounds.start(kwargs["model"], [optimizer], self.example_inputs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scalars = self.rounds.end_epoch(round(state.epoch))
        if self.log is not None:
            self.log(scalars)
        else:
            state.log_history.append({**scalars, "epoch": state.epoch, "step": state.global_step})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tensors = self.rounds.tensors()
        if state.is_world_process_zero:
            save(_file(args, state), tensors, {})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rounds.stop()


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
    return folder / "layer_collapse.safetensors"
