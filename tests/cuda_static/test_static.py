"""What nvcc makes of the kernels, on every architecture, and what follows from it."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
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
#: Kernels without 16-byte accesses: they read masks and counters alone, or, count_kernel and
#: clear_kernel, have a lane per weight, so that a word's ballot is its mask; a warp still reads 128
#: bytes at once. Besides, rectify_planes goes value by value where positions are masked (`valid`)
#: or x and y lie differently within 16 bytes, and rectify_channels, compiled with vectors of 1,
#: where rows of C channels are no multiple of 16 bytes or do not start at one.
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


@dataclass(frozen=True)
class Vectors:
    """16-byte loads and stores that a kernel has at least."""

    loads: int  # of the inner loop
    stores: int
    more_loads: int = 0  # elsewhere
    more_stores: int = 0


#: Of the list kernels, by name and, of steps, whether they have momentum or amsgrad: one for each
#: tensor that they read and write. A word that is pruned as a whole is cleared elsewhere.
LISTS = {
    "masked_sgd, false": Vectors(2, 1),
    "masked_sgd, true": Vectors(3, 2, more_stores=1),
    "masked_adamw, false": Vectors(4, 3),
    "masked_adamw, true": Vectors(5, 4),
    "histogram_kernel": Vectors(2, 0),  # two vectors on their way at a time
    "apply_masks": Vectors(0, 0, more_stores=2),  # reads masks alone
}


def _least_vectors(f: Figures) -> Vectors:
    family, _, rest = f.kernel.rstrip(">").partition("<")
    parameters = rest.split(", ")
    if not family.startswith("rectify_"):
        step = f", {parameters[-1]}" if family.startswith("masked_") else ""
        return LISTS[family + step]
    # as batch() of csrc/cuda/rectifiers.cuh and rectify_channels choose it
    rectifier, dtype = parameters[:2]
    half = dtype in ("__half", "__nv_bfloat16")
    ones = dtype == "float" or (dtype == "__nv_bfloat16" and f.arch in ("sm_80", "sm_86"))
    if dtype == "__nv_bfloat16" and f.arch == "sm_75":
        ahead = 1
    elif rectifier in ("DeviceRelu6", "DeviceHardswish"):  # a fourth counter
        ahead = 1 if half else 2
    elif family == "rectify_channels" and half and not ones:
        ahead = 1
    else:
        ahead = 4 if ones else 2
    if rectifier == "DeviceCountOnly":
        return Vectors(ahead, 0, more_loads=1)
    return Vectors(ahead, ahead, 1, 1)  # the vectors that are left over, one at a time


def test_aligned_paths_use_16_byte_accesses(report: Report) -> None:
    found = [f for f in report.figures if _has_vectors(f.kernel)]
    assert {f.kernel.split("<")[0] for f in found} >= {name.split(",")[0] for name in LISTS}
    for f in found:
        least = _least_vectors(f)
        assert f.loop_loads_128 >= least.loads, f
        assert f.loop_stores_128 >= least.stores, f
        assert f.loads_128 >= least.loads + least.more_loads, f
        assert f.stores_128 >= least.stores + least.more_stores, f


def test_no_atomic_adds_floats(report: Report) -> None:
    """Sums of floats would depend on the order; one in shared memory is a loop around a CAS."""
    floats = re.compile(r"\.(BF16|F16|F32|F64|CAS)")
    assert [f for f in report.figures if any(map(floats.search, f.atomics))] == []
    for f in report.figures:  # the parser sees atomics where they are
        if f.kernel.startswith(("rectify_", "histogram_kernel", "count_kernel")):
            assert f.atomics, f


def _dtype(f: Figures) -> str:
    """The key of LIMITS."""
    dtype = f.kernel.split("<")[1].rstrip(">").split(", ")[1]
    old = dtype == "__nv_bfloat16" and f.arch in ("sm_80", "sm_86")
    return OLD_BFLOAT16 if old else dtype


def _loops(report: Report, rectifier: str) -> list[Figures]:
    """The aligned paths of a rectifier."""
    return [f for f in report.figures if f"<{rectifier}, " in f.kernel and _has_vectors(f.kernel)]


@pytest.mark.parametrize("rectifier", LIMITS)
def test_counting_takes_few_instructions(report: Report, rectifier: str) -> None:
    found = [f for f in _loops(report, rectifier) if f.arch != "sm_75"]
    assert len(found) == 2 * 4 * (len(ARCHITECTURES) - 1)  # two layouts, four dtypes
    for f in found:
        assert f.loop_loads_128 > 0, f
        writes = rectifier != "DeviceCountOnly"
        assert f.loop_stores_128 == (f.loop_loads_128 if writes else 0), f
        assert f.per_16_bytes is not None
        assert f.per_16_bytes <= LIMITS[rectifier][_dtype(f)], f


#: Times its bandwidth that each of CARDS would reach if only issuing mattered, at least, by what
#: kernels are named with. ReLU keeps to 3, as every kernel should; the others to what they had when
#: last looked at, or a little less, and benchmarks/gpu.md names those below 3. The count is static
#: (Figures.headroom); double is left to the cards that compute it.
HEADROOM = {
    # T4, A100, RTX 3090, H100, B200, RTX 5090
    "DeviceRelu,": (3.0, 3.0, 3.0, 3.0, 3.0, 3.0),
    "DeviceCountOnly,": (3.3, 3.0, 3.0, 3.0, 2.1, 3.0),
    "DeviceLeakyRelu,": (3.0, 3.0, 3.0, 3.0, 2.1, 3.0),
    "DeviceRelu6,": (3.0, 2.7, 3.0, 3.0, 2.3, 3.0),
    "DeviceHardswish,": (2.5, 2.5, 3.0, 3.0, 1.3, 3.0),
    "masked_sgd<": (2.4, 1.5, 3.0, 1.4, 2.2, 3.0),
    "masked_adamw<": (2.1, 1.5, 3.0, 1.5, 1.4, 3.0),
    "histogram_kernel<": (2.0, 0.8, 1.7, 0.7, 0.3, 2.5),
}


def _on_card(report: Report, card: Card, name: str) -> list[Figures]:
    return [
        f
        for f in report.figures
        if f.arch == card.arch
        and name in f.kernel
        and "double" not in f.kernel
        and _has_vectors(f.kernel)
    ]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("name", HEADROOM)
def test_memory_is_the_limit(report: Report, name: str, card: Card) -> None:
    found = _on_card(report, card, name)
    # three dtypes, times layouts, what a step remembers, or widths of a key
    assert len(found) == 6
    for f in found:
        assert f.headroom is not None
        assert f.headroom >= HEADROOM[name][CARDS.index(card)], (f, f.headroom)


def test_what_is_short_of_three_times_the_bandwidth_is_named(report: Report) -> None:
    """By benchmarks/gpu.md; `python tests/cuda_static/figures.py` prints its table anew."""
    named = set()
    for line in (figures.ROOT / "benchmarks" / "gpu.md").read_text().splitlines():
        if line.startswith("| `"):
            kernel, *cells = (cell.strip("` ") for cell in line.strip("|").split("|"))
            named |= {(kernel, c.name) for c, cell in zip(CARDS, cells, strict=False) if cell}
    for card in CARDS:
        for f in (f for name in HEADROOM for f in _on_card(report, card, name)):
            assert f.headroom is not None
            assert f.headroom >= 3 or (f.kernel, card.name) in named, (f, f.headroom)


#: What the byte model takes from the sources: file of csrc/cuda, constant -> its copy.
CONSTANTS = {
    ("rectify.cu", "kBlocks"): model.BLOCKS,
    ("rectify.cu", "kVectorsPerThread"): model.VECTORS,
    ("rectify.cu", "kChannelBlocks"): model.CHANNEL_BLOCKS,
    ("rectify.cu", "kMinRows"): model.MIN_ROWS,
    ("rectify.cu", "kRowsPerThread"): model.ROWS,
    ("magnitude_select.cu", "kHistogramBlocks"): model.HISTOGRAM_BLOCKS,
    ("table.h", "kMinChunk"): model.MIN_CHUNK,
    ("device.cuh", "kThreads"): model.THREADS,
    ("device.cuh", "kWarp"): model.THREADS // model.WARPS,
    ("magnitude_cut.cuh", "kSegmentWords"): model.SEGMENT_WORDS,
    ("magnitude_digits.cuh", "kDigitBits"): model.BUCKETS.bit_length() - 1,
    ("layer_entropies.cuh", "kEntropyColumns"): model.SUMMARY,
}


@pytest.mark.parametrize(("place", "value"), CONSTANTS.items(), ids=lambda v: str(v))
def test_the_model_has_the_constants_of_the_sources(place: tuple[str, str], value: int) -> None:
    file, name = place
    text = (figures.ROOT / "csrc" / "cuda" / file).read_text()
    assert re.findall(rf"\b{name} = (\d+)[,;]", text) == [str(value)]


@pytest.mark.parametrize("case", model.CASES, ids=lambda case: case.name)
def test_bytes_that_move(case: model.Case) -> None:
    assert 1.0 <= case.ratio <= 1.02
