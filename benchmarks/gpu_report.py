"""Measures the CUDA kernels against torch on this machine's GPU; see benchmarks/gpu.md."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

import layer_collapse
from benchmarks.gpu_cases import OURS, Case, Contender, cases
from layer_collapse.ops import cuda

ROOT = Path(__file__).parents[1]
WARM_UP, ROUNDS = 10, 50
#: Those that run on CUDA too: ops, CUDA graphs, AMP, torch.compile.
TESTS = ("tests/ops", "tests/measure", "tests/test_drop_in.py")
#: Microseconds that a call takes on the device.
Timer = Callable[[Callable[[], object]], float]


@dataclass
class Row:
    """copy_share: GB/s over those of a copy that moves as much, measured in turns with it."""

    case: str
    contender: str
    microseconds: float
    gigabytes_per_second: float
    copy_share: float


def event_timer(call: Callable[[], object]) -> float:
    """By CUDA events around one call."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3


def measure(contenders: dict[str, Contender], timer: Timer, rounds: int = ROUNDS) -> dict:
    """Median microseconds of each contender, taken in turns after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(WARM_UP + rounds):
        for name, contender in contenders.items():
            took = timer(contender.call)
            if number >= WARM_UP:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def rows_of(case: Case, device: str, timer: Timer, rounds: int = ROUNDS) -> list[Row]:
    """A row per contender and one for a copy that moves what ours moves."""
    moved = case.contenders[OURS].moves
    source = torch.empty(max(moved // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    contenders = {"copy": Contender(moved, lambda: target.copy_(source)), **case.contenders}
    times = measure(contenders, timer, rounds)
    speeds = {name: c.moves / times[name] / 1e3 for name, c in contenders.items()}
    return [
        Row(case.name, name, times[name], speed, speed / speeds["copy"])
        for name, speed in speeds.items()
    ]


def table(rows: Iterable[Row], about: dict[str, str]) -> str:
    """Markdown, ready for the README."""
    lines = [
        f"Measured {about['date']} on {about['card']}, torch {about['torch']}, "
        f"CUDA {about['cuda']}; op tests on that card: {about['tests']}.",
        "",
        "| case | | us | GB/s | of a copy |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {r.case} | {r.contender} | {r.microseconds:.1f} | {r.gigabytes_per_second:.0f} "
        f"| {r.copy_share:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def write(rows: list[Row], about: dict[str, str], out: Path) -> str:
    """report.json and report.md in `out`; the table that the second holds."""
    text = table(rows, about)
    out.mkdir(parents=True, exist_ok=True)
    result = {"about": about, "rows": [asdict(row) for row in rows]}
    (out / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "report.md").write_text(text)
    return text


def run_tests() -> tuple[int, str]:
    """The op tests with the very package that is measured: exit status, pytest's last line."""
    home = Path(layer_collapse.__file__).parents[1]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-o", f"pythonpath={home} {ROOT}"]
    done = subprocess.run([*command, *TESTS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    return done.returncode, (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-report", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    out: Path = parser.parse_args(arguments).out
    if not torch.cuda.is_available() or not cuda.BUILT:
        missing = "the CUDA kernels" if torch.cuda.is_available() else "a CUDA device"
        print(f"gpu-report: needs {missing}, found none; see benchmarks/gpu.md")
        return 1
    status, tests = run_tests()
    about = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "tests": tests,
    }
    rows: list[Row] = []
    with torch.no_grad():
        for case in cases("cuda"):
            rows += rows_of(case, "cuda", event_timer)
    print(write(rows, about, out))
    return status


if __name__ == "__main__":
    sys.exit(main())
