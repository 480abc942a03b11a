"""Hostile files: each ends in one sentence or loads to a valid model, and costs no more than it is.

The seeds are files of save_folded, of collapse() and of Checkpoints; see victim.py for what is
watched and mutations.py for what is changed.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import layer_collapse as lc
from layer_collapse import checkpoint
from tests.hostile.victim import kilobytes, start_peak
from tests.reduce import models

_ROOT = Path(__file__).parents[2]


def _attack(folder: Path, first: int, count: int, timeout: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.hostile.victim", str(folder), str(first), str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(
        command,
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    current = folder / "current"
    at = current.read_text() if current.exists() else "none"
    assert done.returncode == 0, f"the process ended at file {at}: {done.stderr[-3000:]}"
    print(done.stdout)
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["files"] == count
    assert not result["failures"], result
    # Both happen, or the mutations are too crude or too weak to show anything.
    assert result["refused"] > count / 2
    assert result["loaded"] > count / 50
    return result


def test_500_mutated_files(tmp_path: Path) -> None:
    _attack(tmp_path, 0, 500, 280)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_10000_mutated_files(tmp_path: Path) -> None:
    _attack(tmp_path, 500, 10_000, 3500)


# ---- attacks that chance would not find


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    model = models.make("residual", ("on", "six"), 15)
    path = tmp_path_factory.mktemp("saved") / "m.safetensors"
    lc.save_folded(lc.fold(model, models.inputs(model)).model, path)
    return path.read_bytes()


def _forged(
    saved: bytes, change: Callable[[dict[str, Any], dict[str, Any]], Any], text: str = ""
) -> bytes:
    """A file whose header and recipe were changed, with the checksum that fits."""
    (length,) = struct.unpack("<Q", saved[:8])
    header, body = json.loads(saved[8 : 8 + length]), saved[8 + length :]
    recipe = json.loads(header["__metadata__"]["recipe"])
    change(header, recipe)
    text = text or json.dumps(recipe)
    header["__metadata__"] |= {"recipe": text, "crc32": str(zlib.crc32(text.encode()))}
    start = json.dumps(header).encode()
    return struct.pack("<Q", len(start)) + start + body


def _deep(kind: str, depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {kind: {"a": value} if kind == "dict" else [value]}
    return value


def _rename(header: dict[str, Any], recipe: dict[str, Any]) -> None:
    path = ".".join("a" * 50_000)
    recipe["modules"][path] = recipe["modules"].pop("stem")


def _tie(header: dict[str, Any], recipe: dict[str, Any]) -> None:
    entry = recipe["tensors"]["stem.weight"]
    recipe["tensors"]["other"] = {**entry, "strides": [1, entry["shape"][0]]}
    recipe["nodes"].insert(
        1,
        {
            "name": "o",
            "op": "get_attr",
            "target": "other",
            "args": {"tuple": []},
            "kwargs": {"dict": {}},
        },
    )


def _huge(header: dict[str, Any], recipe: dict[str, Any]) -> None:
    fields = {f: recipe["modules"]["stem"]["fields"][f] for f in ("bias",)}
    sizes = {"in_features": 10**9, "out_features": 10**9}
    recipe["modules"]["stem"]["fields"] = {**fields, **sizes}


def _convolution(header: dict[str, Any], recipe: dict[str, Any]) -> None:
    fields = {"in_channels": 10**9, "out_channels": 10**9, "groups": 1, "bias": False}
    square = {name: {"tuple": [1, 1]} for name in ("kernel_size", "stride", "dilation")}
    fields |= {**square, "padding": {"tuple": [0, 0]}, "padding_mode": "zeros"}
    recipe["modules"]["stem"] = {"type": "Conv2d", "fields": fields}


def _cycle(header: dict[str, Any], recipe: dict[str, Any]) -> None:
    node = recipe["nodes"][1]
    node["args"] = {"tuple": [{"node": node["name"]}]}


def _later(header: dict[str, Any], recipe: dict[str, Any]) -> None:
    recipe["nodes"][1]["args"] = {"tuple": [{"node": recipe["nodes"][2]["name"]}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, "bad path"),
        (_tie, "other strides than one that it is tied to"),
        (_huge, "does not fit a Linear"),
        (_convolution, "stem"),
        (_cycle, "unknown node"),
        (_later, "unknown node"),
    ],
)
def test_forgeries(saved: bytes, tmp_path: Path, change: Callable[..., Any], message: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(_forged(saved, change))
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as raised:
        lc.load_folded(path)
    assert "\n" not in str(raised.value)
    assert time.process_time() - start < 60  # not a measurement: forever is much longer


@pytest.mark.parametrize("kind", ["list", "tuple", "dict"])
@pytest.mark.parametrize("depth", [90, 180, 300, 400])
def test_deeply_nested_arguments(saved: bytes, tmp_path: Path, kind: str, depth: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(_forged(saved, lambda h, r: r["nodes"][1].update(args=_deep(kind, depth))))
    sentence = _sentence(lambda: lc.load_folded(path))
    assert bool(sentence) or (kind == "tuple" and depth < 200)  # which Python can still compile


def _sentence(load: Callable[[], Any]) -> str:
    """What it was refused with; "" if it loads."""
    try:
        load()
    except ValueError as error:
        text = str(error)
    else:
        return ""
    assert text
    assert "\n" not in text
    return text


def test_more_json_than_tensors(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    text = "[" + "[]," * (2 << 20) + "[]]"  # would take 25 times its length
    path.write_bytes(_forged(saved, lambda h, r: None, text))
    with pytest.raises(ValueError, match=r"bytes of JSON; expected at most"):
        lc.load_folded(path)
    with pytest.raises(ValueError, match=r"bytes of JSON; expected at most"):
        checkpoint.load(path)
    model = lc.load_folded(_write(path, saved))
    with pytest.raises(ValueError, match=r"bytes of JSON.*; nothing was written"):
        lc.save_folded(model, tmp_path / "n.safetensors", {"x": "y" * (5 << 20)})
    with pytest.raises(ValueError, match="bytes of JSON"):
        checkpoint.save(tmp_path / "n.safetensors", {}, {"x": "y" * (5 << 20)})
    assert not (tmp_path / "n.safetensors").exists()


def test_loading_takes_twice_the_file(tmp_path: Path) -> None:
    """The file's pages and the tensors, even where they are laid out otherwise than in the file."""
    model = nn.Sequential(nn.Conv2d(1500, 1200, 3)).to(memory_format=torch.channels_last)
    path = tmp_path / "m.safetensors"
    lc.save_folded(fx.symbolic_trace(model), path)
    size = path.stat().st_size
    assert size > 60 << 20
    del model
    before = start_peak()
    loaded = lc.load_folded(path)
    assert loaded.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)
    assert 1024 * (kilobytes("VmHWM") - before) < 2.1 * size + (8 << 20)
    checkpoint.save(path, dict(loaded.state_dict()), {})
    del loaded
    size = path.stat().st_size
    before = start_peak()
    tensors, _ = checkpoint.load(path)
    assert size > sum(tensor.nbytes for tensor in tensors.values()) > 60 << 20
    assert 1024 * (kilobytes("VmHWM") - before) < 2.1 * size + (8 << 20)


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_empty_tensors_of_great_shape(tmp_path: Path) -> None:
    """No bytes, many elements along one dim: nothing overflows."""
    for shape in ([0, 2**40], [2**31, 0, 2**31], [0, 2**61, 2**61], [0] * 70):
        header = {
            "__metadata__": {"layer_collapse": "{}"},
            "a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]},
        }
        start = json.dumps(header).encode()
        path = _write(tmp_path / "c", struct.pack("<Q", len(start)) + start)
        if not _sentence(lambda path=path: checkpoint.load(path)):  # type: ignore[misc]
            assert checkpoint.load(path)[0]["a"].numel() == 0


def test_a_file_that_is_no_file(tmp_path: Path) -> None:
    """Reading one of these would never end."""
    link = tmp_path / "m.safetensors"
    link.symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    for path in (link, tmp_path / "pipe"):
        with pytest.raises(FileNotFoundError):
            lc.load_folded(path)
        with pytest.raises(FileNotFoundError):
            checkpoint.load(path)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    checkpoints = lc.Checkpoints(tmp_path / "run", model, optimizer)
    step = checkpoints.save(1)
    (step / "manifest.json").rename(tmp_path / "manifest.json")
    (step / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(OSError, match=r"there is no file manifest\.json"):
        checkpoints.load()
    (step / "manifest.json").unlink()
    (tmp_path / "manifest.json").rename(step / "manifest.json")
    own = step / "processes" / "rank-00000.safetensors"
    own.unlink()
    os.mkfifo(own)
    with pytest.raises(ValueError, match=r"rank-00000\.safetensors' is no file"):
        checkpoints.load()
