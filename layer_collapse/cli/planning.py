"""``plan``: what the three lines cost on a model of a given size."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from typing import Any

from rich.table import Table

from ..plan import Job, costs
from .console import add_json_flag, print_json, results


def add_command(commands: Any) -> None:
    """Register the command: an option per field of ``Job``."""
    parser = commands.add_parser("plan", help="what a model of a given size would cost, per rank")
    for field in fields(Job):
        kind = str if isinstance(field.default, str) else _number
        name, meta = f"--{field.name.replace('_', '-')}", field.name.split("_")[-1].upper()
        about, known = field.metadata["help"], {"default": field.default}
        if field.name == "params":
            known = {"required": True}
        else:
            about += " (default: %(default)s)"
        parser.add_argument(name, type=kind, metavar=meta, help=about, **known)
    add_json_flag(parser)
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    job = Job(**{field.name: getattr(arguments, field.name) for field in fields(Job)})
    parts = {name: cost.to_dict() for name, cost in costs(job).items()}
    if arguments.json:
        print_json({"job": asdict(job), "costs": parts})
        return 0
    results.print(", ".join(f"{name} {value}" for name, value in asdict(job).items()))
    table = Table("per rank", *parts)
    for fact in next(iter(parts.values())):
        table.add_row(fact, *(f"{part[fact]:,}" for part in parts.values()))
    results.print(table)
    return 0


def _number(text: str) -> int:
    """7e9 is one too."""
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a number such as 7e9 (got {text})") from None
