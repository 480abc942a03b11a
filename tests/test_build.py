"""What the build says when something is missing, and what it puts into a wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setup_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_missing_compiler_is_one_sentence():
    result = setup_py("--version", CXX="no-such-compiler")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines() == [
        "layer_collapse: no C++ compiler found (looked for 'no-such-compiler'); install g++ "
        "(Debian: apt-get install g++) or set CXX"
    ]


def fake_package(folder: Path, name: str, text: str) -> str:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    return str(folder)


def test_an_old_torch_is_one_sentence(tmp_path):
    path = fake_package(tmp_path, "torch", "__version__ = '2.4.1'\n")
    fake_package(tmp_path / "torch", "utils", "")
    extension = "class BuildExtension: pass\nclass CppExtension: pass\n"
    (tmp_path / "torch" / "utils" / "cpp_extension.py").write_text(extension)
    result = setup_py("--version", PYTHONPATH=path)
    assert result.returncode == 1
    assert "needs torch 2.10 or newer, found 2.4.1" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_missing_torch_is_one_sentence(tmp_path):
    path = fake_package(tmp_path, "torch", "raise ImportError('No module named torch')\n")
    result = setup_py("--version", PYTHONPATH=path)
    assert result.returncode == 1
    assert "the build needs torch >= 2.10, pybind11 and ninja" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"layer_collapse"}
    assert any(name.startswith("layer_collapse/_C.") and name.endswith(".so") for name in names)
    assert "layer_collapse/report/template.html.j2" in names
    assert "layer_collapse/py.typed" in names
    assert not [name for name in names if "test" in name.lower() or "bench" in name.lower()]
