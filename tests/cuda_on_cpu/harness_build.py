"""Compiles the kernels of csrc/cuda for the CPU: ``harness_build.py KIND TARGET`` or :func:`build`.

``ops``: their ops as a library that registers them for CPU tensors, as layer_collapse_on_cpu.*,
with AddressSanitizer and UndefinedBehaviorSanitizer; or rectify alone, as compiled for GPUs that do
less with bfloat16 (``LC_BFLOAT16`` of csrc/cuda/device.cuh). Programs: :func:`program`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
LAUNCHERS = sorted(CUDA.glob("*.cu"))
OPS = sorted(CUDA.glob("*_op.cpp"))
TORCH = Path(torch.__file__).parent

_COMMON = [
    "-std=c++20",
    "-g1",
    "-O1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
    # vectors are read through uint4, as CUDA code does
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    f"-I{ROOT / 'csrc'}",
    f"-I{HERE}",
    f"-I{TORCH / 'include'}",
    f"-I{TORCH / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DTORCH_STABLE_ONLY",
]
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
THREAD = ["-fsanitize=thread", "-DCUDA_ON_CPU_THREADS"]
#: Of what stands in the library of the ops, so that a program can use the same objects.
SHARED = ["-fPIC"]


def _folder() -> Path:
    folder = ROOT / "build" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _compile(source: Path, flags: list[str]) -> Path:
    """The object of one source; compiled again only when what it is made of has changed."""
    command = [os.environ.get("CXX", "c++"), *_COMMON, *flags, "-x", "c++", "-c", str(source)]
    parts = [*command, *(p.read_text() for p in _inputs())]
    digest = hashlib.sha256("\0".join([*parts, source.read_text()]).encode()).hexdigest()[:16]
    target = _folder() / f"{source.stem}-{digest}.o"
    if not target.exists():
        partial = target.with_suffix(".partial")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.rename(target)
    return target


def _inputs() -> list[Path]:
    headers = [*(ROOT / "csrc").rglob("*.h"), *CUDA.glob("*.cuh"), *HERE.glob("*.h")]
    return sorted(headers)


def ops(*, bfloat16: int | None = None, sanitize: bool = True) -> Path:
    """The shared library of the ops, for torch.ops.load_library; bfloat16: rectify alone."""
    name, sources = "layer_collapse_on_cpu", [*LAUNCHERS, *OPS]
    kernels = [*(ADDRESS if sanitize else []), *SHARED]
    if bfloat16 is not None:
        name, sources = f"{name}_{bfloat16}", [CUDA / "rectify.cu", CUDA / "rectify_op.cpp"]
        kernels.append(f"-DLC_BFLOAT16={bfloat16}")
    flags = [*kernels, "-DLC_CUDA_KEY=CPU", f"-DLC_CUDA_LIBRARY={name}"]
    objects = [_compile(s, kernels if s.suffix == ".cu" else flags) for s in sources]
    # beyond the stable ABI: it takes the place of torch's allocator
    beyond = ["-UTORCH_STABLE_ONLY", "-UTORCH_TARGET_VERSION"]
    objects.append(_compile(HERE / "settings.cpp", [*flags, *beyond]))
    stem = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
    target = _folder() / f"{name}-{stem}.so"
    if not target.exists():
        command = [os.environ.get("CXX", "c++"), "-shared", *flags, *map(str, objects)]
        library = TORCH / "lib"
        command += [f"-L{library}", f"-Wl,-rpath,{library}", "-ltorch_cpu", "-lc10", "-ltorch"]
        subprocess.run([*command, "-o", str(target)], check=True)
    return target


def program(source: Path, *flags: str) -> Path:
    """The executable of a test program; with the launchers if it is not about planted bugs."""
    sources = [source] if source.stem == "planted" else [*LAUNCHERS, source]
    objects = [_compile(file, list(flags)) for file in sources]
    stem = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
    target = _folder() / f"{source.stem}-{stem}"
    if not target.exists():
        command = [os.environ.get("CXX", "c++"), *flags, *map(str, objects), "-pthread"]
        subprocess.run([*command, "-o", str(target)], check=True)
    return target


if __name__ == "__main__":
    print(ops(sanitize="--plain" not in sys.argv[1:]))
