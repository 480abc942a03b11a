"""What users do to checkpoints without meaning harm: one sentence each, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from faults_job import Run
from pool import Ranks
from torch import Tensor, nn

import layer_collapse as lc
from layer_collapse import files
from layer_collapse.prune.schedule import Rounds
from layer_collapse.resume.folder import locked

_HOLD = """
import sys, time
from pathlib import Path
from layer_collapse.resume.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


class _State:
    """Something of a loop that is saved with the rest."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        if isinstance(self.value, Exception):
            raise self.value
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def _small(names: tuple[str, ...] = ()) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    for name in names:
        model.register_parameter(name, nn.Parameter(torch.rand(2)))
    return model


def _job(folder: Path, model: nn.Module | None = None, **options: Any) -> lc.Checkpoints:
    model = _small() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    weight = next(p for p in model.parameters() if p.dim() > 1)
    model(torch.ones(3, 4, dtype=weight.dtype)).sum().backward()
    optimizer.step()
    return lc.Checkpoints(folder, model, optimizer, **options)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- processes that do not agree


def _disagree(folder: Path) -> None:
    rank = dist.get_rank()
    job = _job(folder / "job")

    def both_refuse(sentence: str, action: Callable[[], Any]) -> None:
        with pytest.raises(ValueError, match=sentence) as raised:
            action()
        assert "\n" not in str(raised.value)
        dist.barrier()

    both_refuse(
        "rank 1 differs from rank 0 in the step; build the same", lambda: job.save(1 + rank)
    )
    other = _job(folder / "job", others={"schedule": _State(rank)})
    both_refuse("rank 1 differs from rank 0 in others; build the same", lambda: other.save(1))
    wide = _job(folder / "job", nn.Sequential(nn.Linear(4, 5 + rank)))
    both_refuse("rank 1 differs from rank 0 in shapes; build the same", lambda: wide.save(1))
    broken = _State(KeyError("no\nsuch") if rank else 1)
    worse = _job(folder / "job", others={"schedule": broken})
    both_refuse(r"cannot save step 1 to \S*: KeyError: .*no.*such", lambda: worse.save(1))
    assert not (folder / "job").exists()
    job.save(1)
    apart = _job(folder / ("job" if rank else "empty"))
    both_refuse("rank 1 differs from rank 0 in what is there; all .* one folder", apart.load)
    assert job.load() == 1


def test_processes_that_differ_are_named_and_none_waits(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, _disagree, tmp_path)


# ---- two runs, old runs, other places


def test_a_fresh_run_in_an_old_folder_loses_nothing(tmp_path: Path) -> None:
    old = _job(tmp_path / "run")
    old.save(90), old.save(100)
    for step in (1, 95, 100):
        with pytest.raises(ValueError, match="there is step-000000100 already; go on from it"):
            _job(tmp_path / "run").save(step)
    assert _names(tmp_path / "run") == ["step-000000090", "step-000000100"]


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = _job(folder)
    job.save(1)
    (folder / ".step-000000002.tmp").mkdir()  # of the other
    with locked(folder), pytest.raises(ValueError, match="another run is saving there; give each"):
        job.save(2)
    assert (folder / ".step-000000002.tmp").exists()
    other = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert other.stdout
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="another run is saving there"):
        job.save(2)
    other.kill()  # which gives the folder free
    other.wait()
    job.save(2)
    assert _names(folder) == ["step-000000001", "step-000000002"]


def test_checkpoints_that_were_moved_and_linked(tmp_path: Path) -> None:
    """To a larger disk, say: loaded through the link; when they are old only the link goes."""
    folder, moved = tmp_path / "run", tmp_path / "moved"
    job = _job(folder)
    job.save(1).rename(moved)
    (folder / "step-000000001").symlink_to(moved)
    (folder / ".step-000000007.tmp").symlink_to(moved)
    assert job.load() == 1
    job.save(2), job.save(3)
    assert _names(folder) == ["step-000000002", "step-000000003"]
    assert (moved / "manifest.json").is_file()
    (folder / "step-000000002").rename(tmp_path / "aside")
    (folder / "step-000000002").write_text("no folder")
    job.save(4)
    assert _names(folder) == ["step-000000003", "step-000000004"]


def test_a_folder_that_is_none_or_cannot_be_written() -> None:
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        (base / "file").touch()
        with pytest.raises(OSError, match=r"cannot save step 1 to .*File exists"):
            _job(base / "file").save(1)
        job = _job(base / "run")
        job.save(1)
        base.chmod(0o755), (base / "run").chmod(0o555)
        root = os.geteuid() == 0
        try:
            if root:  # whom no permission stops
                os.seteuid(65534)
            with pytest.raises(OSError, match=r"cannot save step 2 to .*Permission denied"):
                job.save(2)
            assert job.load() == 1
            for secret in sorted(p for p in base.rglob("*") if p.is_file() and p.stat().st_size):
                mode = secret.stat().st_mode
                if root:
                    os.seteuid(0)
                secret.chmod(0)
                if root:
                    os.seteuid(65534)
                with pytest.raises(OSError, match=r"cannot load .*Permission denied") as raised:
                    job.load()
                assert "\n" not in str(raised.value)
                if root:
                    os.seteuid(0)
                secret.chmod(mode)
                if root:
                    os.seteuid(65534)
        finally:
            if root:
                os.seteuid(0)
        (base / "run").chmod(0o755)
        job.save(2)


# ---- what is in them


@pytest.mark.parametrize(
    "names", [("é", "日本", "🙂"), ('"', "\\", "a b", "a\nb"), ("tensor", "dict"), ("n" * 20_000,)]
)
def test_odd_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    job = _job(tmp_path, _small(names))
    job.save(1)
    again = _small(names)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert _job(tmp_path, again).load() == 1
    for ours, theirs in zip(again.parameters(), _small(names).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.011)  # a step of 0.01 apart


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.double(), r"model/0\.weight' is \[\[5, 4\], 'float32'\] and not .*float64"),
        (lambda m: m.register_parameter("more", nn.Parameter(torch.ones(1))), "only here"),
        (lambda m: m.__delitem__(2), "only in the checkpoint"),
    ],
)
def test_a_changed_model(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    _job(tmp_path).save(1)
    model = _small()
    change(model)
    job = _job(tmp_path, model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message + ".*; build the run as it was saved"):
        job.load()
    assert all(map(torch.equal, before, model.parameters()))


def test_what_could_not_be_loaded_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _small()
    model.register_parameter("c", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    with pytest.raises(ValueError, match=r"'run/model/c' is complex64; expected float64.*convert"):
        _job(tmp_path, model).save(1)
    step = _job(tmp_path / "fits").save(1)
    headers = [int.from_bytes(path.read_bytes()[:8], "little") for path in step.glob("*/*")]
    manifest = (step / "manifest.json").stat().st_size
    assert max(headers) < manifest - 500
    for limit in (max(headers) - 100, manifest - 500):
        monkeypatch.setattr(files, "_TEXT", limit)
        with pytest.raises(ValueError, match="bytes of JSON; expected at most") as raised:
            _job(tmp_path / "run").save(1)
        assert "make room" not in str(raised.value)
        assert _names(tmp_path / "run") == []


def test_files_with_holes(tmp_path: Path) -> None:
    """A terabyte that the disk does not hold, to let in a gigabyte of JSON."""
    job = _job(tmp_path)
    step = job.save(1)
    os.truncate(next((step / "tensors").iterdir()), 1 << 40)
    os.truncate(step / "manifest.json", 1 << 30)
    with pytest.raises(ValueError, match="it has 1073741824 bytes of JSON; expected at most"):
        job.load()


def test_callbacks_refuse_masks_of_another_model() -> None:
    def build(hidden: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def started(model: nn.Module) -> Rounds:
        rounds = Rounds(0.5, 1)
        rounds.start(model, [torch.optim.SGD(model.parameters(), 0.1)], None)
        return rounds

    tensors = started(build(8)).tensors()
    for change, message in (
        ({"masks/more": torch.ones(1, dtype=torch.int32)}, r"parameters differ \('more'\)"),
        ({"counts/more": torch.ones(1, dtype=torch.int64)}, r"rectifiers differ \(more\)"),
        ({"masks/0.weight": torch.ones(7, dtype=torch.int32)}, "the words of '0.weight' must be"),
    ):
        model = build(8)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            started(model).load_tensors({**tensors, **change})
        assert all(map(torch.equal, before, model.parameters()))
    without = {name: t for name, t in tensors.items() if not name.startswith("masks/")}
    with pytest.raises(ValueError, match=r"parameters differ \('0.weight'\)"):
        started(build(8)).load_tensors(without)
    with pytest.raises(ValueError, match="counts of '1': expected int64 of"):
        started(build(9)).load_tensors(tensors)


# ---- the middle of an epoch


def test_resuming_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """An epoch's order from a generator of its own, by its number: the manual's way."""
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(3))
    y = torch.arange(32) % 3

    def order(epoch: int) -> tuple[Tensor, ...]:
        return torch.randperm(32, generator=torch.Generator().manual_seed(epoch)).split(5)

    def train(run: Run, stop: int) -> dict[str, str]:
        step = run.checkpoints.load() or 0
        length = len(order(0))
        while step < stop:
            batch = order(step // length)[step % length]
            run.optimizer.zero_grad()
            F.cross_entropy(run.model(x[batch]), y[batch]).backward()  # draws its dropout too
            run.optimizer.step()
            step += 1
            run.checkpoints.save(step)
        return run.hashes()

    whole = train(Run("plain", tmp_path / "whole"), 18)
    train(Run("plain", tmp_path / "part"), 10)  # three batches into the second epoch
    assert train(Run("plain", tmp_path / "part"), 18) == whole
    manifest = json.loads((tmp_path / "part" / "step-000000018" / "manifest.json").read_text())
    assert manifest["step"] == 18
