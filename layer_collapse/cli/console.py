"""What the commands share: progress on stderr, results on stdout."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import track as progress_bar

messages = Console(stderr=True, highlight=False)
results = Console(highlight=False)


def progress(iterable: Iterable[Any], title: str, total: int) -> Iterable[Any]:
    """A progress bar that leaves nothing behind; silent where stderr is no terminal."""
    return progress_bar(
        iterable,
        title,
        total=total,
        console=messages,
        transient=True,
        disable=not messages.is_terminal,
    )


def log(line: str) -> None:
    """One line of progress."""
    messages.print(line, markup=False, soft_wrap=True)


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """``--json``: the result as JSON on stdout and nothing else there."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def print_json(content: Any) -> None:
    """JSON on stdout."""
    print(json.dumps(content, indent=1, allow_nan=False))
