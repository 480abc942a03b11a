"""What nvdisasm shows of a kernel: its innermost loops and their memory accesses."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FUNCTION = re.compile(r"^\.text\.(\S+):")
_LABEL = re.compile(r"^(\.L_\S+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Loop:
    """Instructions from a label to the last branch back to it."""

    opcodes: tuple[str, ...]

    def count(self, name: str, *parts: str) -> int:
        return sum(op.split(".")[0] == name and all(p in op for p in parts) for op in self.opcodes)


@dataclass(frozen=True)
class Kernel:
    name: str  # mangled
    opcodes: tuple[str, ...]
    loops: tuple[Loop, ...]  # those that contain no other

    def count(self, name: str, *parts: str) -> int:
        return Loop(self.opcodes).count(name, *parts)


def kernels(cubin: Path, nvdisasm: Path) -> Iterator[Kernel]:
    """Every kernel of a cubin."""
    listing = subprocess.run(
        [nvdisasm, "-c", cubin], check=True, capture_output=True, text=True
    ).stdout
    name = ""
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in listing.splitlines():
        if found := _FUNCTION.match(line):
            if code:
                yield _kernel(name, labels, code)
            name, labels, code = found[1], {}, []
        elif found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif name and (found := _INSTRUCTION.match(line)):
            code.append((found[1], found[2]))
    if code:
        yield _kernel(name, labels, code)


def _kernel(name: str, labels: dict[str, int], code: list[tuple[str, str]]) -> Kernel:
    back = set()
    for place, (opcode, operands) in enumerate(code):
        target = _TARGET.search(operands) if opcode.startswith("BRA") else None
        # a branch to itself pads the end of every kernel
        if target and labels[target[1]] < place:
            back.add((labels[target[1]], place))
    inner = [
        (first, last)
        for first, last in sorted(back)
        if not any((f, e) != (first, last) and first <= f and e <= last for f, e in back)
    ]
    opcodes = tuple(opcode for opcode, _ in code)
    return Kernel(name, opcodes, tuple(Loop(opcodes[f : e + 1]) for f, e in inner))
