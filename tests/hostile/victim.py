"""Loads mutated files in a process of its own, and watches what that does to the process.

python -m tests.hostile.victim FOLDER FIRST COUNT prints one line of JSON. Each file must load to a
valid model or end in one sentence (ValueError, OSError), within a time and with bounded memory, and
import, run or unpickle nothing.
"""

from __future__ import annotations

import faulthandler
import json
import random
import shutil
import sys
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import layer_collapse as lc
from layer_collapse import checkpoint
from layer_collapse.reduce import registry
from tests.hostile.mutations import change_json, mutated
from tests.reduce import models

SECONDS = 60  # for one file, on a busy machine
ALLOWANCE = 32 << 20  # bytes beside twice the file's
_FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork")
_FORBIDDEN += ("subprocess.Popen", "socket.connect", "ctypes.dlopen")

watching = False
events: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching:
        return
    if event in _FORBIDDEN:
        events.append(f"{event} {arguments!r:.80}")
    if event == "import":
        name = str(arguments[0])
        if name not in sys.modules and name.split(".")[0] not in ("torch", "layer_collapse"):
            events.append(f"import of {name}")


class Target:
    """A seed and how it is loaded."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    def mutate(self, draw: random.Random) -> None:
        raise NotImplementedError

    def load(self) -> None:
        raise NotImplementedError

    def size(self) -> int:
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())


class Folded(Target):
    def __init__(self, name: str, folder: Path, model: fx.GraphModule) -> None:
        super().__init__(name, folder)
        folder.mkdir()
        self.file = folder / "m.safetensors"
        lc.save_folded(model, self.file, {"accuracy": 0.5, "notes": ["a", {"b": None}]})
        self.seed = self.file.read_bytes()

    def mutate(self, draw: random.Random) -> None:
        self.file.write_bytes(mutated(draw, self.seed))

    def load(self) -> None:
        model = lc.load_folded(self.file)
        model.graph.lint()
        for module in model.modules():
            known = type(module) is nn.Module or type(module).__name__ in registry.MODULES
            inside = type(module).__module__.startswith(("torch.nn.modules.", "torch.fx."))
            assert known or inside, type(module)
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _all(model)}
        assert sum(held.values()) <= self.file.stat().st_size
        lc.save_folded(model, self.file)  # it is one that can be saved
        lc.load_folded(self.file)


def _all(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


class Meta(Target):
    """Of collapse(): tensors and JSON."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, folder)
        folder.mkdir()
        self.file = folder / "c.safetensors"
        tensors = {"model.a": torch.randn(5, 3), "mask.b": torch.ones(2, dtype=torch.int32)}
        checkpoint.save(self.file, tensors, {"round": 1, "history": [{"a": 0.5}]})
        self.seed = self.file.read_bytes()

    def mutate(self, draw: random.Random) -> None:
        self.file.write_bytes(mutated(draw, self.seed))

    def load(self) -> None:
        tensors, meta = checkpoint.load(self.file)
        assert isinstance(meta, dict)
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= self.size()


class Resumed(Target):
    """Of Checkpoints: a manifest, tensors, the process's own state."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, folder)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
        self.model, self.tracker = model, lc.track(model)
        self.masks = lc.Masks({"0.weight": model[0].weight})
        self.optimizer = lc.MaskedAdamW(model.parameters(), 0.01, masks=self.masks)
        model(torch.randn(8, 4)).square().sum().backward()
        self.optimizer.step()
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        others = {"schedule": self.schedule}
        self.checkpoints = lc.Checkpoints(
            folder, model, self.optimizer, self.masks, self.tracker, others=others
        )
        self.seed = folder.with_name(name + "-seed")
        shutil.copytree(self.checkpoints.save(1), self.seed)

    def mutate(self, draw: random.Random) -> None:
        step = self.folder / "step-000000001"
        shutil.rmtree(step)
        shutil.copytree(self.seed, step)
        manifest = json.loads((step / "manifest.json").read_text())
        name = draw.choice([None, None, *manifest["files"]])
        if name is None:
            manifest = change_json(draw, manifest)
        else:
            data = mutated(draw, (step / name).read_bytes())
            (step / name).write_bytes(data)
            if draw.random() < 0.8:  # a forger's
                manifest["files"][name] = [len(data), zlib.crc32(data)]
        (step / "manifest.json").write_text(json.dumps(manifest))

    def load(self) -> None:
        before = self._state()
        try:
            assert self.checkpoints.load() == 1
        except (ValueError, OSError):
            assert repr(self._state()) == repr(before)
            raise

    def _state(self) -> Any:
        torch.set_printoptions(profile="full")
        return [
            self.model.state_dict(),
            self.optimizer.state_dict(),
            self.masks.state_dict(),
            self.tracker.state_dict(),
            self.schedule.state_dict(),
            torch.get_rng_state(),
            random.getstate(),
        ]


def targets(folder: Path) -> list[Target]:
    torch.manual_seed(0)
    made: list[Target] = []
    for name in ("residual", "resnet", "vit"):
        model = models.make(name, ("off", "six", "gelu"), 15)
        made.append(Folded(name, folder / name, lc.fold(model, models.inputs(model)).model))
    return [*made, Meta("meta", folder / "meta"), Resumed("resumed", folder / "resumed")]


def kilobytes(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0])


def start_peak() -> int:
    """The memory of this process in KiB; VmHWM begins anew from there."""
    Path("/proc/self/clear_refs").write_text("5")
    return kilobytes("VmRSS")


def _watched(load: Callable[[], None]) -> tuple[str, int]:
    """What became of it, and by how many bytes the process grew meanwhile at most."""
    global watching
    before = start_peak()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    watching = True
    try:
        load()
        result = "loaded"
    except (ValueError, OSError) as error:
        result = "refused"
        text = str(error)
        assert "\n" not in text, text
        assert 10 < len(text) < 1000, text
    finally:
        watching = False
        faulthandler.cancel_dump_traceback_later()
    return result, 1024 * (kilobytes("VmHWM") - before)


def main(folder: Path, first: int, count: int) -> None:
    made = targets(folder)
    for target in made:
        target.load()  # what is imported late is imported now
    sys.addaudithook(_watch)
    results: Counter[str] = Counter()
    failures: list[str] = []
    most = 0.0
    for number in range(first, first + count):
        draw = random.Random(number)
        target = made[draw.choice([0, 0, 1, 2, 2, 3, 4])]
        sys.setrecursionlimit(50_000)  # to write what is nested deeply; not to read it
        target.mutate(draw)
        sys.setrecursionlimit(1_000)
        (folder / "current").write_text(f"{number} of {target.name}")
        size = target.size()
        try:
            result, grown = _watched(target.load)
            assert not events, events
            assert grown <= 2 * size + ALLOWANCE, f"{grown} bytes for a file of {size}"
        except Exception as error:
            result, grown = "failed", 0
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = f"{type(error).__name__}: {error!s:.200} ({where.name}, line {where.lineno})"
            failures.append(f"{number} of {target.name}: {found}")
            events.clear()
        results[result] += 1
        most = max(most, (grown - 2 * size) / 2**20)
    summary = {"files": count, **results, "MiB beyond twice the file": round(most, 1)}
    print(json.dumps({**summary, "failures": failures[:20]}, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
