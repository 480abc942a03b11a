"""The processes that the tests of this folder share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from pool import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()
