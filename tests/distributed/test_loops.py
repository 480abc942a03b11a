"""Callbacks in other people's loops, on two processes: one answer on both, and they resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pool import torchrun

#: Weights alive of 135 and positions counted of 48 samples, after each epoch.
_SEEN = [[135, 48], [67, 96], [67, 48], [33, 96], [33, 48], [33, 96]]


@pytest.mark.parametrize(
    ("loop", "kind"),
    # accelerate shards on accelerators only: told to, it takes DDP on the CPU
    [("lightning", "ddp"), ("lightning", "fsdp"), ("hugging_face", "ddp")],
)
def test_prunes_by_rounds_and_resumes(tmp_path: Path, loop: str, kind: str) -> None:
    torchrun(2, "loops_job.py", loop, kind, str(tmp_path))
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    whole, part, resumed = (first[run] for run in ("whole", "part", "resumed"))
    assert whole["seen"] == _SEEN
    assert part["seen"] == _SEEN[:3]  # stopped between two rounds, one epoch after the first
    assert resumed["seen"] == _SEEN[3:]
    assert resumed["weights"] == whole["weights"] != part["weights"]
    assert resumed["masks"] == whole["masks"] != part["masks"]
    assert whole["wrapped"] == {"ddp": "DistributedDataParallel", "fsdp": "FSDPNet"}[kind]
    assert whole["class"] == "ReLU"  # and no longer tracked
