"""How rectifiers leave a network. A new strategy is one file and one entry below."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .base import Loop, NotApplicable, Outcome, Removal, Removed, Watch

REMOVALS: Mapping[str, Callable[[], Removal]] = {}

__all__ = ["REMOVALS", "Loop", "NotApplicable", "Outcome", "Removal", "Removed", "Watch"]
