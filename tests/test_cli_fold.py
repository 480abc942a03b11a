"""``layer-collapse fold`` on a model of one's own, trained on real pictures."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from layer_collapse import load_folded
from layer_collapse.cli import folding, main

ROOT = Path(__file__).parents[1]
NETS = '''
import torch
from torch import nn

class Digits(nn.Module):
    """Of three rectifiers the middle one never switches: its layer sits far above zero."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2)
        self.first, self.second = nn.Linear(72, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, 10)
        self.act = nn.ModuleList(nn.ReLU() for _ in range(3))

    def forward(self, x):
        x = self.act[0](self.stem(x)).flatten(1)
        x = self.act[1](self.first(x))
        return self.head(self.act[2](self.second(x)))

def build():
    torch.manual_seed(0)
    return Digits()
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scikit-learn's digits, a network trained on them, and the file that defines it."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("mine")
    (folder / "digits_net.py").write_text(NETS)
    spec = importlib.util.spec_from_file_location("digits_net", folder / "digits_net.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    digits = load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(digits.target)
    net = module.build()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        net.first.bias += 50
        net.second.bias -= 50 * net.second.weight.sum(1)
        assert float((net(x).argmax(1) == y).float().mean()) > 0.8
    save_file(net.state_dict(), folder / "net.safetensors")
    np.savez(folder / "digits.npz", x=x.numpy(), y=y.numpy())
    return folder


def fold(folder: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "layer_collapse.cli", "fold", "--model", "digits_net:build"]
    command += ["--weights", "net.safetensors", "--data", "digits.npz", *map(str, argv)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )


def test_from_a_users_folder_to_a_file_that_needs_no_class(folder: Path) -> None:
    done = fold(folder, "--out", "folded.safetensors", "--always-fold", "--samples", 8)
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert rows["depth"][1:] == ["4", "3"]
    assert rows["parameters"][1:] == ["5,482", "2,746"]
    assert rows["rectifiers"][1:] == ["2", "2"]  # of the linearised network, before folding
    macs = [8 * (9 * 8 * 9 + m + 320) for m in (72 * 48 + 48 * 32, 72 * 32)]
    assert rows["macs"][1:] == [f"{one:,}" for one in macs]
    assert float(rows["latency,"][2]) > 0
    assert "(batch 8, " in done.stdout
    assert "saved to folded.safetensors\n" in done.stdout
    folded = load_folded(folder / "folded.safetensors")
    with np.load(folder / "digits.npz") as arrays:
        x, y = (torch.from_numpy(arrays[k]) for k in "xy")
    assert float((folded(x).argmax(1) == y).float().mean()) > 0.8
    assert sum(isinstance(m, nn.Linear) for m in folded.modules()) == 2


def test_layers_are_timed_unless_told_otherwise(folder: Path) -> None:
    done = fold(folder, "--out", "timed.safetensors", "--json", "--no-proof", "--border", "refuse")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)["fold"]
    assert report["proven"] is False
    merged = [f for f in report["folds"] if f["rule"] == "linear"]
    refused = [r for r in report["refusals"] if r["reason"].startswith("slower: ")]
    assert len(merged) + len(refused) == 1
    assert all(f["before_ms"] > f["after_ms"] > 0 for f in merged)
    assert report["latency"]["batch"] == 32
    assert json.loads(done.stdout)["onnx"] is None


def test_options_reach_the_fold(folder: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    given = {}

    def spy(model, example, **options):  # type: ignore[no-untyped-def]
        given.update(options, samples=len(example))
        raise ValueError("seen")

    monkeypatch.setattr(folding, "fold", spy)
    argv = ["fold", "--model", "digits_net:build", "--weights", "net.safetensors"]
    argv += ["--data", "digits.npz", "--out", "f"]
    assert main([*argv, "--border", "ring", "--samples", "5"]) == 2
    assert given == {"border": "ring", "always_fold": False, "prove": True, "samples": 5}
    assert main([*argv, "--always-fold", "--no-proof"]) == 2
    assert given == {"border": "biasmap", "always_fold": True, "prove": False, "samples": 32}
    capsys.readouterr()
    assert main([*argv, "--samples", "0"]) == 2
    assert capsys.readouterr().err == "layer-collapse: --samples must be 1 or more (got 0)\n"


def test_gates_within_an_error_and_the_distance_to_the_original(folder: Path) -> None:
    with np.load(folder / "digits.npz") as arrays:
        np.savez(folder / "others.npz", x=arrays["x"][:40] + 0.01)
    options = ("--max-error", "0.9", "--held-out", "others.npz", "--samples", "4")
    done = fold(folder, "--out", "near.safetensors", "--json", *options)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert set(content["error"]) == set(content["linearized"]["approximate"]) != set()
    assert all(0 < error <= 0.9 for error in content["error"].values())
    largest = content["max_error"]
    assert largest.keys() == content["error"].keys()
    assert all(error > 0 for error in largest.values())
    near = content["agreement"]
    assert (near["samples"], near["held_out"]) == (40, "others.npz")
    assert 0 < near["relative"] < 1
    plain = fold(folder, "--out", "exact.safetensors", "--always-fold")
    assert "the same class as the original on 100.00% of 1797 scanned samples" in plain.stdout
    bad = fold(folder, "--out", "bad.safetensors", "--max-error", "-1")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "layer-collapse: --max-error must be 0 or more (got -1.0)\n"


def test_without_onnx_one_sentence_says_what_to_install(folder: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "onnx", None)
    argv = ["fold", "--model", "digits_net:build", "--weights", "net.safetensors"]
    assert main([*argv, "--data", "digits.npz", "--out", "none", "--onnx", "f.onnx"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("layer-collapse: --onnx needs onnx, which is not installed; run `pip ")
    assert len(err.splitlines()) == 1
    assert not (folder / "none").exists()


def test_onnx_gives_the_same(folder: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    done = fold(folder, "--out", "o.safetensors", "--onnx", "net.onnx", "--json", "--always-fold")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)["onnx"]
    assert content["file"] == "net.onnx"
    assert content["max_rel"] <= 1e-4
    session = onnxruntime.InferenceSession(str(folder / "net.onnx"))
    with np.load(folder / "digits.npz") as arrays:
        x = arrays["x"][:100]  # another batch size than it was exported with
    (got,) = session.run(None, {session.get_inputs()[0].name: x})
    expected = load_folded(folder / "o.safetensors")(torch.from_numpy(x))
    torch.testing.assert_close(torch.from_numpy(got), expected.detach(), rtol=1e-4, atol=1e-3)


def _refused(folder: Path, monkeypatch, capsys, *argv: str) -> str:  # type: ignore[no-untyped-def]
    """The sentence of a fold that is refused before anything is scanned."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(folding, "scanned", None)
    command = ["fold", "--model", "digits_net:build", "--weights", "net.safetensors"]
    assert main([*command, "--data", "digits.npz", *argv]) == 2
    err: str = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    return err.removeprefix("layer-collapse: ").rstrip()


def test_bad_places_and_samples_are_refused_first(folder: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    def refused(*argv: str) -> str:
        return _refused(folder, monkeypatch, capsys, *argv)

    assert refused("--out", "/nonexistent/f") == (
        "--out: there is no folder /nonexistent; make it first"
    )
    assert refused("--out", ".") == "--out must be a file (got the folder .); add a name"
    assert refused("--out", "f", "--onnx", "no/f").startswith("--onnx: there is no folder no;")
    np.savez(folder / "wrong.npz", x=np.zeros((4, 1, 8, 9), np.float32))
    assert refused("--out", "f", "--held-out", "wrong.npz") == (
        "--held-out must hold samples like those of --data, [1, 8, 8] of torch.float32 "
        "(got [1, 8, 9] of torch.float32)"
    )
    assert not (folder / "f").exists()


def test_what_cannot_be_saved_is_told_before_the_fold(folder: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    (folder / "odd_net.py").write_text(
        NETS.replace("nn.Linear(32, 10)", "nn.Sequential(nn.Linear(32, 10), nn.RReLU())")
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(folding, "fold", lambda *_, **__: 1 / 0)
    command = ["fold", "--model", "odd_net:build", "--data", "digits.npz", "--out", "f"]
    with pytest.raises(ZeroDivisionError):
        main(command)
    err = capsys.readouterr().err
    assert "'head.1' is a RReLU, which is not registered; unless it leaves the network" in err


def test_padding_that_moves_is_named_and_its_change_measured(tmp_path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "padded.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(),\n"
        "        nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 3))\n"
        "    nn.init.constant_(net[0].bias, 9.0)\n"
        "    return net\n"
    )
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).random((12, 1, 8, 8), np.float32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*argv: str) -> str:
        command = ["fold", "--model", "padded:build", "--data", "x.npz", "--out", "f.safetensors"]
        assert main([*command, "--always-fold", *argv]) == 0
        out: str = capsys.readouterr().out
        return out

    kept, moved = (json.loads(run("--json", "--border", border)) for border in ("refuse", "move"))
    assert kept["moved"] == []
    assert kept["agreement"]["relative"] < 1e-5
    assert moved["moved"] == [["0", "2"]]
    assert moved["agreement"]["relative"] > 1e-3
    assert moved["fold"]["after"]["depth"] == kept["fold"]["after"]["depth"] - 1
    assert "the padding of '2' lies in front of '0' now: fine-tune" in run("--border", "move")
