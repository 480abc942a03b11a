"""``measure`` and ``doctor``: for people's own models and machines."""

from __future__ import annotations

import argparse
import importlib
import platform
import shutil
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import _C, __version__, checkpoint, data, models
from ..measure.report import EntropyReport
from ..measure.scan import scan
from ..ops import cuda
from .console import add_json_flag, print_json, progress, results


def add_commands(commands: Any) -> None:
    """Register the commands."""
    measure = commands.add_parser(
        "measure",
        help="entropy of every rectifier of a model",
        description="Count the signs of every rectifier's input over a data set and print one row "
        "per rectifier.",
        epilog="example: layer-collapse measure --weights runs/demo/state.safetensors",
    )
    add_model_arguments(measure)
    measure.set_defaults(run=_measure)

    doctor = commands.add_parser(
        "doctor", help="what is built and what this machine has", description="Report the build."
    )
    add_json_flag(doctor)
    doctor.set_defaults(run=_doctor)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, weights and data, and in which form to print."""
    parser.add_argument(
        "--model",
        metavar="NAME|MODULE:CALLABLE",
        help=f"built-in ({', '.join(models.NAMES)}) or a callable that returns a module; default: "
        "the model of the run that --weights belongs to",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="safetensors file of the model's state_dict, or a run's state.safetensors",
    )
    parser.add_argument(
        "--data",
        metavar="NAME|FILE",
        help=f"built-in ({', '.join(data.NAMES)}) or a .safetensors or .npz file with an array x "
        "[N, ...]; default: the data of the run",
    )
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="where built-in data lie")
    parser.add_argument("--batch", type=int, default=256, help="batch size of the scan")
    add_json_flag(parser)


def _read_weights(path: Path | None) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """The state_dict in a file, and the settings of the run that wrote it (or nothing)."""
    if path is None:
        return None, {}
    if not path.is_file():
        raise FileNotFoundError(f"expected weights at {path}, but there is no such file")
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no safetensors file ({error}); save the model's state_dict with safetensors"
        ) from error
    if any(name.startswith("model.") for name in tensors) and "mask" in {
        name.split(".")[0] for name in tensors
    }:
        _, meta = checkpoint.load(path)
        return checkpoint.without_prefix("model.", tensors), dict(meta["settings"])
    return tensors, {}


def read_samples(
    choice: str | None, root: Path | None, settings: dict[str, Any]
) -> tuple[Tensor, int | None]:
    """The inputs to scan, [N, ...], and the number of classes where that is known."""
    choice = choice or settings.get("data")
    if choice is None:
        raise ValueError("pass --data NAME or --data FILE: there is nothing to measure without")
    if choice in data.NAMES:
        dataset = data.load(
            choice,
            root,
            seed=int(settings.get("seed", 0)),
            train_samples=settings.get("train_samples"),
        )
        return dataset.train.x, dataset.classes
    path = Path(choice)
    if not path.is_file():
        known = ", ".join(data.NAMES)
        raise FileNotFoundError(f"--data must be {known} or a file; there is no file {path}")
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is no .npz file of plain arrays ({error})") from error
    else:
        try:
            found = safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is neither .npz nor safetensors ({error})") from error
    if "x" not in found or found["x"].dim() < 1 or len(found["x"]) == 0:
        raise ValueError(f"{path} must hold an array 'x' of shape [N, ...] with N >= 1")
    return found["x"], int(found["y"].max()) + 1 if "y" in found else None


def _build(
    choice: str | None, settings: dict[str, Any], x: Tensor, classes: int | None
) -> nn.Module:
    choice = choice or settings.get("model")
    if choice is None:
        raise ValueError("pass --model NAME or --model MODULE:CALLABLE")
    if choice in models.NAMES:
        if classes is None:
            raise ValueError(
                f"model {choice!r} needs labels y in the data file to know its classes"
            )
        return models.build(choice, tuple(x.shape[1:]), classes, **settings.get("options", {}))
    module_name, _, attribute = choice.partition(":")
    if not attribute:
        raise ValueError(
            f"unknown model {choice!r}; choose from {', '.join(models.NAMES)} or write "
            "MODULE:CALLABLE"
        )
    sys.path.insert(0, "")  # as `python -m` does: the user's own file lies here
    try:
        build = getattr(importlib.import_module(module_name), attribute, None)
    except Exception as error:  # the user's file may raise anything
        raise ImportError(f"cannot import {module_name!r} for --model ({error!r})") from error
    if not callable(build):
        raise ValueError(f"{module_name!r} has no callable {attribute!r} for --model")
    try:
        model = build()
    except Exception as error:
        raise ValueError(f"{choice} for --model failed ({error!r})") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"{choice} must return a torch.nn.Module (got {type(model).__name__})")
    return model


def loaded(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """The model with its weights, example inputs and batches to scan."""
    state, settings = _read_weights(arguments.weights)
    x, classes = read_samples(arguments.data, arguments.data_root, settings)
    model = _build(arguments.model, settings, x, classes)
    if state is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{arguments.weights} does not fit the model: {reason}") from error
    if arguments.batch < 1:
        raise ValueError(f"--batch must be 1 or more (got {arguments.batch})")
    return model.eval(), x[: arguments.batch], list(x.split(arguments.batch))


def scanned(model: nn.Module, example: Tensor, batches: list[Tensor]) -> EntropyReport:
    """The report of the scan of a loaded model, with progress."""
    return scan(model, batches, example, progress=lambda them: progress(them, "scan", len(batches)))


def _measure(arguments: argparse.Namespace) -> int:
    report = scanned(*loaded(arguments))
    if arguments.json:
        print_json(report.to_dict())
    else:
        results.print(str(report), markup=False, soft_wrap=True)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    facts = {
        "layer_collapse": __version__,
        **{f"native_{key}": value for key, value in _C.build_info().items()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda or "no CUDA in this torch",
        "cuda_device": (
            torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        ),
        "cuda_kernels": cuda.REFUSAL or "built",
        "nvcc": shutil.which("nvcc") or "not found",
    }
    if arguments.json:
        print_json(facts)
    else:
        width = max(len(key) for key in facts)
        for key, value in facts.items():
            results.print(f"{key:<{width}}  {value}", markup=False)
    return 0
