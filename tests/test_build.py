"""What the build says when something is missing, and what it puts into a wheel."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from layer_collapse import _C

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


def with_cuda_torch(folder: Path, release: str, known: str = "75 80 90", **environment: str):
    """setup.py beside a torch for CUDA 13.0 and an nvcc of another release, or one that knows
    other architectures."""
    text = """__version__ = '2.14.1'
class version: cuda = '13.0'
"""
    path = fake_package(folder, "torch", text)
    fake_package(folder / "torch", "utils", "")
    extension = """from setuptools import Extension
def CppExtension(name, sources, **_): return Extension(name, sources)
def CUDAExtension(name, sources, **_):
    import os
    print(name, os.environ["TORCH_CUDA_ARCH_LIST"])
    return Extension(name, sources)
class BuildExtension:
    def with_options(**_):
        from setuptools.command.build_ext import build_ext
        return build_ext
"""
    (folder / "torch" / "utils" / "cpp_extension.py").write_text(extension)
    nvcc = folder / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    listed = "\\n".join(f"compute_{arch}" for arch in known.split())
    nvcc.write_text(
        f"""#!/bin/sh
case $1 in
--version) echo 'Cuda compilation tools, release {release}, V{release}.1' ;;
*) printf '{listed}\\n' ;;
esac
"""
    )
    nvcc.chmod(0o755)
    return setup_py(
        "--version",
        PYTHONPATH=path,
        CUDA_HOME=str(folder / "toolkit"),
        TORCH_CUDA_ARCH_LIST="",
        **{"LAYER_COLLAPSE_CUDA": "", **environment},
    )


def test_an_nvcc_of_another_cuda_leaves_the_kernels_out_and_says_so(tmp_path):
    """As pip's isolated build meets it: PyPI's newest torch beside an older toolkit."""
    result = with_cuda_torch(tmp_path, "12.4")
    assert result.returncode == 0
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("layer_collapse: no CUDA kernels, which would need an nvcc of torch's")
    assert "CUDA 13.0, found release 12.4" in line
    assert "_C_cuda" not in result.stdout


def test_an_nvcc_of_another_cuda_stops_who_asked_for_the_kernels(tmp_path):
    result = with_cuda_torch(tmp_path, "12.4", LAYER_COLLAPSE_CUDA="1")
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("layer_collapse: LAYER_COLLAPSE_CUDA=1 needs an nvcc of torch's CUDA")


def test_the_kernels_are_built_for_what_nvcc_knows(tmp_path):
    result = with_cuda_torch(tmp_path, "13.2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "layer_collapse._C_cuda 7.5;8.0;9.0+PTX"


def test_the_kernels_are_built_for_every_architecture_that_is_checked(tmp_path):
    known = "75 80 86 87 88 89 90 100 103 110 120 121"  # by nvcc 13
    result = with_cuda_torch(tmp_path, "13.2", known)
    assert result.returncode == 0, result.stderr
    every = "7.5;8.0;8.6;9.0;10.0;12.0+PTX"
    assert result.stdout.splitlines()[0] == f"layer_collapse._C_cuda {every}"
    built = constant(ROOT / "setup.py", "ARCHITECTURES")
    checked = constant(ROOT / "tests" / "cuda_static" / "figures.py", "ARCHITECTURES")
    assert checked == tuple(f"sm_{arch.replace('.', '')}" for arch in built)


def constant(source: Path, name: str):
    """What a module that cannot be imported here says that a name stands for."""
    for line in ast.parse(source.read_text()).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name:
            return ast.literal_eval(line.value)
    raise AssertionError(f"no {name} in {source}")


def test_the_library_holds_no_folder_and_no_debug_information():
    library = Path(_C.__file__).read_bytes()
    if b"__asan_init" in library:
        pytest.skip("built for the sanitizers")
    for folder in (ROOT, Path(torch.__file__).parent, Path(sys.prefix)):
        assert bytes(folder) not in library
    assert b".debug_info" not in library


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
