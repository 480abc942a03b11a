"""What nvcc makes of the kernels, on every architecture, and what follows from it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import figures
import model
from cards import CARDS
from figures import ARCHITECTURES, Figures, Report

#: Kernels, and kernels x architectures. A new kernel changes this number knowingly.
KERNELS = 108
COVERED = 648

RECTIFIERS = ("DeviceRelu", "DeviceRelu6", "DeviceLeakyRelu", "DeviceHardswish", "DeviceCountOnly")
#: ReLU with all its counters, per 16 bytes, on sm_80 and later.
LIMITS = {"float": 40, "__half": 48, "__nv_bfloat16": 48}
#: Kernels whose vectors are single values, or that read masks and counters alone.
SCALAR = [
    "begin_at_kernel",
    "begin_kernel",
    "choose_kernel",
    "clear_kernel",
    "count_kernel",
    "count_positions",
    "layer_entropies_kernel",
    "reorder_mask",
    "scan_kernel",
    "shares_kernel",
]


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    result = figures.collect(tmp_path_factory.mktemp("cubins"))
    figures.write(result)
    return result


def test_every_kernel_on_every_architecture(report: Report) -> None:
    names = {f.kernel for f in report.figures}
    assert len(names) == KERNELS
    assert len(report.figures) == COVERED == KERNELS * len(ARCHITECTURES)


def test_no_warning(report: Report) -> None:
    assert report.warnings == []


def test_registers_stack_and_spills(report: Report) -> None:
    assert [f for f in report.figures if f.spills or f.stack] == []
    assert [f for f in report.figures if f.registers > 64] == []


def test_shared_memory_allows_full_occupancy(report: Report) -> None:
    # 64 KB on sm_75, the least, for four blocks of 256 threads
    assert [f for f in report.figures if f.shared > 16 * 1024] == []


def _has_vectors(kernel: str) -> bool:
    return kernel.split("<")[0] not in SCALAR and not kernel.endswith(", 1>")


def test_aligned_paths_use_16_byte_accesses(report: Report) -> None:
    for f in report.figures:
        if not _has_vectors(f.kernel):
            continue
        if not f.kernel.startswith("apply_masks"):  # writes zeros, reads masks alone
            assert f.loads_128 > 0, f
        if not f.kernel.startswith("histogram") and "CountOnly" not in f.kernel:
            assert f.stores_128 > 0, f


def _relu(report: Report) -> list[tuple[Figures, str]]:
    """The ReLU kernels' aligned paths with their dtype, on sm_80 and later."""
    return [
        (f, dtype)
        for f in report.figures
        for dtype in LIMITS
        if "<DeviceRelu, " + dtype in f.kernel and _has_vectors(f.kernel) and f.arch != "sm_75"
    ]


def test_relu_with_its_counters_takes_few_instructions(report: Report) -> None:
    found = _relu(report)
    assert len(found) == 2 * len(LIMITS) * (len(ARCHITECTURES) - 1)
    for f, dtype in found:
        assert f.loop_loads_128 == f.loop_stores_128 > 0, f
        assert f.per_16_bytes is not None
        assert f.per_16_bytes <= LIMITS[dtype], f


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_relu_is_limited_by_memory(report: Report, card) -> None:
    """Instructions alone would allow three times the card's bandwidth."""
    for f, dtype in _relu(report):
        if f.arch == card.arch:
            limit = card.issue_limited(f.per_16_bytes, 32)
            assert limit >= 3 * card.bandwidth, (f, dtype, limit)


@pytest.mark.parametrize("case", model.CASES, ids=lambda case: case.name)
def test_bytes_that_move(case: model.Case) -> None:
    assert 1.0 <= case.ratio <= 1.02
