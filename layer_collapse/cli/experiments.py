"""``demo`` and ``run``: complete experiments on built-in data and models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import data, models
from ..experiment import Settings, run
from ..prune.strategies import STRATEGIES
from ..report import summary
from ..training import Recipe
from .console import add_json_flag, log, print_json, progress, results

DEMO = Settings(
    data="digits",
    model="resmlp",
    rounds=3,
    fraction=0.85,
    recipe=Recipe("adamw", 2e-3, weight_decay=0.01, epochs=12, dense_epochs=12, batch=64),
)
#: Recipes that differ from the default, by model.
RECIPES = {"vit": Recipe("adamw", lr=1e-3, weight_decay=0.01)}


def add_commands(commands: Any) -> None:
    """Register the commands."""
    demo = commands.add_parser(
        "demo",
        help="see layers leave a small network in a minute",
        description="Residual MLP of 6 blocks on the digits that scikit-learn ships: train, prune "
        "by entropy, fold, compare with controls. Results in runs/demo.",
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    demo.add_argument("--seed", type=int, default=0)
    add_json_flag(demo)
    demo.set_defaults(run=_demo)

    full = commands.add_parser(
        "run",
        help="train, collapse and compare on built-in data and models",
        description="Train a network, make it collapse, compare it with a dense network and with "
        "its folded architecture from scratch. The same command goes on after an interruption.",
        epilog="example: layer-collapse run --data fashion-mnist --model resmlp --out runs/resmlp",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    full.add_argument("--data", choices=data.NAMES, default="fashion-mnist", help="data set")
    full.add_argument("--data-root", type=Path, metavar="DIR", help="where the data set lies")
    full.add_argument("--model", choices=models.NAMES, default="resmlp", help="network")
    full.add_argument("--strategy", choices=tuple(STRATEGIES), default="entropy", help="budget")
    full.add_argument(
        "--out", type=Path, metavar="DIR", help="results; runs/DATA-MODEL-STRATEGY-SEED if absent"
    )
    full.add_argument("--seed", type=int, default=0, help="of weights and batches")
    full.add_argument("--rounds", type=int, default=Settings.rounds, help="pruning rounds")
    full.add_argument(
        "--fraction",
        type=float,
        default=Settings.fraction,
        help="share of the alive candidate weights pruned per round",
    )
    full.add_argument("--epochs", type=int, default=3, help="epochs per phase")
    full.add_argument("--dense-epochs", type=int, help="epochs before pruning (--epochs if absent)")
    full.add_argument("--lr", type=float, help="learning rate (of the model's recipe if absent)")
    full.add_argument("--batch", type=int, default=128, help="batch size")
    full.add_argument("--train-samples", type=int, metavar="N", help="train on N samples only")
    full.add_argument(
        "--floor", type=int, default=Settings.floor, help="weights a layer keeps without way around"
    )
    full.add_argument(
        "--max-emptied", type=int, default=Settings.max_emptied, help="layers emptied per round"
    )
    full.add_argument(
        "--accept-loss",
        type=float,
        metavar="POINTS",
        help="also linearise near-zero layers while validation accuracy stays within POINTS",
    )
    full.add_argument("--no-controls", action="store_true", help="skip the two control networks")
    add_json_flag(full)
    full.set_defaults(run=_run)


def _finish(settings: Settings, arguments: argparse.Namespace, **options: Any) -> int:
    content = run(settings, arguments.out, progress=progress, log=log, **options)
    if arguments.json:
        print_json(content)
    else:
        results.print(summary(content))
        page = arguments.out / "report.html"
        results.print(f"report: {page}", markup=False, soft_wrap=True)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    settings = Settings(**{**vars(DEMO), "seed": arguments.seed})
    return _finish(settings, arguments)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.out is None:
        parts = (arguments.data, arguments.model, arguments.strategy, str(arguments.seed))
        arguments.out = Path("runs") / "-".join(parts)
    base = RECIPES.get(arguments.model, Recipe())
    recipe = Recipe(
        optimizer=base.optimizer,
        lr=base.lr if arguments.lr is None else arguments.lr,
        weight_decay=base.weight_decay,
        epochs=arguments.epochs,
        dense_epochs=(
            arguments.epochs if arguments.dense_epochs is None else arguments.dense_epochs
        ),
        batch=arguments.batch,
    )
    settings = Settings(
        data=arguments.data,
        model=arguments.model,
        strategy=arguments.strategy,
        rounds=arguments.rounds,
        fraction=arguments.fraction,
        floor=arguments.floor,
        max_emptied=arguments.max_emptied,
        accept_loss=arguments.accept_loss,
        seed=arguments.seed,
        train_samples=arguments.train_samples,
        recipe=recipe,
    )
    return _finish(
        settings, arguments, data_root=arguments.data_root, controls=not arguments.no_controls
    )
