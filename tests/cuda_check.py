"""``make cuda-check``: proves the CUDA kernels on a machine without a GPU.

Runs them on the CPU under sanitizers against the CPU ops (tests/cuda_on_cpu), and compiles them
with nvcc for every architecture (tests/cuda_static). Ends with "N passed, N failed".
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS / "cuda_static"))

import tools  # noqa: E402 - stands in tests/cuda_static


def install(requirements: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(ROOT / "requirements" / requirements)], check=False)


def tools_or_exit() -> None:
    """nvcc and nvdisasm, or one sentence: a skip for a user, a failure for CI."""
    in_ci = os.environ.get("CI") == "true"
    if tools.nvcc() is None and in_ci:
        install("nvcc.txt")
    if tools.nvcc() is None:
        print(
            f"cuda-check: {'failed' if in_ci else 'skipped'}, no nvcc found; install the CUDA "
            "toolkit (13.0 is what the figures are from) or pip install -r requirements/nvcc.txt"
        )
        if in_ci:
            print("0 passed, 1 failed")
        sys.exit(1 if in_ci else 0)
    if tools.nvdisasm() is None:
        install("cuda.txt")


def library(name: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run(name: str, *paths: str, **environment: str) -> tuple[int, int]:
    """Passed and failed tests of a pytest run."""
    results = ROOT / "build" / f"{name}.xml"
    results.parent.mkdir(exist_ok=True)
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # Compiling is a fixture's work, and takes as long as the machine needs for it.
    command += ["-o", "timeout_func_only=true"]
    done = subprocess.run(
        [*command, f"--junitxml={results}", *(str(TESTS / path) for path in paths)],
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    if not results.exists():  # the process itself died: a fault that the harness or a sanitizer saw
        return 0, 1
    suite = ElementTree.parse(results).getroot()[0].attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    passed = int(suite["tests"]) - failed - int(suite["skipped"])
    return passed, failed if done.returncode in (0, 1) else max(failed, 1)


def main() -> int:
    tools_or_exit()
    import figures
    import model

    start = time.monotonic()
    figures.JSON.unlink(missing_ok=True)  # what did not compile has no figures
    with ThreadPoolExecutor(1) as beside:  # nvcc on one core, the harness on another
        static = beside.submit(run, "cuda_static", "cuda_static")
        parts = [
            run("cuda_harness", "cuda_on_cpu/test_harness.py"),
            run(
                "cuda_on_cpu",
                "cuda_on_cpu/test_rectify_kernels.py",
                "cuda_on_cpu/test_list_kernels.py",
                "cuda_on_cpu/test_graphs.py",
                "cuda_on_cpu/test_hostile.py",
                # libstdc++ too: the sanitizer must find the functions that throw
                LD_PRELOAD=f"{library('libasan.so')} {library('libstdc++.so')}",
                ASAN_OPTIONS="detect_leaks=0",  # Python keeps what it owns
                CUDA_ON_CPU_SANITIZE="1",
            ),
            static.result(),
        ]
    print(model.table())
    if figures.JSON.exists():
        print(figures.summary())
    passed, failed = (sum(column) for column in zip(*parts, strict=True))
    print(f"took {time.monotonic() - start:.0f} s")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
