"""One complete run on built-in data and models, with its controls; what the command line calls."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import __version__, checkpoint, data, models, report
from .collapse import CollapseResult, Phase, collapse
from .graph import depth, rectifier_nodes, trace
from .measure.report import EMPTY
from .prune.masks import Masks
from .prune.rounds import Guards
from .reduce.fold import fold
from .reduce.gate import reinitialise_
from .reduce.latency import compare
from .reduce.saving import load_folded, save_folded
from .training import Progress, Recipe, accuracy, predictions, silent, train_phase


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run."""

    data: str
    model: str
    strategy: str = "entropy"
    rounds: int = 3
    fraction: float = 0.8
    floor: int = 64
    max_emptied: int = 2
    accept_loss: float | None = None
    seed: int = 0
    train_samples: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    latency_batch: int = 256


def _train_control(
    model: nn.Module,
    file: Path,
    settings: Settings,
    phases: list[Phase],
    train: Callable[[nn.Module, Masks, Phase], None],
) -> nn.Module:
    """Train a control through the same phases without pruning; its state is kept after each."""
    identity = {"settings": asdict(settings), "phases": [str(phase) for phase in phases]}
    done = 0
    if file.exists():
        tensors, meta = checkpoint.load(file)
        if meta.get("identity") == identity:
            model.load_state_dict(tensors)
            done = int(meta["done"])
    masks = Masks(dict(model.named_parameters()))  # every weight alive
    for number, phase in enumerate(phases[done:], start=done + 1):
        torch.manual_seed(phase.seed)
        train(model, masks, phase)
        checkpoint.save(file, model.state_dict(), {"identity": identity, "done": number})
    return model


def _shallow_control(linearized: fx.GraphModule, example: Tensor, seed: int) -> fx.GraphModule:
    """The folded architecture with fresh weights; it keeps its batch norms to train well."""
    model = copy.deepcopy(fold(linearized, example, without=("batch norm",)).model)
    reinitialise_(model, seed)
    return model


def _layers(result: CollapseResult) -> list[dict[str, Any]]:
    """Rows of the report: what became of each rectifier."""
    first = result.history[0].entropy
    linear = {*result.linearized.exact, *result.accepted}
    rows = []
    for row in result.entropy:
        if row.name not in linear:
            action = "kept"
        elif row.state == EMPTY:
            action = "folded to a constant"
        elif row.name in result.accepted:
            action = "linearised within the accepted loss"
        else:
            action = "folded into its neighbours"
        rows.append(
            {
                "name": row.name,
                "kind": row.kind,
                "entropy_first": first.get(row.name),
                "entropy_last": row.entropy,
                "state": row.state,
                "action": action,
            }
        )
    return rows


def run(
    settings: Settings,
    out: Path,
    *,
    data_root: Path | None = None,
    controls: bool = True,
    progress: Progress = silent,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train, collapse, compare with the controls, and write everything to ``out``.

    The same call goes on after an interruption and ends with the same report, but for ``seconds``
    and ``latency_ms``.

    Args:
        controls: also train the dense network and the folded architecture from scratch for as many
            epochs.

    Returns:
        The content of report.json.
    """
    started = time.perf_counter()
    dataset = data.load(
        settings.data, data_root, seed=settings.seed, train_samples=settings.train_samples
    )
    out.mkdir(parents=True, exist_ok=True)

    def fresh() -> nn.Module:
        torch.manual_seed(settings.seed)
        return models.build(
            settings.model, dataset.input_shape, dataset.classes, **settings.options
        )

    def train(model: nn.Module, masks: Masks, phase: Phase) -> None:
        train_phase(model, masks, phase, dataset.train, settings.recipe, progress)

    def tested(model: nn.Module) -> dict[str, float]:
        return {"test_accuracy": accuracy(model, dataset.test)}

    model = fresh()
    example = dataset.test.x[: settings.latency_batch]
    before = trace(model, example)
    result = collapse(
        model,
        train,
        lambda m: accuracy(m, dataset.validation),
        data.Batches(dataset.train, 1000),
        example,
        strategy=settings.strategy,
        rounds=settings.rounds,
        fraction=settings.fraction,
        guards=Guards(settings.floor, settings.max_emptied),
        accept_loss=settings.accept_loss,
        seed=settings.seed,
        folder=out,
        settings=asdict(settings),
        observe=tested,
        log=log,
    )
    phases = [Phase(step.phase, step.round, step.seed) for step in result.history]

    folded_file = out / "folded.safetensors"
    save_folded(result.model, folded_file)
    folded = load_folded(folded_file)  # what is measured is what a user loads
    folded.eval()

    control_accuracy: dict[str, float | None] = {"dense": None, "shallow": None}
    if controls:
        for name, start in (
            ("dense", fresh()),
            ("shallow", _shallow_control(result.linearized.model, example, settings.seed)),
        ):
            file = out / f"{name}_control.safetensors"
            log(f"{name} control: the same {len(phases)} phases without pruning")
            control = _train_control(start, file, settings, phases, train)
            control_accuracy[name] = accuracy(control, dataset.test)

    rectified, collapsed = (
        predictions(result.pruned, dataset.test),
        predictions(folded, dataset.test),
    )
    latency = compare(result.pruned, folded, example)
    size = result.fold.report
    epochs = sum(settings.recipe.epochs_of(phase) for phase in phases)
    content = {
        "data": dataset.name,
        "model": settings.model,
        "strategy": settings.strategy,
        "seed": settings.seed,
        "layers": _layers(result),
        "rectifiers": {"before": len(rectifier_nodes(before)), "after": size.after.rectifiers},
        "depth": {"before": depth(before), "after": size.after.depth},
        "parameters": {
            "before": sum(p.numel() for p in result.pruned.parameters()),
            "after": size.after.parameters,
        },
        "macs": {
            "before": size.before.macs // len(example),
            "after": size.after.macs // len(example),
        },
        "agreement_with_original": float((rectified == collapsed).double().mean()),
        "accuracy": {
            "start": result.history[0].observed["test_accuracy"],
            "final": accuracy(folded, dataset.test),
            "dense_control": control_accuracy["dense"],
            "shallow_control": control_accuracy["shallow"],
        },
        "latency_ms": asdict(latency),
        "proof": {"max_abs": size.max_abs, "max_rel": size.max_rel},
        "folds": [asdict(one) for one in size.folds],
        "refusals": [asdict(one) for one in size.refusals],
        "epochs": {"collapse": epochs, "dense_control": epochs if controls else None},
        "seconds": time.perf_counter() - started,
        "cut": result.entropy.cut,
        "stopped": result.stopped,
        "samples": {
            "train": len(dataset.train),
            "validation": len(dataset.validation),
            "test": len(dataset.test),
        },
        "history": [asdict(step) for step in result.history],
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "layer_collapse": __version__,
        },
    }
    report.write(out, content)
    return content
