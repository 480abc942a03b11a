"""What masks and counts add to a process, as the operating system sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import os, sys
from pathlib import Path
import torch
from torch import nn
import layer_collapse as lc

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def masks(width):
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4))).bfloat16()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = resident()
    kept = lc.Masks(dict(model.named_parameters()))
    kept.prune_({"0.weight": width * width // 2})
    optimizer = lc.MaskedSGD(model.parameters(), 0.1, masks=kept)
    for _ in range(2):
        optimizer.step()
    return (resident() - before) / (4 * width * width)

def counts(neurons, kind):
    model = nn.Sequential(nn.Linear(1, neurons), kind(), nn.Linear(neurons, 1))
    with torch.no_grad():
        model(torch.randn(1, 1))
    before = resident()
    tracker = lc.track(model)
    with torch.no_grad():
        model(torch.randn(1, 1))
    return (resident() - before) / neurons

measure = {
    "masks": masks,
    "relu": lambda size: counts(size, nn.ReLU),
    "relu6": lambda size: counts(size, nn.ReLU6),
}[sys.argv[1]]
measure(64)  # what is loaded once
print(measure(int(sys.argv[2])))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.parametrize(
    ("what", "size", "least", "most"),
    [
        ("masks", 4096, 0.12, 0.13),  # bytes per parameter: a bit, and what alignment adds
        # bytes per neuron, and up to 400 KB of everything else that a process does
        ("relu", 1 << 22, 23.9, 24.1),
        ("relu6", 1 << 22, 31.9, 32.1),  # counts most
    ],
)
def test_bytes_of_a_process(what: str, size: int, least: float, most: float) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back at once
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-c", _SCRIPT, what, str(size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    print(what, done.stdout)
    assert least < float(done.stdout) <= most
