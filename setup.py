"""Builds the native module; everything else about the package stands in pyproject.toml."""

import os
import shutil
import sys

from setuptools import setup

MIN_TORCH = (2, 10)
# Symbols of torch 2.10 and nothing newer: one binary then runs on every later release.
TARGET = "0x020a000000000000"


def stop(sentence: str) -> None:
    sys.exit(f"layer_collapse: {sentence}")


if sys.version_info < (3, 10):  # noqa: UP036 - setup.py may be run by any Python
    stop(f"needs Python 3.10 or newer, this is {sys.version.split()[0]}; install a newer Python")

try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as missing:
    stop(f"the build needs torch >= 2.10, pybind11 and ninja ({missing}); pip install them")

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
    stop(f"needs torch 2.10 or newer, found {torch.__version__}; run: pip install 'torch>=2.10'")

compiler = os.environ.get("CXX", "c++")
if shutil.which(compiler.split()[0]) is None:
    stop(
        f"no C++ compiler found (looked for {compiler!r}); install g++ (Debian: apt-get install "
        "g++) or set CXX"
    )

SOURCES = [
    "csrc/module.cpp",
    "csrc/library.cpp",
    "csrc/eager.cpp",
    "csrc/cpu/rectify.cpp",
    "csrc/cpu/rectify_dense.cpp",
    *(f"csrc/cpu/machines/{machine}.cpp" for machine in ("avx512", "avx2", "baseline")),
    "csrc/cpu/bn_rectify.cpp",
    "csrc/cpu/bn_rectify_backward.cpp",
    "csrc/cpu/layer_entropies.cpp",
    "csrc/cpu/masked_step.cpp",
    "csrc/cpu/magnitude_select.cpp",
]

# `make sanitize`: slow code that reports every wrong access and every undefined operation.
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
sanitized = os.environ.get("LAYER_COLLAPSE_SANITIZE") == "1"

setup(
    ext_modules=[
        CppExtension(
            "layer_collapse._C",
            SOURCES,
            include_dirs=[pybind11.get_include(), os.path.abspath("csrc")],
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                "-Wall",
                "-Wextra",
                "-Wno-unused-parameter",
                "-Wno-psabi",  # vectors are only passed to functions that are inlined
                "-fvisibility=hidden",
                # A fused multiply-add rounds once where torch rounds twice: keep torch's bits.
                "-ffp-contract=off",
                # Nobody reads errno or the exception flags; loops with sqrt or selects vectorise.
                "-fno-math-errno",
                "-fno-trapping-math",
                f"-DTORCH_TARGET_VERSION={TARGET}",
                "-DTORCH_STABLE_ONLY",
                *(SANITIZE if sanitized else []),
            ],
            extra_link_args=SANITIZE if sanitized else [],
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
