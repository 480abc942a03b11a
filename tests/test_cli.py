"""The command line as people use it: what it prints, writes and refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import layer_collapse
from layer_collapse import load_folded
from layer_collapse.cli import experiments, main
from layer_collapse.training import Recipe

ROOT = Path(__file__).parents[1]
MODULE = "user_nets_of_the_cli_tests"
NETS = '''
import torch
from torch import nn

class Net(nn.Module):
    """Two blocks with a way around them; the first one's rectifier never switches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act1, self.b = nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5)
        self.c, self.act2, self.d = nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)
        nn.init.constant_(self.a.bias, 40.0)

    def forward(self, x):
        y = x + self.b(self.act1(self.a(x)))
        return self.head(x + self.d(self.act2(self.c(x))) + 1e-3 * y)

def mixed():
    net = Net()
    nn.init.zeros_(net.a.bias)
    return net

def nan():
    net = Net()
    net.c.weight.data[0, 0] = float("nan")
    return net

def cut():
    net = Net()
    nn.init.zeros_(net.head.weight)
    return net

def plain():
    return nn.Linear(5, 3)

def text():
    return "no module"

def fails():
    raise ZeroDivisionError("two\\nlines")

number = 3
'''


@pytest.fixture
def user(tmp_path: Path, monkeypatch) -> Path:
    """A folder with somebody's networks, weights and data, as the working directory."""
    (tmp_path / f"{MODULE}.py").write_text(NETS)
    (tmp_path / "no_syntax.py").write_text("def (:\n")
    (tmp_path / "raises.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    nets = module()
    monkeypatch.setitem(sys.modules, MODULE, nets)
    save_file(nets.Net().state_dict(), "net.safetensors")
    save_file(nets.nan().state_dict(), "nan.safetensors")
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    save_file({"x": x, "y": torch.arange(40) % 3}, "x.safetensors")
    np.savez("x.npz", x=x.numpy())
    return tmp_path


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, f"{MODULE}.py")
    assert spec
    assert spec.loader
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    return nets


def call(capsys, *argv: object) -> tuple[int, str, str]:
    try:
        code = main([str(a) for a in argv])
    except SystemExit as end:
        code = int(end.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


MODEL = ("--model", f"{MODULE}:Net")


@pytest.mark.parametrize("file", ["x.safetensors", "x.npz"])
def test_measure_ones_own_network(user, capsys, file) -> None:
    argv = ("measure", *MODEL, "--weights", "net.safetensors", "--data", file)
    code, out, err = call(capsys, *argv, "--json")
    assert (code, err) == (0, "")
    report = strict(out)
    expected = layer_collapse.scan(module().Net(), [torch.from_numpy(np.load("x.npz")["x"])])
    assert report == expected.to_dict()
    assert [r["state"] for r in report["rectifiers"]] == ["one-sided", "mixed"]
    assert report["certified"]
    assert report["samples"] == 40
    code, out, err = call(capsys, *argv, "--batch", 7)
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert rows["act1"][-1] == "one-sided"
    assert rows["act2"][5] == f"{expected['act2'].entropy:.4f}"


def test_fold_ones_own_network(user, capsys) -> None:
    argv = ("fold", *MODEL, "--weights", "net.safetensors", "--data", "x.npz")
    code, out, err = call(capsys, *argv, "--out", "folded.safetensors", "--json")
    assert (code, err) == (0, "")
    content = strict(out)
    assert content["linearized"] == {"exact": ["act1"], "approximate": []}
    assert list(content["kept"]) == ["act2"]
    assert content["fold"]["before"]["rectifiers"] == 1  # before folding, after linearising
    assert content["fold"]["max_rel"] <= 1e-5
    assert content["file"] == "folded.safetensors"
    folded, x = load_folded("folded.safetensors"), torch.from_numpy(np.load("x.npz")["x"])
    with torch.no_grad():
        torch.testing.assert_close(folded(x), module().Net()(x), rtol=1e-4, atol=1e-5)
    assert rectifiers_in_export(folded, x) == 1
    assert rectifiers_in_export(module().Net(), x) == 2

    long = f"{'long' * 20}.safetensors"
    code, out, err = call(capsys, *argv, "--out", long)
    assert (code, err) == (0, "")
    assert f"saved to {long}\n" in out
    code, out, err = call(capsys, *argv, "--out", "more.safetensors", "--tolerance", 1, "--json")
    assert code == 0
    assert strict(out)["linearized"]["approximate"] == ["act2"]
    assert rectifiers_in_export(load_folded("more.safetensors"), x) == 0


def test_fold_where_nothing_can_leave_says_so(user, capsys) -> None:
    argv = ("fold", "--model", f"{MODULE}:mixed", "--data", "x.npz", "--out", "f.safetensors")
    code, out, err = call(capsys, *argv, "--json")
    assert code == 1
    assert err == "no rectifier has zero entropy, so no layer left the network\n"
    assert strict(out)["linearized"]["exact"] == []
    assert Path("f.safetensors").exists()


def test_a_cut_network_has_its_own_exit_code(user, capsys) -> None:
    argv = ("--model", f"{MODULE}:cut", "--data", "x.npz")
    code, out, err = call(capsys, "fold", *argv, "--out", "f")
    assert (code, out) == (3, "")
    assert err.startswith("layer-collapse: the network is cut (all 40 samples get equal logits)")
    assert len(err.splitlines()) == 1
    assert not Path("f").exists()
    code, out, _ = call(capsys, "measure", *argv)
    assert code == 0
    assert "CUT: all 40 samples get equal logits" in out


def test_doctor(capsys) -> None:
    code, out, err = call(capsys, "doctor", "--json")
    assert (code, err) == (0, "")
    facts = strict(out)
    assert facts["layer_collapse"] == layer_collapse.__version__
    assert facts["torch"] == torch.__version__
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} >= set(facts)


@pytest.mark.parametrize("command", [(), ("demo",), ("run",), ("measure",), ("fold",), ("doctor",)])
def test_help(capsys, command) -> None:
    code, out, err = call(capsys, *command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: layer-collapse")
    if not command:
        for name in ("demo", "run", "measure", "fold", "doctor", "exit codes:"):
            assert name in out


def test_version(capsys) -> None:
    assert call(capsys, "--version") == (0, layer_collapse.__version__ + "\n", "")


TINY = Recipe(epochs=1, dense_epochs=1, batch=32)


@pytest.fixture(scope="module")
def fashion(tmp_path_factory) -> Path:
    """Fashion-MNIST's files with 120 images of two pixels' difference between classes."""
    spec = importlib.util.spec_from_file_location("test_data_of_cli", ROOT / "tests/test_data.py")
    assert spec
    assert spec.loader
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    return maker.write(tmp_path_factory.mktemp("fashion"), maker.contents())


@pytest.fixture(scope="module")
def finished(fashion, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    arguments = ["run", "--data", "fashion-mnist", "--data-root", fashion, "--epochs", 1]
    arguments += ["--rounds", 2, "--fraction", 0.97, "--train-samples", 100, "--out", out, "--json"]
    assert main([str(a) for a in arguments]) == 0
    return out


def test_run_writes_everything(finished, fashion, capsys) -> None:
    content = strict((finished / "report.json").read_text("utf-8"))
    assert content["data"] == "fashion-mnist"
    assert content["samples"] == {"train": 100, "validation": 20, "test": 30}
    assert content["settings"]["recipe"]["epochs"] == 1
    assert content["epochs"] == {"collapse": 3, "dense_control": 3}
    assert [s["phase"] for s in content["history"]] == ["dense", "prune", "prune"]
    assert {p.name for p in finished.iterdir()} == {
        "report.json",
        "report.html",
        "entropy.png",
        "accuracy.png",
        "before_after.png",
        "state.safetensors",
        "folded.safetensors",
        "dense_control.safetensors",
        "shallow_control.safetensors",
    }
    folded = load_folded(finished / "folded.safetensors")
    images = torch.zeros(2, 1, 28, 28)
    assert content["rectifiers"]["after"] == rectifiers_in_export(folded, images)
    page_agrees(finished)


def test_measure_and_fold_a_finished_run(finished, fashion, tmp_path, capsys) -> None:
    argv = ("--weights", finished / "state.safetensors", "--data-root", fashion, "--json")
    code, out, err = call(capsys, "measure", *argv)
    assert (code, err) == (0, "")
    measured = strict(out)
    content = strict((finished / "report.json").read_text("utf-8"))
    assert measured["samples"] == 100
    assert {r["name"]: r["entropy"] for r in measured["rectifiers"]} == {
        layer["name"]: layer["entropy_last"] for layer in content["layers"]
    }
    argv = (*argv, "--always-fold", "--out", tmp_path / "folded.safetensors")
    code, out, err = call(capsys, "fold", *argv)
    gone = [layer["name"] for layer in content["layers"] if layer["action"] != "kept"]
    assert code == (0 if gone else 1)
    assert strict(out)["linearized"]["exact"] == gone
    mine = load_folded(tmp_path / "folded.safetensors").state_dict()
    theirs = load_folded(finished / "folded.safetensors").state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items())


def test_run_prints_a_summary_or_json(fashion, tmp_path, capsys) -> None:
    argv = ("run", "--data-root", fashion, "--epochs", 0, "--rounds", 0, "--train-samples", 50)
    argv += ("--no-controls", "--model", "mlp")
    long = "a-folder-with-a-name-that-is-longer-than-a-terminal-is-wide"
    code, out, err = call(capsys, *argv, "--out", tmp_path / long)
    assert code == 0
    assert f"report: {tmp_path / long / 'report.html'}\n" in out  # in one piece
    assert "rectifiers" in out
    assert err.startswith("dense: sparsity 0.00 %")
    code, out, _ = call(capsys, *argv, "--out", tmp_path / "b", "--json")
    assert code == 0
    content = strict(out)
    assert content == strict((tmp_path / "b" / "report.json").read_text("utf-8"))
    assert content["accuracy"]["dense_control"] is None
    assert content["model"] == "mlp"


BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "no command": ((), "required: COMMAND"),
    "unknown command": (("train",), "invalid choice"),
    "unknown option": (("doctor", "--verbose"), "unrecognized arguments"),
    "run: unknown model": (("run", "--model", "lenet", "--out", "o"), "invalid choice: 'lenet'"),
    "run: unknown data": (("run", "--data", "cifar", "--out", "o"), "invalid choice: 'cifar'"),
    "run: unknown strategy": (("run", "--strategy", "egp", "--out", "o"), "invalid choice: 'egp'"),
    "run: text for a number": (("run", "--rounds", "two", "--out", "o"), "invalid int value"),
    "measure: no data": (("measure", *MODEL), "pass --data"),
    "measure: no model": (("measure", "--data", "x.npz"), "pass --model"),
    "measure: unknown model": (("measure", "--model", "lenet", "--data", "x.npz"), "unknown model"),
    "measure: built-in without labels": (
        ("measure", "--model", "mlp", "--data", "x.npz"),
        "needs labels y",
    ),
    "measure: unknown module": (("measure", "--model", "nowhere:f", "--data", "x.npz"), "cannot"),
    "measure: no such callable": (("measure", "--model", f"{MODULE}:f", "--data", "x.npz"), "no c"),
    "measure: not callable": (
        ("measure", "--model", f"{MODULE}:number", "--data", "x.npz"),
        "no c",
    ),
    "measure: empty module": (("measure", "--model", ":f", "--data", "x.npz"), "cannot import"),
    "measure: no syntax": (("measure", "--model", "no_syntax:f", "--data", "x.npz"), "SyntaxError"),
    "measure: raises": (("measure", "--model", "raises:f", "--data", "x.npz"), "at import"),
    "measure: fails": (
        ("measure", "--model", f"{MODULE}:fails", "--data", "x.npz"),
        "ZeroDivisionError",
    ),
    "measure: no module": (
        ("measure", "--model", f"{MODULE}:text", "--data", "x.npz"),
        "must return a torch.nn.Module",
    ),
    "measure: no rectifier": (
        ("measure", "--model", f"{MODULE}:plain", "--data", "x.npz"),
        "no rectifier to track",
    ),
    "measure: no weights": (
        ("measure", *MODEL, "--weights", "none", "--data", "x.npz"),
        "no such file",
    ),
    "measure: weights are a folder": (
        ("measure", *MODEL, "--weights", ".", "--data", "x.npz"),
        "no such file",
    ),
    "measure: weights are text": (
        ("measure", *MODEL, "--weights", f"{MODULE}.py", "--data", "x.npz"),
        "no safetensors file",
    ),
    "measure: weights that do not fit": (
        ("measure", *MODEL, "--weights", "other.safetensors", "--data", "x.npz"),
        "does not fit the model",
    ),
    "measure: no data file": (("measure", *MODEL, "--data", "none.npz"), "there is no file"),
    "measure: batch 0": (("measure", *MODEL, "--data", "x.npz", "--batch", 0), "--batch must be 1"),
    "fold: NaN weights": (
        ("fold", *MODEL, "--weights", "nan.safetensors", "--data", "x.npz", "--out", "f"),
        "rectifier 'act2' saw NaN; check the weights and the data",
    ),
    "fold: no such folder": (
        ("fold", *MODEL, "--data", "x.npz", "--out", "nowhere/f"),
        "--out: there is no folder nowhere",
    ),
    "fold: no --out": (("fold", *MODEL, "--data", "x.npz"), "required: --out"),
    "fold: bad tolerance": (
        ("fold", *MODEL, "--data", "x.npz", "--out", "f", "--tolerance", "nan"),
        "tolerance",
    ),
    "run: unreadable folder": (
        ("run", "--data-root", "nowhere", "--out", "o"),
        "expected Fashion-MNIST in nowhere",
    ),
    "run: out is a file": (("run", "--data", "digits", "--out", "x.npz"), "x.npz"),
}
for option, value, message in (
    ("--rounds", -1, "rounds must be 0 or more"),
    ("--fraction", 0, "fraction must be above 0"),
    ("--fraction", 1, "fraction must be above 0"),
    ("--fraction", "nan", "fraction must be above 0"),
    ("--epochs", -1, "expected epochs >= 0"),
    ("--dense-epochs", -1, "expected epochs >= 0"),
    ("--batch", 0, "batch >= 1"),
    ("--lr", 0, "lr > 0"),
    ("--lr", "nan", "lr > 0"),
    ("--lr", 1e30, "lower the learning rate"),
    ("--floor", 0, "floor >= 1"),
    ("--max-emptied", -1, "max_emptied >= 0"),
    ("--train-samples", 0, "train_samples from 1"),
    ("--train-samples", 10**9, "train_samples from 1"),
    ("--seed", -1, "expected a seed from 0"),
    ("--accept-loss", -1, "accept_loss must be 0 or more"),
    ("--accept-loss", "nan", "accept_loss must be 0 or more"),
):
    argv = ("run", "--data", "digits", "--epochs", 1, "--out", "o", option, value)
    BAD[f"run: {option} {value}"] = (argv, message)

FILES: dict[str, Callable[[Path], object]] = {
    "no x": lambda p: np.savez(p, y=np.zeros(3)),
    "scalar x": lambda p: np.savez(p, x=np.float32(1)),
    "empty x": lambda p: np.savez(p, x=np.zeros((0, 5), np.float32)),
    "integer x": lambda p: np.savez(p, x=np.ones((4, 5), np.int64)),
    "double x": lambda p: np.savez(p, x=np.ones((4, 5))),
    "wide x": lambda p: np.savez(p, x=np.ones((4, 6), np.float32)),
    "text x": lambda p: np.savez(p, x=np.array(["a", "b"])),
    "pickled x": lambda p: np.savez(p, x=np.array([{}, 1], dtype=object)),
    "empty file": lambda p: p.write_bytes(b""),
    "half a zip": lambda p: p.write_bytes(Path("x.npz").read_bytes()[:300]),
    "damaged zip": lambda p: p.write_bytes(
        Path("x.npz").read_bytes()[:200] + b"\xff" * 40 + Path("x.npz").read_bytes()[240:]
    ),
    "an array file": lambda p: np.save(p.open("wb"), np.zeros((2, 5))),
    "text": lambda p: p.write_text("x"),
}


def one_sentence(code: int, out: str, err: str, message: str) -> None:
    assert code == 2, err
    assert out == ""
    assert err.startswith("layer-collapse")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert message.lower() in err.lower()
    assert "Traceback" not in err


@pytest.mark.parametrize("case", [*BAD])
def test_bad_input_is_refused_in_one_line(user, capsys, case) -> None:
    save_file({"a.weight": torch.zeros(2)}, "other.safetensors")
    argv, message = BAD[case]
    one_sentence(*call(capsys, *argv), message)
    assert not Path("f").exists()


@pytest.mark.parametrize("kind", [*FILES])
@pytest.mark.parametrize("command", ["measure", "fold"])
def test_bad_data_is_refused_in_one_line(user, capsys, kind, command) -> None:
    FILES[kind](user / "bad.npz")
    before = sorted(p.name for p in user.iterdir())
    more = ("--out", "f") if command == "fold" else ()
    one_sentence(*call(capsys, command, *MODEL, "--data", "bad.npz", *more), "")
    assert sorted(p.name for p in user.iterdir()) == before


def test_damaged_safetensors_data(user, capsys) -> None:
    Path("bad.safetensors").write_bytes(b"\xff" * 64)
    one_sentence(*call(capsys, "measure", *MODEL, "--data", "bad.safetensors"), "neither .npz nor")
    save_file({"x": torch.zeros(3, 5), "y": torch.zeros(0)}, "bad.safetensors")
    one_sentence(*call(capsys, "measure", "--model", "mlp", "--data", "bad.safetensors"), "y")


def test_a_damaged_state_file(user, capsys) -> None:
    save_file({"model.a": torch.zeros(2), "mask.a": torch.zeros(2)}, "state.safetensors")
    argv = ("measure", "--weights", "state.safetensors", "--data", "x.npz")
    one_sentence(*call(capsys, *argv), "state.safetensors")


def test_nan_weights_are_shown_by_measure(user, capsys) -> None:
    argv = ("measure", *MODEL, "--weights", "nan.safetensors", "--data", "x.npz", "--json")
    code, out, err = call(capsys, *argv)
    assert (code, err) == (0, "")
    assert [r["state"] for r in strict(out)["rectifiers"]] == ["one-sided", "nonfinite"]


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys, tmp_path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "run", interrupted)
    code, _, err = call(capsys, "demo", "--out", tmp_path)
    assert (code, err) == (130, "layer-collapse: interrupted; run the same command to go on\n")


@pytest.mark.parametrize("error", [RuntimeError("two\nlines  here"), KeyError("two\nlines here")])
def test_a_message_of_several_lines_becomes_one(monkeypatch, capsys, tmp_path, error) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(experiments, "run", fails)
    code, _, err = call(capsys, "demo", "--out", tmp_path)
    assert (code, err) == (2, "layer-collapse: two lines here\n")


#: Rectifiers as torch.export writes them. Written out here so that the count owes nothing to the
#: package's own graph code.
ATEN_RECTIFIERS = re.compile(
    r"^aten\.(relu|relu_|relu6|leaky_relu|leaky_relu_|prelu|_prelu_kernel|gelu|silu|silu_|hardswish"
    r"|hardswish_|hardtanh|hardtanh_|clamp_min|threshold)\."
)


def rectifiers_in_export(model: nn.Module, x: torch.Tensor) -> int:
    exported = torch.export.export(model.eval(), (x,), strict=False)
    called = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert any(name.startswith("aten.") for name in called)
    return sum(ATEN_RECTIFIERS.match(name) is not None for name in called)


def page_agrees(out: Path) -> None:
    spec = importlib.util.spec_from_file_location("page", ROOT / "tests/report/test_report.py")
    assert spec
    assert spec.loader
    checker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checker)
    truth = strict((out / "report.json").read_text("utf-8"))
    keys = checker.check_page((out / "report.html").read_text("utf-8"), truth)
    assert {"accuracy.final", "rectifiers.before", "rectifiers.after", "proof.max_rel"} <= keys


def test_the_counter_of_exported_rectifiers() -> None:
    acts = [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.GELU(), nn.SiLU(), nn.Hardswish()]
    for number in range(len(acts) + 1):
        model = nn.Sequential(nn.Linear(3, 3), *acts[:number])
        assert rectifiers_in_export(model, torch.zeros(2, 3)) == number


def test_the_real_demo(tmp_path) -> None:
    """What the README promises, by the command that it names; nothing patched."""
    out = tmp_path / "demo"
    process = subprocess.run(
        [sys.executable, "-m", "layer_collapse.cli", "demo", "--out", out],
        # One thread: as fast for networks of this size, and not slowed down by other processes.
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    content = strict((out / "report.json").read_text("utf-8"))
    folded = load_folded(out / "folded.safetensors")
    left = rectifiers_in_export(folded, torch.zeros(4, 1, 8, 8))
    original = layer_collapse.models.build("resmlp", (1, 8, 8), 10)
    assert rectifiers_in_export(original, torch.zeros(4, 1, 8, 8)) == 6
    assert left <= 3
    assert content["rectifiers"] == {"before": 6, "after": left}
    assert sum(layer["action"] != "kept" for layer in content["layers"]) == 6 - left
    accuracy = content["accuracy"]
    assert accuracy["final"] >= accuracy["dense_control"] - 1.0
    assert accuracy["final"] > 95
    assert content["proof"]["max_rel"] <= 1e-5
    assert content["agreement_with_original"] >= 0.995
    assert content["cut"] is False
    assert content["epochs"]["collapse"] == content["epochs"]["dense_control"]
    assert content["parameters"]["after"] < content["parameters"]["before"]
    page_agrees(out)
    assert f"{6 - left} of 6 rectifiers left the network" in " ".join(process.stdout.split())

    dataset = layer_collapse.data.load("digits")  # the accuracy is that of the loaded model
    with torch.no_grad():
        right = (folded(dataset.test.x).argmax(1) == dataset.test.y).double().mean()
    assert accuracy["final"] == pytest.approx(100 * float(right))


def test_demo_takes_its_seed(monkeypatch, capsys, tmp_path) -> None:
    small = {**vars(experiments.DEMO), "recipe": TINY, "rounds": 1, "train_samples": 64}
    small["options"] = {"width": 16, "hidden": 16}
    monkeypatch.setattr(experiments, "DEMO", experiments.Settings(**small))
    code, out, _ = call(capsys, "demo", "--out", tmp_path, "--seed", 5, "--json")
    assert code == 0
    content = strict(out)
    assert (content["seed"], content["model"], content["data"]) == (5, "resmlp", "digits")
    assert content["rectifiers"]["before"] == 6
