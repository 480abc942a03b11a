"""Compiles csrc/cuda for every architecture and reads off what the kernels will need of a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cards import CARDS
from sass import Loop, kernels
from tools import nvcc, nvdisasm
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

ROOT = Path(__file__).parents[2]
SOURCES = tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
JSON = ROOT / "build" / "cuda_static.json"

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
#: Atomics on global and shared memory, with or without a result.
ATOMIC = re.compile(r"ATOM|RED(?!UX)")
#: What ptxas -v says of every kernel; any other line is a warning or worse.
_EXPECTED = re.compile(r"ptxas info|bytes stack frame|^\s*$")


@dataclass
class Figures:
    """One kernel on one architecture."""

    kernel: str  # readable: name<template arguments>
    arch: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    loads_128: int = 0
    stores_128: int = 0
    instructions: int = 0
    #: opcodes of atomics, each once
    atomics: list[str] = field(default_factory=list)
    #: of the innermost loop with the most 16-byte loads (then the shortest): None without one
    loop_instructions: int | None = None
    loop_loads_128: int = 0
    loop_stores_128: int = 0

    @property
    def per_16_bytes(self) -> float | None:
        if self.loop_instructions is None:
            return None
        return self.loop_instructions / self.loop_loads_128

    @property
    def headroom(self) -> float | None:
        """Times its card's bandwidth that the kernel would reach if only issuing mattered.

        As if every instruction of the inner loop were issued, those of branches that are not taken
        too. A shared-memory atomic counts as one instruction, however long it takes.
        """
        if self.loop_instructions is None:
            return None
        (card,) = (card for card in CARDS if card.arch == self.arch)
        moved = 16 * (self.loop_loads_128 + self.loop_stores_128)
        return card.issue_limited(self.loop_instructions, moved) / card.bandwidth


@dataclass
class Report:
    figures: list[Figures] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def readable(names: list[str]) -> list[str]:
    """Demangled, without namespace, return type and parameters."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout
    return [
        re.sub(r"\(anonymous namespace\)::|layer_collapse::|^void ", "", line).split("(")[0]
        for line in text.splitlines()
    ]


def _vectors(loop: Loop) -> tuple[int, int]:
    return loop.count("LDG", "128") + loop.count("LD", "128"), loop.count("STG", "128")


def _compile(source: Path, arch: str, folder: Path) -> tuple[Path, str]:
    """The cubin and what nvcc said."""
    target = folder / f"{source.stem}.{arch}.cubin"
    command = [
        nvcc(),
        "-std=c++20",
        "-O3",
        *COMMON_NVCC_FLAGS,  # what torch adds to a build
        f"-I{ROOT / 'csrc'}",
        f"-arch={arch}",
        "-Xptxas",
        "-v",
        "-cubin",
        source,
        "-o",
        target,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"nvcc failed on {source.name} for {arch}:\n{result.stderr[:2000]}")
    return target, result.stdout + result.stderr


def collect(folder: Path) -> Report:
    """Figures of every kernel of every source on every architecture."""
    report = Report()
    disassembler = nvdisasm()
    assert disassembler is not None
    for source in SOURCES:
        for arch in ARCHITECTURES:
            cubin, said = _compile(source, arch, folder)
            found: dict[str, Figures] = {}
            name = ""
            for line in said.splitlines():
                if entry := _ENTRY.search(line):
                    name = entry[1]
                    found[name] = Figures("", arch)
                elif name and (stack := _STACK.search(line)):
                    found[name].stack = int(stack[1])
                    found[name].spills = int(stack[2]) + int(stack[3])
                elif name and (used := _USED.search(line)):
                    found[name].registers = int(used[1])
                    shared = _SHARED.search(line)
                    found[name].shared = int(shared[1]) if shared else 0
                if not _EXPECTED.search(line):
                    report.warnings.append(f"{source.name} {arch}: {line}")
            for kernel in kernels(cubin, disassembler):
                figures = found[kernel.name]
                figures.instructions = len(kernel.opcodes)
                figures.loads_128, figures.stores_128 = _vectors(Loop(kernel.opcodes))
                figures.atomics = sorted({op for op in kernel.opcodes if ATOMIC.match(op)})
                loops = [loop for loop in kernel.loops if _vectors(loop)[0] > 0]
                if loops:
                    best = max(loops, key=lambda loop: (_vectors(loop)[0], -len(loop.opcodes)))
                    figures.loop_instructions = len(best.opcodes)
                    figures.loop_loads_128, figures.loop_stores_128 = _vectors(best)
            for figures, kernel_name in zip(found.values(), readable(list(found)), strict=True):
                figures.kernel = kernel_name
            report.figures += found.values()
    return report


def write(report: Report, path: Path = JSON) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {**asdict(f), "per_16_bytes": f.per_16_bytes, "headroom": f.headroom}
        for f in report.figures
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def _by_kernel(rows: list[dict[str, Any]], figure: str) -> dict[str, list[float]]:
    """A figure of the kernels that have it, by name, over ARCHITECTURES, which CARDS follow."""
    of = {(row["kernel"], row["arch"]): row[figure] for row in rows}
    found = {name: [of[name, arch] for arch in ARCHITECTURES] for name, _ in sorted(of)}
    return {name: values for name, values in found.items() if None not in values}


def summary(path: Path = JSON) -> str:
    """How much was compiled, and the inner loops: their instructions, and what follows from them.

    Not of doubles: cards that have few units for them wait for those.
    """
    rows = json.loads(path.read_text())
    some = [row for row in rows if "double" not in row["kernel"]]
    rectifiers = [row for row in some if row["kernel"].startswith("rectify_")]
    lines = ["Instructions of the inner loop per 16 bytes, over " + ", ".join(ARCHITECTURES)]
    for kernel, found in _by_kernel(rectifiers, "per_16_bytes").items():
        lines.append(f"  {kernel:60}" + "".join(f"{value:8.1f}" for value in found))
    cards = ", ".join(card.name for card in CARDS)
    lines.append(f"Model, not measured: times its bandwidth that issuing allows, over {cards}")
    for kernel, found in _by_kernel(some, "headroom").items():
        lines.append(f"  {kernel:60}" + "".join(f"{value:8.2f}" for value in found))
    return "\n".join([*lines, f"{len(rows)} kernels x architectures compiled"])


def short_of(times: float, path: Path = JSON) -> str:
    """The table of benchmarks/gpu.md: which kernels stay below `times` the bandwidth of a card."""
    lines = [
        "| inner loop of | " + " | ".join(card.name for card in CARDS) + " |",
        "|---" * (1 + len(CARDS)) + "|",
    ]
    some = [row for row in json.loads(path.read_text()) if "double" not in row["kernel"]]
    for kernel, found in _by_kernel(some, "headroom").items():
        if min(found) < times:
            cells = (f" {value:.2f} |" if value < times else " |" for value in found)
            lines.append(f"| `{kernel}` |" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    folder = ROOT / "build" / "cubins"
    folder.mkdir(parents=True, exist_ok=True)
    report = collect(folder)
    write(report)
    print(short_of(3.0))
    print(f"{len(report.figures)} kernels x architectures in {JSON}", file=sys.stderr)
