"""Builds the native module; everything else about the package stands in pyproject.toml."""

import os
import re
import shutil
import subprocess
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
    "csrc/eager_step.cpp",
    "csrc/cpu/machine.cpp",
    "csrc/cpu/rectify.cpp",
    "csrc/cpu/rectify_dense.cpp",
    *(f"csrc/cpu/machines/{machine}.cpp" for machine in ("avx512", "avx2", "baseline")),
    "csrc/cpu/bn_rectify.cpp",
    "csrc/cpu/bn_rectify_backward.cpp",
    "csrc/cpu/layer_entropies.cpp",
    "csrc/cpu/masked_step.cpp",
    "csrc/cpu/masked_loops.cpp",
    "csrc/cpu/magnitude_select.cpp",
]

CUDA_SOURCES = [
    "csrc/cuda/module.cpp",
    "csrc/cuda/rectify_op.cpp",
    "csrc/cuda/rectify.cu",
    "csrc/cuda/layer_entropies_op.cpp",
    "csrc/cuda/layer_entropies.cu",
    "csrc/cuda/masked_step_op.cpp",
    "csrc/cuda/masked_step.cu",
    "csrc/cuda/magnitude_op.cpp",
    "csrc/cuda/magnitude_select.cu",
]
ARCHITECTURES = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")

ROOT = os.path.dirname(os.path.abspath(__file__))
INCLUDES = [pybind11.get_include(), os.path.abspath("csrc")]
FLAGS = [
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
    # Python's own flags ask for debug information: nine tenths of the library.
    "-g0",
    # No folder of this machine in it: equal sources give equal bytes wherever they are built.
    f"-ffile-prefix-map={ROOT}=.",
    f"-ffile-prefix-map={os.path.dirname(torch.__file__)}=torch",
    f"-ffile-prefix-map={os.path.dirname(pybind11.__file__)}=pybind11",
]
# `make sanitize`: slow code that reports every wrong access and every undefined operation.
SANITIZE = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
if os.environ.get("LAYER_COLLAPSE_SANITIZE") != "1":
    SANITIZE = []


def find_nvcc() -> str | None:
    """The compiler itself: what stands on the path may be a script that calls it."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    found = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    return next((path for path in found if os.path.exists(path)), shutil.which("nvcc"))


def nvcc_says(*arguments: str) -> str:
    return subprocess.run([find_nvcc(), *arguments], capture_output=True, text=True).stdout


def lacks_cuda() -> str:
    """What this torch and this machine lack of what the kernels need; "" if nothing."""
    if torch.version.cuda is None:
        return (
            f"a torch with CUDA, found {torch.__version__}; install one or leave the variable out"
        )
    if find_nvcc() is None:
        return "nvcc, none found; install the CUDA toolkit or set CUDA_HOME"
    release = re.search(r"release (\d+)\.\d+", nvcc_says("--version"))
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = release[0] if release else "one that does not say its release"
        return (
            f"an nvcc of torch's CUDA {torch.version.cuda}, found {found} ({find_nvcc()}); "
            "install that toolkit or set CUDA_HOME"
        )
    return ""


def wants_cuda() -> bool:
    """LAYER_COLLAPSE_CUDA=0|1 decides; without it, whether this torch and this machine have CUDA.

    The kernels are a library of their own, _C_cuda, so that _C never needs libtorch_cuda and a
    torch without CUDA can use a package that was built with it.
    """
    wish = os.environ.get("LAYER_COLLAPSE_CUDA", "")
    if wish not in ("", "0", "1"):
        stop(f"LAYER_COLLAPSE_CUDA must be 0 or 1 (got {wish!r})")
    if wish == "0":
        return False
    missing = lacks_cuda()
    if missing and wish == "1":
        stop(f"LAYER_COLLAPSE_CUDA=1 needs {missing}")
    if missing:
        print(f"layer_collapse: no CUDA kernels, which would need {missing}", file=sys.stderr)
    return not missing


def architectures() -> str:
    """Those of ARCHITECTURES that nvcc knows, the last as PTX too, for cards to come."""
    known = nvcc_says("--list-gpu-arch").split()
    taken = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    if not taken:
        stop(f"{find_nvcc()} knows none of {', '.join(ARCHITECTURES)}; set TORCH_CUDA_ARCH_LIST")
    return ";".join(taken) + "+PTX"


def cuda_extension():
    # Torch looks for the toolkit beside the nvcc of the path, and asks a GPU for its architecture.
    os.environ["CUDA_HOME"] = os.path.dirname(os.path.dirname(os.path.realpath(find_nvcc())))
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]
    return cpp_extension.CUDAExtension(
        "layer_collapse._C_cuda",
        CUDA_SOURCES,
        include_dirs=INCLUDES,
        extra_compile_args={
            "cxx": [*FLAGS, "-DUSE_CUDA"],
            "nvcc": ["-O3", "-std=c++20", "-lineinfo"],
        },
    )


extensions = [
    CppExtension(
        "layer_collapse._C",
        SOURCES,
        include_dirs=INCLUDES,
        extra_compile_args=FLAGS + SANITIZE,
        extra_link_args=SANITIZE,
    )
]
if wants_cuda():
    extensions.append(cuda_extension())

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
