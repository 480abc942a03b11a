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


def test_nothing_of_the_kernels_waits_for_a_device():
    sources = sorted((ROOT / "csrc" / "cuda").iterdir())
    assert len(sources) > 20
    for source in [*sources, ROOT / "csrc" / "rectify_arguments.h"]:
        assert not WAITS.search(source.read_text()), source
    assert WAITS.search("cudaStreamSynchronize(queue)")


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
