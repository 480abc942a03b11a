"""``python -m tests.structure.table``: writes docs/architectures.md, every number measured now."""

from __future__ import annotations

import argparse
import copy
import os
import platform
import time
from collections import Counter
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from layer_collapse import fold
from layer_collapse.graph import ordered_inputs
from layer_collapse.reduce.latency import compare
from layer_collapse.reduce.proof import difference, doubled

from .architectures import ARCHITECTURES, build, call, inputs
from .gating import force_gates
from .parity import onnx_error

_HEAD = """# Public architectures, folded

Written by `{command}` ({versions}; {machine}, one thread, {day}). Unmodified
torchvision, timm and transformers code with random weights at {size}; every third rectifier is
forced to be linear, in turns all ON, mixed, and all OFF (mixed where nothing leads around the
layer). Before: that gated model. After: the same, folded. Which rectifiers are linear is arbitrary
here, so the table says what folding does to a graph, not what a trained network would gain.

- rectifiers: of the model, then gates forced, then left after folding
- depth: longest path of weighted layers; MACs of one sample; latency: median ms of a batch of
  {batch}, both forms timed in turns. Load: processes that ran or waited (1-minute average);
  above 1 the machine was shared, so compare the two times of a row and nothing else
- proof: largest relative error in float64, weights as stored in float32 (limit 1e-5); exact: the
  same with weights stored in float64 (limit 1e-10); ONNX: folded model in onnxruntime against
  itself in torch, float32

"""
_COLUMNS = (
    "model",
    "traced by",
    "rectifiers",
    "depth",
    "parameters (M)",
    "MACs (G)",
    "latency (ms)",
    "load",
    "proof",
    "exact",
    "ONNX",
    "fold (s)",
    "folds by rule",
)


class _Call(nn.Module):
    """A graph on fixed inputs, for timing: the first input is the one that is given."""

    def __init__(self, model: fx.GraphModule, example: Tensor | dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.rest = model, ordered_inputs(model, example)[1:]

    def forward(self, x: Tensor) -> object:
        return self.model(x, *self.rest)


def row(name: str, full: bool, batch: int) -> list[str]:
    """All columns for one architecture."""
    example = inputs(name, full, batch)
    gated, modes = force_gates(build(name, full), example)
    start = time.perf_counter()
    result = fold(gated, example)
    seconds = time.perf_counter() - start
    before, after = result.report.before, result.report.after
    exact = fold(copy.deepcopy(gated).double(), doubled(example)).report.max_rel
    unfolded = call(copy.deepcopy(gated).double(), doubled(example))
    folded = call(copy.deepcopy(result.model).double(), doubled(example))
    error = difference(folded, unfolded)[1]
    first = ordered_inputs(gated, example)[0]
    latency = compare(_Call(gated, example), _Call(result.model, example), first, rounds=7)
    rules = Counter(f.rule for f in result.report.folds)
    return [
        name,
        result.report.traced_by,
        f"{before.rectifiers + len(modes)}, {len(modes)}, {after.rectifiers}",
        f"{before.depth} -> {after.depth}",
        f"{before.parameters / 1e6:.2f} -> {after.parameters / 1e6:.2f}",
        f"{before.macs / batch / 1e9:.3f} -> {after.macs / batch / 1e9:.3f}",
        f"{latency.before:.1f} -> {latency.after:.1f}",
        f"{os.getloadavg()[0]:.0f}",
        f"{max(error, result.report.max_rel):.1e}",
        f"{exact:.1e}",
        f"{onnx_error(result.model, example):.1e}",
        f"{seconds:.1f}",
        ", ".join(f"{rule} {count}" for rule, count in rules.most_common()),
    ]


def _rows(head: str, file: Path) -> dict[str, str]:
    """Rows by architecture that ``file`` holds under the same head; none under another."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if not text.startswith(head + "\n"):
        return {}
    rows = text[len(head) :].strip().splitlines()
    return {line.split(" | ")[0].removeprefix("| "): line for line in rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.structure.table")
    parser.add_argument("names", nargs="*", default=list(ARCHITECTURES), help="architectures")
    parser.add_argument("--small", action="store_true", help="reduced sizes of the same classes")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/architectures.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = "reduced size (64 px, 12 tokens)" if options.small else "full size (224 px, 64 tokens)"
    lines = [
        _HEAD.format(
            command=f"python -m tests.structure.table{' --small' if options.small else ''}",
            versions=f"torch {torch.__version__}",
            machine=platform.processor() or platform.machine(),
            day=date.today().isoformat(),
            size=size,
            batch=options.batch,
        ),
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * len(_COLUMNS),
    ]
    options.out.parent.mkdir(exist_ok=True)
    made = _rows("\n".join(lines), options.out)
    for name in options.names:  # written row by row: at full size this takes long
        if name in made:  # by an earlier run of the same day and command
            lines.append(made[name])
            continue
        lines.append("| " + " | ".join(row(name, not options.small, options.batch)) + " |")
        print(lines[-1], flush=True)
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
