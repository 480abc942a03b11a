"""The tiny suite in place of the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tiny_suite import install

from layer_collapse.paper import networks, suites
from layer_collapse.report.results import tables


@pytest.fixture
def tiny() -> Iterator[None]:
    """The quick suite "cnn" holds one network that trains in a second."""
    places: tuple[dict[str, Any], ...] = (
        networks.NETWORKS,
        suites.SUITES,
        suites._QUICK,
        tables.FIGURES,
    )
    before = [dict(place) for place in places]
    install()
    yield
    for place, content in zip(places, before, strict=True):
        place.clear()
        place.update(content)
