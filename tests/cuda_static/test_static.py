"""What nvcc makes of the kernels, on every architecture, and what follows from it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import figures
import model
from cards import CARDS, Card
from figures import ARCHITECTURES, Figures, Report

#: Kernels, and kernels x architectures. A new kernel changes this number knowingly.
KERNELS = 109
COVERED = 654

#: Bfloat16 before sm_90 has minima and maxima, but no comparison that gives a mask.
OLD_BFLOAT16 = "__nv_bfloat16 before sm_90"
#: Instructions of the inner loop per 16 bytes, with all counters, on sm_80 and later. ReLU, and
#: GELU and SiLU (counted alone), keep to 40 for float and 48 for halves. The others do more for a
#: value; theirs are what they took when last looked at, and a few. LeakyReLU and PReLU multiply,
#: halves in float as torch does. ReLU6 and Hardswish have a fourth counter, of what lies above the
#: knee or between the knees; Hardswish has two clamps and two products besides, in float.
LIMITS = {
    "DeviceRelu": {
        "float": 40, "double": 51, "__half": 48, "__nv_bfloat16": 48, OLD_BFLOAT16: 48
    },
    "DeviceCountOnly": {
        "float": 40, "double": 45, "__half": 48, "__nv_bfloat16": 48, OLD_BFLOAT16: 48
    },
    "DeviceLeakyRelu": {
        "float": 49, "double": 62, "__half": 66, "__nv_bfloat16": 70, OLD_BFLOAT16: 85
    },
    "DeviceRelu6": {
        "float": 70, "double": 69, "__half": 60, "__nv_bfloat16": 57, OLD_BFLOAT16: 112
    },
    "DeviceHardswish": {
        "float": 83, "double": 130, "__half": 106, "__nv_bfloat16": 110, OLD_BFLOAT16: 122
    },
}  # fmt: skip
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
    "write_numbers",
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


def _dtype(f: Figures) -> str:
    """The key of LIMITS."""
    dtype = f.kernel.split("<")[1].rstrip(">").split(", ")[1]
    old = dtype == "__nv_bfloat16" and f.arch in ("sm_80", "sm_86")
    return OLD_BFLOAT16 if old else dtype


def _loops(report: Report, rectifier: str) -> list[Figures]:
    """The aligned paths of a rectifier, on sm_80 and later."""
    return [
        f
        for f in report.figures
        if f"<{rectifier}, " in f.kernel and _has_vectors(f.kernel) and f.arch != "sm_75"
    ]


@pytest.mark.parametrize("rectifier", LIMITS)
def test_counting_takes_few_instructions(report: Report, rectifier: str) -> None:
    found = _loops(report, rectifier)
    assert len(found) == 2 * 4 * (len(ARCHITECTURES) - 1)  # two layouts, four dtypes
    for f in found:
        assert f.loop_loads_128 > 0, f
        writes = rectifier != "DeviceCountOnly"
        assert f.loop_stores_128 == (f.loop_loads_128 if writes else 0), f
        assert f.per_16_bytes is not None
        assert f.per_16_bytes <= LIMITS[rectifier][_dtype(f)], f


#: Times the card's bandwidth that instructions alone would allow at least: of ReLU three, of all
#: others enough that memory is what they wait for. double is left to the cards that compute it.
HEADROOM = {"DeviceRelu": 3.0}
LEAST_HEADROOM = 1.3


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("rectifier", LIMITS)
def test_memory_is_the_limit(report: Report, rectifier: str, card: Card) -> None:
    for f in _loops(report, rectifier):
        if f.arch == card.arch and _dtype(f) != "double":
            moved = 16 if rectifier == "DeviceCountOnly" else 32
            limit = card.issue_limited(f.per_16_bytes, moved)
            assert limit >= HEADROOM.get(rectifier, LEAST_HEADROOM) * card.bandwidth, (f, limit)


@pytest.mark.parametrize("case", model.CASES, ids=lambda case: case.name)
def test_bytes_that_move(case: model.Case) -> None:
    assert 1.0 <= case.ratio <= 1.02
