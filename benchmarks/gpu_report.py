"""Measures the CUDA kernels against torch on this machine's GPU; see benchmarks/gpu.md."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from layer_collapse.measure.rectifiers import KINDS, Call
from layer_collapse.ops import cuda
from layer_collapse.ops.magnitude import magnitude_shares
from layer_collapse.ops.masked_step import apply_masks_, masked_adamw_, masked_sgd_
from layer_collapse.ops.rectify import counts_of, new_ledger, rectify

ROOT = Path(__file__).parents[1]
RELU = KINDS["relu"]
WARM_UP, ROUNDS = 10, 50


@dataclass
class Row:
    """bytes: what must move in one call; copy_share: GB/s over those of a copy as large."""

    case: str
    contender: str
    microseconds: float
    gigabytes_per_second: float
    copy_share: float


def measure(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median microseconds of each call, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(WARM_UP + ROUNDS):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            if round_number >= WARM_UP:
                times[name].append(start.elapsed_time(stop) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def rows_of(case: str, moved: int, calls: dict[str, Callable[[], object]]) -> list[Row]:
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = measure({"copy": lambda: target.copy_(source), **calls})
    return [
        Row(case, name, time, moved / time / 1e3, found["copy"] / time)
        for name, time in found.items()
    ]


def _counted_relu(x: Tensor, counts: Tensor, dims: list[int]) -> Tensor:
    counts += torch.stack([(x > 0).sum(dims), (x < 0).sum(dims), x.isnan().sum(dims)])
    return torch.relu(x)


def _counting_hook(counts: Tensor, dims: list[int]) -> Callable[..., None]:
    def count(module: torch.nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
        (x,) = given
        counts.add_(torch.stack([(x > 0).sum(dims), (x < 0).sum(dims), x.isnan().sum(dims)]))

    return count


def rectifiers() -> list[Row]:
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape, channel_dim in (((128, 256, 28, 28), 1), ((128, 197, 3072), 2)):
            x = torch.randn(shape, device="cuda").to(dtype)
            dims = [d for d in range(x.dim()) if d != channel_dim]
            channels = shape[channel_dim]
            ledger = new_ledger(RELU, channels, "cuda")
            counts = torch.zeros(3, channels, dtype=torch.int64, device="cuda")
            y = rectify(Call(RELU, x), ledger, channel_dim)
            assert torch.equal(y, _counted_relu(x, counts, dims))
            assert torch.equal(counts_of(ledger, RELU), counts)
            hooked = torch.nn.ReLU()
            hooked.register_forward_hook(_counting_hook(counts, dims))
            compiled = torch.compile(_counted_relu)
            name = f"relu + counts, {list(shape)}, {str(dtype)[6:]}"
            calls: dict[str, Callable[[], object]] = {
                "layer_collapse": lambda x=x, to=ledger, d=channel_dim: rectify(
                    Call(RELU, x), to, d
                ),
                "torch.relu (no counts)": lambda x=x: torch.relu(x),
                "torch.compile": lambda f=compiled, x=x, c=counts, d=dims: f(x, c, d),
                "forward hook": lambda h=hooked, x=x: h(x),
            }
            rows += rows_of(name, 2 * x.numel() * x.itemsize, calls)
    return rows


def _mask(count: int, pruned: float) -> Tensor:
    """Whole words are dead, as after structured sparsity has set in, or none."""
    alive = torch.rand((count + 31) // 32) >= pruned
    return torch.where(alive, -1, 0).to(torch.int32).cuda()


def steps() -> list[Row]:
    rows: list[Row] = []
    count, size = 1 << 25, 4
    for pruned in (0.0, 0.9, 0.99):
        weight = torch.randn(count, device="cuda", requires_grad=True)
        weight.grad = torch.randn_like(weight)
        mask, state = _mask(count, pruned), [torch.zeros_like(weight) for _ in range(2)]
        step = torch.ones((), device="cuda")
        with torch.no_grad():
            apply_masks_([weight], [mask])
        sgd = torch.optim.SGD([weight], lr=1e-3, momentum=0.9, fused=True)
        adamw = torch.optim.AdamW([weight], lr=1e-3, fused=True)
        own, grad = weight.detach().clone(), weight.grad
        rows += rows_of(
            f"SGD with momentum, {count} weights, {pruned:.0%} pruned",
            count * size * 5,
            {
                "layer_collapse": partial(
                    masked_sgd_, [own], [grad], state[:1], [mask], lr=1e-3, momentum=0.9
                ),
                "torch fused": sgd.step,
            },
        )
        rows += rows_of(
            f"AdamW, {count} weights, {pruned:.0%} pruned",
            count * size * 7,
            {
                "layer_collapse": partial(
                    masked_adamw_, [own], [grad], state[:1], state[1:], [], [mask], [step], lr=1e-3
                ),
                "torch fused": adamw.step,
            },
        )
    return rows


def selection() -> list[Row]:
    weights = [torch.randn(1 << 22, device="cuda") for _ in range(8)]
    none = [torch.empty(0, dtype=torch.int32, device="cuda") for _ in weights]
    k = sum(w.numel() for w in weights) // 10
    owners = torch.arange(8, device="cuda").repeat_interleave(1 << 22)

    def topk() -> Tensor:
        magnitudes = torch.cat([w.abs() for w in weights])
        return torch.bincount(owners[torch.topk(magnitudes, k, largest=False).indices], minlength=8)

    assert torch.equal(magnitude_shares(weights, none, k), topk())
    moved = 4 * sum(w.numel() * 4 for w in weights)
    calls = {"layer_collapse": lambda: magnitude_shares(weights, none, k), "torch.topk": topk}
    return rows_of(f"the {k} smallest of 8 x {1 << 22} weights", moved, calls)


def table(rows: list[Row], about: dict[str, str]) -> str:
    lines = [
        f"Measured {about['date']} on {about['card']}, torch {about['torch']}, "
        f"CUDA {about['cuda']}.",
        "",
        "| case | | us | GB/s | of a copy |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.case} | {r.contender} | {r.microseconds:.0f} | {r.gigabytes_per_second:.0f} "
        f"| {r.copy_share:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    out: Path = parser.parse_args().out
    if not torch.cuda.is_available() or not cuda.BUILT:
        print("gpu-report: needs a CUDA device and the CUDA kernels; see benchmarks/gpu.md")
        return 1
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/ops"], cwd=ROOT)
    about = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "tests": "passed" if tests.returncode == 0 else "failed",
    }
    with torch.no_grad():
        rows = rectifiers() + steps() + selection()
    out.mkdir(parents=True, exist_ok=True)
    result = {"about": about, "rows": [asdict(row) for row in rows]}
    (out / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "report.md").write_text(table(rows, about))
    print(table(rows, about))
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main())
