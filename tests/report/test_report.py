"""What the page says is what report.json says, and a hostile name stays a name."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from layer_collapse import files, report
from layer_collapse.report import canvas

HOSTILE = '<script>alert("x")</script> $\\frac{$ [red] & \x07'
ROUNDS = ((0, "dense", 0.0), (1, "prune", 0.75), (2, "prune", 0.9996), (2, "accept", 1.0))


def example(**changes: Any) -> dict[str, Any]:
    names = ["blocks.0.act", "blocks.1.act", "_blocks\\2.act"]
    entropies = {names[0]: 0.71234567, names[1]: 1.5e-7, names[2]: None}
    made: dict[str, Any] = {
        "data": "digits",
        "model": "resmlp",
        "strategy": "entropy-guided",
        "seed": 3,
        "layers": [
            {
                "name": name,
                "kind": "ReLU",
                "entropy_first": 0.9,
                "entropy_last": entropies[name],
                "state": state,
                "action": action,
            }
            for name, state, action in zip(
                names,
                ("mixed", "one-sided", "unmeasured"),
                ("kept", "merged", "kept"),
                strict=True,
            )
        ],
        "rectifiers": {"before": 3, "after": 2},
        "depth": {"before": 8, "after": 6},
        "parameters": {"before": 1781002, "after": 1322222},
        "macs": {"before": 1779712, "after": 1320960},
        "agreement_with_original": 0.999996,
        "accuracy": {
            "start": 95.123456,
            "final": 95.6,
            "dense_control": 96.2,
            "shallow_control": None,
        },
        "latency_ms": {"before": 0.41234, "after": 0.3, "batch": 256, "threads": 2},
        "proof": {"max_abs": 1.1920928955078125e-07, "max_rel": 0.0},
        "epochs": {"collapse": 9, "dense_control": 9},
        "seconds": 12.3456,
        "versions": {"python": "3.12.3", "torch": "2.13.0+cpu", "layer_collapse": "0.1.0"},
        "cut": False,
        "history": [
            {
                "round": number,
                "phase": phase,
                "sparsity": sparsity,
                "validation_accuracy": 95.0 - number,
                "entropy": {**entropies, names[1]: 0.2 / (number + 1)},
                "alive": dict.fromkeys(names, 1000 - 400 * number),
            }
            for number, phase, sparsity in ROUNDS
        ],
        "settings": {"zeta": 0.75, "a.b": {"c": [1, 2.5]}, "none": None, "on": True, "e": []},
    }
    return made | copy.deepcopy(changes)


class Page(HTMLParser):
    """Collects (attributes, text) of every element that carries data-value, and all tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._open = "data-value" in attributes
        if self._open:
            self.values.append((attributes, ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open:
            attributes, text = self.values[-1]
            self.values[-1] = (attributes, text + data)


def lookup(node: Any, key: str) -> Any:
    for part in re.findall(r"(?:\\.|[^.\\])+", key):
        name = re.sub(r"\\(.)", r"\1", part)
        node = node[int(name)] if isinstance(node, list) else node[name]
    return node


def leaves(node: Any) -> int:
    if isinstance(node, (dict, list)) and node:
        return sum(leaves(v) for v in (node.values() if isinstance(node, dict) else node))
    return 0 if isinstance(node, str) else 1


def check_page(text: str, truth: dict[str, Any]) -> set[str]:
    """Compare every marked value with report.json; return the keys shown."""
    keys = set()
    for attributes, shown in Page(text).values:
        value = json.loads(attributes["data-value"] or "")
        if "data-key" in attributes:
            key = attributes["data-key"] or ""
            assert lookup(truth, key) == value, key
            keys.add(key)
        else:
            a, operator, b = (attributes["data-derived"] or "").split(" ")
            x, y = lookup(truth, a), lookup(truth, b)
            known = None not in (x, y) and (operator == "-" or y)
            assert value == ((x - y if operator == "-" else x / y) if known else None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            number = float(re.sub(r"[^0-9.e+-]", "", shown.replace("ms", "").replace("s", "")))
            exact = 100 * value if key_is_fraction(attributes) else value
            assert number == pytest.approx(exact, rel=0.05, abs=0.051), attributes
            assert (number == 0) == (exact == 0) or abs(exact) < 0.05 <= 1, attributes
    return keys


def key_is_fraction(attributes: dict[str, str | None]) -> bool:
    key = attributes.get("data-key") or ""
    return key == "agreement_with_original" or key.endswith(".sparsity")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    report.write(tmp_path / "new" / "run", example())
    return tmp_path / "new" / "run"


def test_writes_all_files(written: Path) -> None:
    expected = ["accuracy.png", "before_after.png", "entropy.png", "report.html", "report.json"]
    assert sorted(p.name for p in written.iterdir()) == expected
    assert files.read_json(written / "report.json") == example()
    for path in written.glob("*.png"):
        with Image.open(path) as picture:
            assert (picture.format, picture.mode) == ("PNG", "P")  # few bytes
            assert picture.info["dpi"] == pytest.approx((200, 200), abs=0.1)
            width, height = picture.size
        assert width >= 1000
        assert height >= 600


def test_the_palette_loses_nothing_of_few_colours() -> None:
    colours = np.stack(np.unravel_index(np.arange(256), (8, 8, 4)), axis=-1) * (36, 36, 85)
    drawn = np.tile(colours.astype(np.uint8), (8, 4, 1))
    png = io.BytesIO()
    Image.fromarray(drawn).save(png, "PNG")
    small = canvas._smaller(png)
    with Image.open(io.BytesIO(small)) as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), drawn)


def test_every_number_of_the_file_is_on_the_page_and_agrees(written: Path) -> None:
    truth = json.loads((written / "report.json").read_text("utf-8"))
    keys = check_page((written / "report.html").read_text("utf-8"), truth)
    shown = [lookup(truth, key) for key in keys]
    numbers = [value for value in shown if not isinstance(value, str)]
    # Every scalar of the file that is no string is shown, and so are all versions.
    assert len(numbers) == leaves(truth)
    assert {f"versions.{name}" for name in truth["versions"]} <= keys


def test_the_page_needs_no_network_and_no_script(written: Path) -> None:
    text = (written / "report.html").read_text("utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "link" not in {tag for tag, _ in page.tags}
    images = [a["src"] or "" for tag, a in page.tags if tag == "img"]
    assert len(images) == 3
    assert all(src.startswith("data:image/svg+xml;base64,") for src in images)
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_headline_and_missing_control(written: Path) -> None:
    page = Page((written / "report.html").read_text("utf-8"))
    text = " ".join(page.text.split())
    sentence = (
        "1 of 3 rectifiers left the network; accuracy 95.6 % (dense control 96.2 %); latency 0.73 x"
    )
    assert report.headline(example()) == sentence
    assert text.count(sentence) == 2  # title and h1
    shown = {a.get("data-key"): shown for a, shown in page.values}
    assert shown["accuracy.shallow_control"] == "not run"
    assert shown["agreement_with_original"] == "99.999 %"  # never rounded up to 100
    assert shown["proof.max_rel"] == "0"
    assert shown["layers.1.entropy_last"] == "1.5e-07"  # close to zero is not zero


def test_says_when_the_shallow_control_wins(tmp_path: Path) -> None:
    for control, wins in ((97.0, True), (95.0, False)):
        accuracy = example()["accuracy"] | {"shallow_control": control}
        report.write(tmp_path, example(accuracy=accuracy))
        text = (tmp_path / "report.html").read_text("utf-8")
        assert ("trained from scratch did better" in text) == wins


def test_a_cut_network_is_never_shown_as_success(tmp_path: Path) -> None:
    report.write(tmp_path, example(cut=True))
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "the layers it lost mean nothing" in page.text
    assert "rectifiers left the network" not in " ".join(page.text.split())
    assert ("p", {"class": "cut", "role": "alert"}) in page.tags
    assert not any(a.get("class") == "gone" for _, a in page.tags)
    assert "its output is the same for every input" in terminal(example(cut=True))


def terminal(made: dict[str, Any]) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(report.summary(made))
    return console.export_text()


def test_terminal_table() -> None:
    text = terminal(example())
    for part in ("1 of 3 rectifiers", "blocks.1.act", "one-sided", "merged", "8 → 6", "not run"):
        assert part in text
    assert HOSTILE[:20] in terminal(example(layers=hostile_layers()))
    assert "[red]" in terminal(example(layers=hostile_layers()))


def hostile_layers() -> list[dict[str, Any]]:
    return [{**layer, "name": HOSTILE + str(i)} for i, layer in enumerate(example()["layers"])]


def hostile() -> dict[str, Any]:
    made = example(layers=hostile_layers(), data=HOSTILE, settings={HOSTILE: HOSTILE})
    for row in made["history"]:
        row["entropy"] = {layer["name"]: 0.5 for layer in made["layers"]}
        row["alive"] = {layer["name"]: 5 for layer in made["layers"]}
        row["phase"] = HOSTILE
    return made


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    report.write(tmp_path, hostile())
    text = (tmp_path / "report.html").read_text("utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert '<script>alert("x")</script>' in page.text
    check_page(text, json.loads((tmp_path / "report.json").read_text("utf-8")))


def test_charts_stand_alone_and_follow_the_page(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    from layer_collapse.report import plots

    for made in (example(), hostile()):
        for name, draw in plots.CHARTS.items():
            png, svg = canvas.render(draw, json.loads(files.to_json(made)))
            root = ElementTree.fromstring(svg)  # well formed whatever the names
            assert root.tag.endswith("svg")
            assert not [e for e in root.iter() if e.tag.endswith("script")]
            assert b"prefers-color-scheme:dark" in svg, name
            assert svg.count(canvas.INK.encode()) == 1  # only where it is defined
            assert (png, svg) == canvas.render(draw, json.loads(files.to_json(made)))
    labels = canvas.render(plots.entropy, example())[1].decode()
    assert "blocks.0.act" in labels
    assert "_blocks\\2.act" not in labels  # never measured, so it has no line
    bars = canvas.render(plots.before_after, example())[1].decode()
    assert "1,322,222 (74 %)" in bars


def test_drawing_leaves_no_global_state(written: Path) -> None:
    # Reading rcParams["backend"] would itself import pyplot, which must not be needed.
    code = (
        "import sys, json, matplotlib as m; from pathlib import Path;"
        "sys.modules['matplotlib.pyplot'] = None;"
        "state = lambda: {k: m.rcParams[k] for k in m.rcParams if k != 'backend'}; a = state();"
        "from layer_collapse import report;"
        "report.write(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text('utf-8')));"
        "assert state() == a"
    )
    target, source = str(written / "again"), str(written / "report.json")
    subprocess.run([sys.executable, "-c", code, target, source], check=True, timeout=120)


def nothing_run() -> dict[str, Any]:
    """Everything null or empty that may be."""
    made = example(layers=[], history=[], settings={}, versions={}, agreement_with_original=None)
    for key in ("accuracy", "latency_ms", "proof", "epochs", "depth", "parameters", "macs"):
        made[key] = dict.fromkeys(made[key])
    made["rectifiers"] = {"before": 0, "after": 0}
    return made


def odd_history() -> dict[str, Any]:
    """Gaps, layers that disappear, values that are not finite, one row, no accuracy."""
    made = example()
    made["history"][1]["entropy"] = {}
    made["history"][2]["validation_accuracy"] = float("nan")
    made["history"][3]["sparsity"] = None
    made["latency_ms"]["after"] = 3 * made["latency_ms"]["before"]
    return made


def many() -> dict[str, Any]:
    names = [f"stage.{i}.a_rather_long_module_name.act" for i in range(60)]
    made = example(layers=[{**example()["layers"][0], "name": name} for name in names])
    row = {**example()["history"][0], "entropy": dict.fromkeys(names, 0.0), "alive": {}}
    made["history"] = [{**row, "round": i} for i in range(40)]
    return made


@pytest.mark.parametrize("make", [nothing_run, odd_history, many])
def test_unusual_runs_still_give_a_page(tmp_path: Path, make: Any) -> None:
    report.write(tmp_path, make())
    truth = json.loads((tmp_path / "report.json").read_text("utf-8"))
    check_page((tmp_path / "report.html").read_text("utf-8"), truth)
    assert terminal(truth)


@pytest.mark.parametrize("key", ["cut", "accuracy.shallow_control", "layers.1.state"])
def test_a_missing_key_is_named_before_anything_is_written(tmp_path: Path, key: str) -> None:
    made = example()
    parent, _, last = key.rpartition(".")
    del (lookup(made, parent) if parent else made)[last]
    with pytest.raises(ValueError, match=f"expected the key '{re.escape(key)}'"):
        report.write(tmp_path / "out", made)
    assert not (tmp_path / "out").exists()


def test_full_disk_keeps_the_old_report(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in written.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*report\.json: No space left"):
        report.write(written, example(seed=4))
    assert {p.name: p.read_bytes() for p in written.iterdir()} == before


def test_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match=r"cannot create the folder .*out"):
        report.write(tmp_path / "out", example())


def test_numbers_survive_a_real_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("chromium is not installed")
    for made in (example(), hostile()):
        report.write(tmp_path, made)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
        url = (tmp_path / "report.html").as_uri()
        dom = subprocess.run(
            [browser, *options, "--dump-dom", url],
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout.decode("utf-8")
        truth = json.loads((tmp_path / "report.json").read_text("utf-8"))
        keys = check_page(dom, truth)
        assert len(keys) > 40
        assert "script" not in {tag for tag, _ in Page(dom).tags}
