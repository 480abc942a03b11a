"""Files are written whole or not at all, and every failure is one sentence."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from layer_collapse import files


@pytest.mark.parametrize("data", ["a é\r\n", b"\x00\xff", ""])
def test_writes_exactly_what_it_was_given(tmp_path: Path, data: str | bytes) -> None:
    path = tmp_path / "x"
    files.write_atomically(path, data)
    assert path.read_bytes() == (data.encode("utf-8") if isinstance(data, str) else data)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_replaces_and_obeys_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "x"
    old = os.umask(0o027)
    try:
        files.write_atomically(path, "old")
        files.write_atomically(path, "new")
    finally:
        os.umask(old)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("existing", [True, False])
def test_full_disk_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, existing: bool
) -> None:
    path = tmp_path / "x.json"
    if existing:
        path.write_text("old")

    def full(*_: object) -> None:
        assert any(p.suffix == ".tmp" for p in tmp_path.iterdir())  # the data was on its way
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"cannot write .*x\.json: No space left on device; nothing"):
        files.write_atomically(path, "new" * 1000)
    assert [p.name for p in tmp_path.iterdir()] == (["x.json"] if existing else [])
    if existing:
        assert path.read_text() == "old"


def test_interrupt_leaves_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(tmp_path / "x", "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_real_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    # The temporary's name leads to a device on which every write fails.
    monkeypatch.setattr("builtins.open", lambda *_: os.fdopen(os.open("/dev/full", 1), "wb"))
    with pytest.raises(OSError, match="No space left on device"):
        files.write_atomically(path, "new" * 100_000)
    assert path.read_text() == "old"


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*nowhere/x: No such file"):
        files.write_atomically(tmp_path / "nowhere" / "x", "new")


def test_json_keeps_order_and_turns_nonfinite_into_null(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    obj = {"z": float("nan"), "a": [1.5, float("-inf"), (2, float("inf"))], "t": "é", "n": None}
    files.write_json(path, obj)
    text = path.read_text("utf-8")
    assert list(json.loads(text)) == ["z", "a", "t", "n"]
    assert "NaN" not in text
    assert "Infinity" not in text
    assert '\n "a"' in text
    assert files.read_json(path) == {"z": None, "a": [1.5, None, [2, None]], "t": "é", "n": None}


def test_json_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(TypeError, match="to_json: expected dicts"):
        files.write_json(path, {"path": tmp_path})
    assert path.read_text() == "old"


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b'{"a": NaN}', b"[" * 200_000])
def test_not_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected JSON in .*x\.json") as caught:
        files.read_json(path)
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a JSON file at .*there is none"):
        files.read_json(tmp_path / "x.json")
    with pytest.raises(OSError, match=r"cannot read .*: Is a directory"):
        files.read_json(tmp_path)
