"""Processes that are killed, full disks, checkpoints that are damaged or of another run."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faults_job import Run
from pool import Ranks, torchrun

import layer_collapse as lc
from layer_collapse.resume.tensors import check_content

# ---- killed


def _torchrun(world: int, kind: str, folder: Path, steps: int, faults: list[str]) -> list[str]:
    """Hashes that each rank ends with, after every fault was met."""
    folder.mkdir()
    out, errors = torchrun(
        world, "faults_job.py", kind, str(folder), str(steps), *faults, restarts=len(faults) + 2
    )
    assert len(list(folder.glob("fault-*"))) == len(faults), out
    assert errors.count("exitcode: -9") == len(faults), errors
    assert not list((folder / "checkpoints").glob(".*"))
    return [(folder / f"hashes-{rank}").read_text() for rank in range(world)]


def _survives(tmp_path: Path, world: int, kind: str, steps: int, faults: list[str]) -> None:
    expected = _torchrun(world, kind, tmp_path / "calm", steps, [])
    assert len(set(expected)) == world  # ranks hold different counts and generators
    assert _torchrun(world, kind, tmp_path / "killed", steps, faults) == expected


# A save on rank 0 flushes, in turn: its tensors, its own state, its folder, the manifest, its
# folder, the three folders, the parent; on another rank the first three.
@pytest.mark.parametrize(
    ("world", "kind", "steps", "faults"),
    [
        (2, "ddp", 8, ["1:step:2", "0:write:1", "1:write:2", "0:write:4", "0:file:9", "0:write:9"]),
        (2, "ddp", 6, ["0:step:4", "1:load:1", "0:load:2"]),
        (4, "fsdp", 4, ["3:write:1", "0:write:7"]),
    ],
)
def test_killed_ranks_change_nothing(
    tmp_path: Path, world: int, kind: str, steps: int, faults: list[str]
) -> None:
    _survives(tmp_path, world, kind, steps, faults)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("world", "kind"), [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")])
def test_ranks_killed_at_random(tmp_path: Path, world: int, kind: str) -> None:
    draw = random.Random(world)
    phases = {"step": 3, "write": 9, "file": 20, "load": 2}
    faults = []
    for phase, most in phases.items():
        for _ in range(8):
            victim = draw.randrange(world) if phase != "file" else 0
            at = draw.randint(1, 2 if phase == "write" and victim else most)
            faults.append(f"{victim}:{phase}:{at}")
    draw.shuffle(faults)
    _survives(tmp_path, world, kind, 40, faults)


def _resumes(folder: Path) -> None:
    """No process is killed here; more than two add up their gradients in an order."""

    def train(name: str, stop: int) -> dict[str, str]:
        run = Run("ddp", folder / name)
        for step in range(run.load(), stop):
            run.step(step)
            run.checkpoints.save(step + 1)
        return run.hashes()

    whole = train("whole", 8)
    train("part", 5)
    assert train("part", 8) == whole


def test_four_processes_resume_to_the_bit(ranks: Ranks, tmp_path: Path) -> None:
    ranks(4, _resumes, tmp_path)


# ---- refused


def _saved(kind: str, folder: Path, steps: int = 2) -> Run:
    run = Run(kind, folder)
    for step in range(steps):
        run.step(step)
        run.checkpoints.save(step + 1)
    return run


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def _nothing_changes(run: Run, folder: Path, sentence: str) -> Iterator[None]:
    """All ranks raise the sentence, and neither the run nor the folder is changed by that."""
    dist.barrier()
    before, files = run.hashes(), _bytes(folder)
    dist.barrier()
    with pytest.raises((ValueError, OSError)) as raised:
        yield
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, str(raised.value))
    assert set(texts) == {texts[0]}
    assert re.search(sentence, texts[0]), texts[0]
    assert "\n" not in texts[0]
    assert run.hashes() == before
    assert _bytes(folder) == files
    dist.barrier()


def _disk_full(folder: Path, kind: str) -> None:
    run = _saved(kind, folder)
    real = os.fsync
    for victim in range(dist.get_world_size()):
        for at in (1, 2, 4) if victim == 0 else (1, 2):
            calls = 0

            def full(descriptor: int, victim: int = victim, at: int = at) -> None:
                nonlocal calls
                calls += 1
                if dist.get_rank() == victim and calls == at:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                real(descriptor)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fsync", full)
                sentence = (
                    "cannot save step 3 to .*No space left on device.*earlier checkpoints are"
                )
                with _nothing_changes(run, folder, sentence):
                    run.checkpoints.save(3)
    run.checkpoints.save(3)
    assert run.checkpoints.steps() == [2, 3]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_full_disk(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    ranks(2, _disk_full, tmp_path / "run", kind)


def _file_too_large(folder: Path) -> None:
    """The kernel refuses, in the middle of a real write."""
    import resource

    run = _saved("ddp", folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with _nothing_changes(run, folder, "cannot save step 3 to .*File too large"):
            run.checkpoints.save(3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_files(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, _file_too_large, tmp_path / "run")


def _change_manifest(**fields: Any) -> Callable[[Path], None]:
    def change(step: Path) -> None:
        content = json.loads((step / "manifest.json").read_text())
        (step / "manifest.json").write_text(json.dumps({**content, **fields}))

    return change


def _truncate(name: str) -> Callable[[Path], None]:
    return lambda step: os.truncate(step / name, (step / name).stat().st_size // 2)


def _flip(name: str) -> Callable[[Path], None]:
    def change(step: Path) -> None:
        data = bytearray((step / name).read_bytes())
        data[-1] ^= 1
        (step / name).write_bytes(data)

    return change


def _a_folder(step: Path) -> None:
    (step / "manifest.json").unlink()
    (step / "manifest.json").mkdir()


_SHARD = "tensors/shard-00002-model-00001-of-00001.safetensors"
_DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate(_SHARD), r"shard-00002\S* has \d+ bytes instead of \d+"),
    "flipped": (_flip("processes/rank-00000.safetensors"), "its checksum is another"),
    "lost": (lambda step: (step / _SHARD).unlink(), "is missing"),
    "strange": (lambda step: (step / "tensors/more.safetensors").touch(), "should not be there"),
    "manifest": (_truncate("manifest.json"), "expected JSON in"),
    "unreadable": (_a_folder, "there is no file manifest.json"),
    "nested": (lambda step: (step / "manifest.json").write_text("[" * 10**5), "expected JSON in"),
    "version": (_change_manifest(version=2), "its version is 2, expected 1"),
    "moved": (_change_manifest(step=7), "manifest.json is malformed"),
    "unknown": (_change_manifest(more=1), "missing or unknown fields"),
    "outside": (_change_manifest(files={"../x": [0, 0]}), "manifest.json is malformed"),
    "state": (_change_manifest(state={"dict": {"model": {"tensor": "x"}}}), "malformed"),
}


def _damaged(folder: Path, kind: str) -> None:
    _saved(kind, folder)
    run = Run(kind, folder)
    for name, (change, sentence) in _DAMAGE.items():
        copy = folder.with_name(name)
        if dist.get_rank() == 0:
            shutil.copytree(folder, copy)
            change(copy / "step-000000002")
        dist.barrier()
        run.checkpoints.folder = copy
        with _nothing_changes(run, copy, f"cannot load .*step-000000002: .*{sentence}"):
            run.checkpoints.load()
        assert run.checkpoints.load(1) == 1  # the last good one is there


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_damaged_checkpoints(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    ranks(2, _damaged, tmp_path / "run", kind)


def _of_another_run(folder: Path) -> None:
    _saved("ddp", folder)
    other = Run("ddp", folder, hidden=11)
    sentence = r"first\.\w+' is \[\[13.* and not \[\[11.* as in this run; build the run as it was"
    with _nothing_changes(other, folder, sentence):
        other.checkpoints.load()
    run = Run("ddp", folder)
    for changed, sentence in (
        ({"masks": None}, "run/masks is a dict in the checkpoint and None here"),
        ({"tracker": None}, "'counts/:relu' is only in one of .*; build the run as it was saved"),
        ({"others": {}}, "run/others has 'schedule' only in the checkpoint"),
        ({"optimizer": torch.optim.SGD(run.model.parameters(), 0.1)}, "run/optimizer"),
    ):
        given: dict[str, Any] = {
            "model": run.model,
            "optimizer": run.optimizer,
            "masks": run.masks,
            "tracker": run.tracker,
            "others": {"schedule": run.schedule},
            **changed,
        }
        with _nothing_changes(run, folder, sentence):
            lc.Checkpoints(folder, **given).load()
    with _nothing_changes(run, folder, "the optimiser has no state yet; save after its first step"):
        run.checkpoints.save(3)
    assert run.checkpoints.load() == 2
    with _nothing_changes(run, folder, "there is step-000000002 already"):
        run.checkpoints.save(2)
    with _nothing_changes(run, folder, "there is no file manifest.json"):
        run.checkpoints.load(9)


def test_checkpoints_of_another_run(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, _of_another_run, tmp_path / "run")


# ---- another number of processes


def _hashes_of(kind: str, folder: Path) -> tuple[dict[str, str], list]:
    run = _saved(kind, folder, 4)
    return run.hashes(), run.tracker.entropy(dist.group.WORLD).rows


def _resumed(kind: str, folder: Path) -> tuple[dict[str, str], list]:
    run = Run(kind, folder)
    sentence = r"it was saved by 2 processes and this run has \d; start as many, or pass reshard"
    with _nothing_changes(run, folder, sentence):
        run.checkpoints.load()
    assert run.checkpoints.load(reshard=True) == 4
    run.masks.check_()
    run.masks.check_ranks()
    return run.hashes(), run.tracker.entropy(dist.group.WORLD).rows


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("world", [1, 4])
def test_another_number_of_processes(ranks: Ranks, tmp_path: Path, kind: str, world: int) -> None:
    hashes, rows = ranks(2, _hashes_of, kind, tmp_path / "run")[0]
    same = [n for n in hashes if n.split()[0] in ("model", "mask", "lr", "optimizer")]
    assert len(same) > 30
    for got, got_rows in ranks(world, _resumed, kind, tmp_path / "run"):
        assert {name: got[name] for name in same} == {name: hashes[name] for name in same}
        assert got_rows == rows


# ---- one process


def test_a_plain_loop_goes_on(tmp_path: Path) -> None:
    def train(run: Run, start: int) -> dict[str, str]:
        for step in range(start, 6):
            run.step(step)
            run.checkpoints.save(step + 1)
        return run.hashes()

    whole = train(Run("plain", tmp_path / "whole"), 0)
    first = Run("plain", tmp_path / "run")
    assert first.checkpoints.load() is None
    for step in range(3):
        first.step(step)
    first.checkpoints.save(3)
    again = Run("plain", tmp_path / "run")
    assert again.checkpoints.load() == 3
    assert train(again, 3) == whole
    assert again.checkpoints.steps() == [5, 6]


def test_tied_weights_channels_last_and_unused_parameters(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.Flatten(),
            torch.nn.Linear(16, 16),
            torch.nn.Linear(16, 16),
        ).to(memory_format=torch.channels_last)
        model[3].weight = model[2].weight
        model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
        return model, torch.optim.AdamW(model.parameters(), 0.01)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.randn(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    step(model, optimizer)
    lc.Checkpoints(tmp_path, model, optimizer).save(1)
    step(model, optimizer)
    model2, optimizer2 = build()
    assert lc.Checkpoints(tmp_path, model2, optimizer2).load() == 1
    step(model2, optimizer2)
    for a, b in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    assert model2[3].weight is model2[2].weight


def test_parts_must_cover_a_tensor_once(tmp_path: Path) -> None:
    """A forger's files: headers that lie about where their parts lie."""
    from safetensors.torch import save_file

    def write(*parts: tuple[list[Any], int]) -> None:
        (tmp_path / "tensors").mkdir(exist_ok=True)
        for i, (offsets, rows) in enumerate(parts):
            places = json.dumps({"w": {"saved_offsets": offsets}})
            save_file(
                {"w": torch.zeros(rows, 2)},
                tmp_path / "tensors" / f"{i}.safetensors",
                {"DCP_SHARDING_INFO": places},
            )

    expected = {"w": [[4, 2], "float32"]}
    write(([0, 0], 2), ([2, 0], 2))
    check_content(tmp_path, expected)
    for second, sentence in (
        ([1, 0], "overlap"),
        ([0, 0], "overlap"),
        ([2, 1], "another shape"),
        ([-1, 0], "another shape"),
        ([2**70, 0], "malformed|another shape"),
        ([2], "malformed|another shape"),
        (["a", 0], "malformed"),
        (7, "malformed"),
    ):
        write(([0, 0], 2), (second, 2))
        with pytest.raises(ValueError, match=sentence):
            check_content(tmp_path, expected)
    write(([0, 0], 2), ([2, 0], 1))
    with pytest.raises(ValueError, match="missing"):
        check_content(tmp_path, expected)
    with pytest.raises(ValueError, match="lack"):
        check_content(tmp_path, {**expected, "v": [[1], "float32"]})
