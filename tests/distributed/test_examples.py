"""Every example runs as its docstring says, here with few steps."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

_ROOT = Path(__file__).parents[2]
_EXAMPLES = sorted(path.stem for path in (_ROOT / "examples").glob("*.py"))


def _run(name: str, *arguments: str) -> str:
    source = (_ROOT / "examples" / f"{name}.py").read_text()
    command = re.search(r"^(?:python|torchrun) .*$", source, re.MULTILINE)
    assert command, f"examples/{name}.py does not say how to run it"
    program, *rest = command[0].split()
    starts = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--standalone"]}[program]
    done = subprocess.run(
        [sys.executable, *starts, *rest, *arguments],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tried() -> None:
    assert _EXAMPLES == ["ddp", "fsdp2", "hugging_face", "lightning_trainer", "plain"]


#: How each is told where to write.
_FOLDERS = {"fsdp2": "--checkpoint", "hugging_face": "--folder", "lightning_trainer": "--folder"}


@pytest.mark.parametrize("name", _EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    more = [_FOLDERS[name], str(folder)] if name in _FOLDERS else []
    epochs = "4" if name == "hugging_face" else "2"  # a vision transformer learns slowly
    out = _run(name, "--rounds", "2", "--epochs", epochs, *more)
    shown = re.findall(r"^round (\d)", out, re.MULTILINE)
    assert shown == (["2"] if name == "lightning_trainer" else ["0", "1", "2"])  # by one rank
    gone, of, right = re.search(
        r"^(\d) of (\d) rectifiers have gone; (.*)% right", out, re.M
    ).groups()
    assert int(of) == 4
    assert 1 <= int(gone) <= 4
    assert float(right) > 80
    if name == "fsdp2":
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        assert "masks.words.blocks.0.fc1.weight" in saved


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    options = ["--rounds", "2", "--epochs", "2", "--folder", str(tmp_path / "run")]
    whole = _run("ddp", *options).splitlines()
    shutil.rmtree(tmp_path / "run" / "step-000000002")
    assert _run("ddp", *options).splitlines() == whole[1:]  # from round 1


def test_the_training_code_is_short() -> None:
    for name in ("ddp", "fsdp2", "plain"):
        source = (_ROOT / "examples" / f"{name}.py").read_text()
        body = source[source.index("def main(") : source.index("    tracker.remove()")]
        assert len(body.splitlines()) <= 30, name
