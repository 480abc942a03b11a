"""How the settings of ``continuous`` were chosen: on networks that the experiments do not have.

``python -m layer_collapse.paper.tune`` trains every candidate on one small network per family and
looks at validation splits only. Chosen is, of the candidates whose mean accuracy is within a point
of the best, the one whose folded network has the fewest multiply-adds.

Two more studies on the same networks: ``distillation`` trains the chosen settings on a dense
network's answers as well, to see whether that helps; ``rivals`` tries the settings of what
``continuous`` is compared with, so that all are at their best.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import one_hot

from .. import models
from ..files import write_json
from ..models.encoder import minilm
from ..removal.continuous import Continuous
from ..removal.pruned import Pruned
from ..removal.settings import DROP, FAMILIES, Settings
from ..training import logits
from .controls import train_dense
from .loops import Part, TrainingLoop
from .measure import measure
from .networks import NETWORKS

__all__ = [
    "CANDIDATES",
    "DEVELOPMENT",
    "RIVALS",
    "STUDIES",
    "Development",
    "chosen",
    "distilled",
    "tried",
]

_WITHIN = 1.0  # points of accuracy
_TEACHER = 0.5  # its weight in the targets; the labels have the rest


def _short_encoder() -> nn.Module:
    model = minilm(2, "relu")
    model.blocks = model.blocks[:4]
    return model


@dataclass(frozen=True)
class Development:
    """A network to choose settings on.

    Attributes:
        build: makes it.
        like: the network of the experiments whose data, sizes and recipe it takes.
        remove: rectifiers to remove, of how many it has.
        epochs: of a run.
    """

    build: Callable[[], nn.Module]
    like: str
    remove: int
    epochs: float


def _resnet14() -> nn.Module:
    return models.build("resnet", (1, 28, 28), 10, blocks=2)


def _vit4() -> nn.Module:
    return models.build("vit", (1, 28, 28), 10, activation="relu", depth=4)


DEVELOPMENT = {
    "cnn": Development(_resnet14, "resnet20", remove=5, epochs=8),
    "vit": Development(_vit4, "vit-relu", remove=3, epochs=12),
    "nlp": Development(_short_encoder, "minilm-relu-movies", remove=2, epochs=4),
}

_FORMS = (
    Settings(forms=("linear",)),
    Settings(forms=("constant", "linear"), most=0.05),
    Settings(forms=("constant", "linear"), most=0.25),
    Settings(forms=("constant",)),
)
_TIMES = ((0.15, 0.6), (0.05, 0.4))
CANDIDATES = (
    *(replace(form, start=s, end=e) for form, (s, e) in product(_FORMS, _TIMES)),
    DROP,  # to compare with; never chosen
)


_ROUNDS = ((1, 0.99), (2, 0.95), (3, 0.9), (5, 0.8), (8, 0.7), (9, 0.5))  # the last: the authors'
_STARTS = (0.05, 0.15, 0.3)

#: Entropy-guided pruning in fewer rounds, which leave more epochs to each, and in more; ``drop``
#: earlier and later.
RIVALS: dict[str, Pruned | Settings] = {
    **{f"entropy, {n} rounds of {f:g}": Pruned(rounds=n, fraction=f) for n, f in _ROUNDS},
    **{f"drop at {start:g}": replace(DROP, start=start, end=start) for start in _STARTS},
}


def distilled(
    part: Part, build: Callable[[], nn.Module], loop: TrainingLoop, epochs: float
) -> Part:
    """``part`` with targets [N, classes], half the labels and half what a network, trained on the
    labels for ``epochs``, answers: the cross-entropy then is that of distillation at temperature 1.
    """
    torch.manual_seed(loop.seed)
    teacher = build()
    train_dense(teacher, loop, epochs)
    answers = logits(teacher, loop.batches()).softmax(1)
    labels = one_hot(part.y, answers.shape[1])
    return Part(part.x, torch.lerp(labels.to(answers.dtype), answers, _TEACHER))


def tried(
    family: str, candidate: Settings | Pruned, seed: int, distillation: bool = False
) -> dict[str, Any]:
    """Train one candidate: its settings, validation accuracy (%) and multiply-adds of a sample.

    Args:
        distillation: train on :func:`distilled` targets, of a dense network with as many epochs.
    """
    torch.set_num_threads(1)
    network = DEVELOPMENT[family]
    like = NETWORKS[network.like]
    task = like.task()
    training = task.training
    if distillation:
        teaching = TrainingLoop(training, task.validation, like.recipe, seed)
        training = distilled(training, network.build, teaching, network.epochs)
    loop = TrainingLoop(training, task.validation, like.recipe, seed)
    torch.manual_seed(seed)
    removal = Continuous(candidate) if isinstance(candidate, Settings) else candidate
    outcome = removal.run(network.build(), loop, network.epochs, network.remove)
    found = measure(outcome, loop, task.validation, latency_batches=())  # not the test split
    return {
        "family": family,
        "settings": _described(candidate),
        "seed": seed,
        "distillation": distillation,
        "validation_accuracy": found.get("validation_accuracy", 0.0),  # cut: no better than chance
        "macs": found["after"]["macs"] if "after" in found else 0,
        "removed": len(outcome.removed),
    }


def chosen(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings that a family's rows speak for, and the means of every candidate."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row["settings"]), []).append(row)
    means = [
        {
            "settings": group[0]["settings"],
            "validation_accuracy": mean(row["validation_accuracy"] for row in group),
            "macs": mean(row["macs"] for row in group),
        }
        for group in groups.values()
    ]
    candidates = [m for m in means if m["settings"] != asdict(DROP)]
    best = max(m["validation_accuracy"] for m in candidates)
    near = [m for m in candidates if m["validation_accuracy"] >= best - _WITHIN]
    return min(near, key=lambda m: m["macs"])["settings"], means


def _all_tried(cases: list[tuple[Any, ...]], jobs: int) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(tried, *zip(*cases, strict=True)))


def study_distillation(out: Path, seeds: int, jobs: int) -> None:
    """Train each family's settings with and without distillation; print and write the outcome."""
    rows = _all_tried(
        [(f, FAMILIES[f], s, d) for f, s, d in product(DEVELOPMENT, range(seeds), (False, True))],
        jobs,
    )
    table = Table("family", "labels (%)", "labels and dense network (%)", title="validation split")
    for family in DEVELOPMENT:
        own = [row for row in rows if row["family"] == family]
        table.add_row(
            family,
            *(_accuracy([r for r in own if r["distillation"] == d]) for d in (False, True)),
        )
    Console(width=110).print(table)
    write_json(out, {"teacher": _TEACHER, "runs": rows})


def study_rivals(out: Path, seeds: int, jobs: int) -> None:
    """Train every rival, and ``continuous`` beside them; print and write the outcome."""
    cases = [
        (family, candidate, seed)
        for family, seed in product(DEVELOPMENT, range(seeds))
        for candidate in (*RIVALS.values(), FAMILIES[family])
    ]
    rows = _all_tried(cases, jobs)
    table = Table("", *DEVELOPMENT, title="validation split (%), rectifiers removed")
    for title in (*RIVALS, "continuous"):
        entries = []
        for family in DEVELOPMENT:
            settings = _described(RIVALS.get(title, FAMILIES[family]))
            found = [r for r in rows if (r["family"], r["settings"]) == (family, settings)]
            removed = mean(row["removed"] for row in found)
            entries.append(f"{_accuracy(found)}, {removed:.3g} off")
        table.add_row(title, *entries)
    Console(width=110).print(table)
    write_json(out, {"runs": rows})


def _described(candidate: Settings | Pruned) -> dict[str, Any]:
    if isinstance(candidate, Settings):
        return asdict(candidate)
    return {"rounds": candidate.rounds, "fraction": candidate.fraction}


def _accuracy(rows: list[dict[str, Any]]) -> str:
    """Mean and sample deviation."""
    found = [row["validation_accuracy"] for row in rows]
    return f"{mean(found):.1f}" + (f" ± {stdev(found):.1f}" if len(found) > 1 else "")


def choose_settings(out: Path, seeds: int, jobs: int) -> None:
    """Try every candidate on every family's network; print and write what came of it."""
    rows = _all_tried(list(product(DEVELOPMENT, CANDIDATES, range(seeds))), jobs)
    console, document = Console(width=110), {}
    for family in DEVELOPMENT:
        best, means = chosen([row for row in rows if row["family"] == family])
        document[family] = {"chosen": best, "means": means}
        table = Table(
            "forms", "most", "from", "to", "moves", "validation (%)", "MACs", title=family
        )
        for row in means:
            own = row["settings"]
            table.add_row(
                " then ".join(own["forms"]),
                str(own["most"]),
                *(f"{own[k]:.2f}" for k in ("start", "end")),
                str(own["moves"]),
                f"{row['validation_accuracy']:.1f}" + (" chosen" if own == best else ""),
                f"{row['macs']:,.0f}",
            )
        console.print(table)
    write_json(out, {"families": document, "runs": rows})


STUDIES = {
    "settings": (choose_settings, "tuning.json"),
    "distillation": (study_distillation, "distillation.json"),
    "rivals": (study_rivals, "rivals.json"),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", choices=STUDIES, default="settings")
    parser.add_argument("--out", type=Path, help="file; default: in docs/results")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each candidate")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each of one thread")
    arguments = parser.parse_args()
    if min(arguments.seeds, arguments.jobs) < 1:
        parser.error(f"expected 1 or more (got {arguments.seeds} seeds, {arguments.jobs} jobs)")
    study, file = STUDIES[arguments.study]
    study(arguments.out or Path("docs/results") / file, arguments.seeds, arguments.jobs)
