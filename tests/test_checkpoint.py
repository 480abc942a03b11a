"""Checkpoints come back bit for bit, or are refused in one sentence; old files survive."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from layer_collapse import checkpoint

META = {"settings": {"a": [1, 2.5, None]}, "history": [], "text": 'é " \n', "on": True}


def tensors() -> dict[str, torch.Tensor]:
    x = torch.arange(24, dtype=torch.float32)
    return {
        "plain": x.view(4, 6),
        "transposed": x.view(4, 6).t(),
        "half": x.half(),
        "bfloat": x.bfloat16(),
        "words": torch.tensor([-1, 7], dtype=torch.int32),
        "count": torch.tensor(3),
        "empty": torch.zeros(0, 5),
        "odd": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "last": x.view(2, 3, 2, 2).to(memory_format=torch.channels_last),
    }


def write(path: Path) -> Path:
    checkpoint.save(path, tensors(), META)
    return path


def test_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path / "state.safetensors")
    got, meta = checkpoint.load(path)
    assert meta == META
    assert got.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        same = got[name].contiguous().view(torch.uint8) if tensor.dim() else got[name]
        assert torch.equal(same, tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    checkpoint.save(path, {"x": torch.ones(1)}, {})  # replaced whole
    assert checkpoint.load(path)[0].keys() == {"x"}


def test_tied_weights_are_kept(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    path = tmp_path / "tied"
    checkpoint.save(path, model.state_dict(), {})
    got, _ = checkpoint.load(path)
    other = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    other[2].weight = other[0].weight
    other.load_state_dict(got)
    assert torch.equal(other[2].weight, model[0].weight)


def test_parameters_are_saved_without_their_graph(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(2))
    checkpoint.save(tmp_path / "p", {"p": parameter}, {})
    assert not checkpoint.load(tmp_path / "p")[0]["p"].requires_grad


def test_prefixes() -> None:
    both = checkpoint.with_prefix("a.", {"x": torch.ones(1)})
    both |= checkpoint.with_prefix("b.", {"a.x": torch.zeros(1)})
    assert both.keys() == {"a.x", "b.a.x"}
    assert checkpoint.without_prefix("a.", both) == {"x": torch.ones(1)}
    assert checkpoint.without_prefix("b.", both).keys() == {"a.x"}


def test_meta_that_json_has_no_form_for_writes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "state")
    before = path.read_bytes()
    for bad in ({"x": float("nan")}, {"x": Path()}):
        with pytest.raises((ValueError, TypeError)):
            checkpoint.save(path, tensors(), bad)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no checkpoint {tmp_path}/none"):
        checkpoint.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        checkpoint.load(tmp_path)


def refused(path: Path) -> None:
    with pytest.raises(ValueError, match="delete it to start again") as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = write(tmp_path / "state").read_bytes()
    header = struct.unpack("<Q", content[:8])[0]
    path = tmp_path / "cut"
    for size in [*range(40), 8 + header // 2, 8 + header - 1, 8 + header, len(content) - 1]:
        path.write_bytes(content[:size])
        refused(path)
    path.write_bytes(content + b"\0")
    refused(path)


def header_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("__metadata__"),
        lambda h: h["__metadata__"].clear(),
        lambda h: h["__metadata__"].update(layer_collapse="{"),
        lambda h: h["__metadata__"].update(layer_collapse="[" * 100_000),
        lambda h: h["__metadata__"].update(layer_collapse="[]"),
        lambda h: h["__metadata__"].update(layer_collapse="null"),
        lambda h: h["__metadata__"].update(layer_collapse='"text"'),
        lambda h: h["__metadata__"].update(layer_collapse="1" * 5000),
        lambda h: h["plain"].update(shape=[4, 2**60]),
        lambda h: h["plain"].update(shape=[-4, 6]),
        lambda h: h["plain"].update(dtype="F7"),
        lambda h: h["plain"].update(data_offsets=[0, 2**63]),
        lambda h: h["plain"].update(data_offsets=[96, 0]),
        lambda h: h.update(extra={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, change) -> None:
    path = write(tmp_path / "state")
    header, rest = header_of(path)
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    refused(path)


@pytest.mark.parametrize("size", [0, 2**40, 2**63, 2**64 - 1])
def test_a_hostile_header_length_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "state"
    path.write_bytes(struct.pack("<Q", size) + b"{}" * 10)
    refused(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "pickle.pt")
    refused(tmp_path / "pickle.pt")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch, call: str) -> None:
    path = write(tmp_path / "state")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left on device; nothing was overwritten") as caught:
        checkpoint.save(path, {"x": torch.zeros(100)}, {})
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert checkpoint.load(path)[1] == META
