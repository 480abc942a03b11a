"""What ``make cuda-check`` says on machines that lack what it needs."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module behind ``make cuda-check``, on a machine without nvcc."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("cuda_check", ROOT / "tests" / "cuda_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(module.tools, "HOME", tmp_path)
    monkeypatch.setattr(module.tools.site, "getsitepackages", lambda: [str(tmp_path)])
    return module


#: What makes the host wait for a device, copies to it, or cannot be captured in a graph.
WAITS = re.compile(
    r"Synchronize|cudaMemcpy|cudaMemset|cudaMalloc|cudaFree|EventQuery|StreamQuery"
    r"|stable::to\(|\.item\b|aten::item|_local_scalar"
)


#: What the CPU ops share headers with the CUDA ops for, and reads what on CUDA is the device's.
READS = re.compile(r"read_scalar|read_optional|check_mask\(|has_stray_bits|view_in_m\w+_order")


def with_headers(sources: list[Path]) -> set[Path]:
    """The sources and every header of csrc that they include, directly or not."""
    found, left = set(), [*sources]
    while left:
        source = left.pop()
        if source not in found:
            found.add(source)
            names = re.findall(r'#include "(.*)"', source.read_text())
            left += [path for name in names if (path := ROOT / "csrc" / name).exists()]
    return found


def test_nothing_of_the_kernels_waits_for_a_device():
    own = sorted((ROOT / "csrc" / "cuda").iterdir())
    assert len(own) > 20
    sources = with_headers(own)
    shared = {str(source.relative_to(ROOT / "csrc")) for source in sources - set(own)}
    assert shared > {
        "checks.h", "core/entropy.h", "core/strided_walk.h", "cpu/layout.h",
        "cpu/masked_tensors.h", "cpu/step_arguments.h", "magnitude_arguments.h",
        "rectify_arguments.h",
    }  # fmt: skip
    for source in sources:
        assert not WAITS.search(source.read_text()), source
    for source in own:
        assert not READS.search(source.read_text()), source
    assert WAITS.search("cudaStreamSynchronize(queue)")
    assert READS.search((ROOT / "csrc" / "cpu" / "masked_step.cpp").read_text())


def test_without_nvcc_a_user_is_told_so_in_one_sentence(check, monkeypatch, capsys):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(check, "install", lambda requirements: pytest.fail("installs nothing"))
    with pytest.raises(SystemExit) as exit:
        check.tools_or_exit()
    assert exit.value.code == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("cuda-check: skipped, no nvcc found; install the CUDA toolkit")


def test_without_nvcc_ci_tries_the_wheels_and_then_fails(check, monkeypatch, capsys):
    monkeypatch.setenv("CI", "true")
    tried = []
    monkeypatch.setattr(check, "install", tried.append)
    with pytest.raises(SystemExit) as exit:
        check.tools_or_exit()
    assert exit.value.code == 1
    assert tried == ["nvcc.txt"]
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 1 failed"


def test_ci_goes_on_with_the_nvcc_of_the_wheels(check, monkeypatch, tmp_path):
    monkeypatch.setenv("CI", "true")
    tried = []

    def install(requirements: str) -> None:
        tried.append(requirements)
        name = {"nvcc.txt": "nvcc", "cuda.txt": "nvdisasm"}[requirements]
        program = tmp_path / "nvidia" / "cu13" / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch(mode=0o755)

    monkeypatch.setattr(check, "install", install)
    check.tools_or_exit()
    assert tried == ["nvcc.txt", "cuda.txt"]
    assert check.tools.nvcc() == tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"


def test_it_ends_with_its_time_and_count_and_without_figures_of_an_earlier_run(
    check, monkeypatch, tmp_path, capsys
):
    import figures

    monkeypatch.setattr(figures, "JSON", tmp_path / "cuda_static.json")
    figures.JSON.write_text("[]")
    monkeypatch.setattr(check, "tools_or_exit", lambda: None)
    monkeypatch.setattr(check, "library", lambda name: name)
    counts = {"cuda_static": (0, 1), "cuda_harness": (3, 0), "cuda_on_cpu": (4, 2)}
    monkeypatch.setattr(check, "run", lambda name, *paths, **environment: counts[name])
    assert check.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"took \d+ s", lines[-2])
    assert lines[-1] == "7 passed, 3 failed"
    assert not [line for line in lines if "architectures compiled" in line]
