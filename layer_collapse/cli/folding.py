"""``fold``: the linear layers leave somebody's model, which is proven, timed and saved."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..files import write_atomically
from ..measure.report import NONFINITE
from ..reduce.agreement import Agreement, agreement
from ..reduce.approximate import fit_gates
from ..reduce.fold import fold
from ..reduce.latency import compare
from ..reduce.linearize import linearize
from ..reduce.proof import difference
from ..reduce.saving import save_folded, unsavable
from ..reduce.work import BORDERS
from .console import log, print_json, results
from .models import add_model_arguments, loaded, read_samples, scanned

_MOVE = "move"  # the one remedy that is linearize's: it changes the function
#: Largest relative difference to onnxruntime that float32 (and anything narrower) may show.
_ONNX_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4}


def add_command(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "fold",
        help="take the linear layers out of a model",
        description="Scan a model, linearise its rectifiers of zero entropy, fold, prove, save.",
        epilog="example: layer-collapse fold --weights runs/demo/state.safetensors --out f."
        "safetensors",
    )
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="folded model")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="BITS",
        help="also linearise rectifiers of at most BITS of entropy; changes the outputs",
    )
    parser.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="also replace rectifiers by a fitted gate whose root mean square error is at most E "
        "times their output; changes the outputs",
    )
    parser.add_argument(
        "--held-out",
        metavar="NAME|FILE",
        help="samples that were not scanned, as for --data, on which to compare with the original",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=32,
        metavar="N",
        help="samples on which folds are proven and timed (default: 32)",
    )
    parser.add_argument(
        "--always-fold",
        action="store_true",
        help="merge layers even where that is slower here; default: time both, keep the faster",
    )
    parser.add_argument(
        "--border",
        choices=(*BORDERS, _MOVE),
        default="biasmap",
        help="what to do where zero padding makes a merge of two convolutions inexact; move: pad "
        "in front of the first, which changes outputs at the border, so fine-tune what is saved",
    )
    parser.add_argument(
        "--no-proof", action="store_true", help="leave out the comparison end to end in float64"
    )
    parser.add_argument(
        "--onnx", type=Path, metavar="FILE", help="also export to ONNX; checked by onnxruntime"
    )
    parser.set_defaults(run=_fold)


def _fold(arguments: argparse.Namespace) -> int:
    if arguments.samples < 1:
        raise ValueError(f"--samples must be 1 or more (got {arguments.samples})")
    _need_place("--out", arguments.out)  # before minutes of work, as all that follows
    if arguments.onnx is not None:
        _need_place("--onnx", arguments.onnx)
        _need_onnx()
    if arguments.max_error is not None and not arguments.max_error >= 0:
        raise ValueError(f"--max-error must be 0 or more (got {arguments.max_error})")
    model, example, batches = loaded(arguments)
    held_out = batches if arguments.held_out is None else _held_out(arguments, example)
    report = scanned(model, example, batches)
    for row in report:
        if row.state == NONFINITE:
            raise ValueError(f"rectifier {row.name!r} saw NaN; check the weights and the data")
    fits = {}
    if arguments.max_error is not None:
        fits = fit_gates(model, batches, example)
        fits = {name: fit for name, fit in fits.items() if fit.relative <= arguments.max_error}
    moves = arguments.border == _MOVE
    linear = linearize(
        model,
        report,
        example,
        tolerance=arguments.tolerance,
        fits=fits,
        border=_MOVE if moves else "keep",
    )
    for problem in unsavable(linear.model):
        log(f"{problem}; unless it leaves the network, the folded model cannot be saved")
    example = example[: arguments.samples]
    result = fold(
        linear.model,
        example,
        border="biasmap" if moves else arguments.border,
        always_fold=arguments.always_fold,
        prove=not arguments.no_proof,
    )
    save_folded(result.model, arguments.out)
    latency = compare(model, result.model, example)
    result.report.latency = latency
    exported = None if arguments.onnx is None else export(result.model, example, arguments.onnx)
    gone = (*linear.exact, *linear.approximate)
    near = agreement(model, result.model, held_out)
    if arguments.json:
        print_json(
            {
                "entropy": report.to_dict(),
                "linearized": {"exact": linear.exact, "approximate": linear.approximate},
                "kept": linear.kept,
                "moved": linear.moved,
                "error": {name: fit.relative for name, fit in linear.fits.items()},
                "max_error": {name: fit.max_error for name, fit in linear.fits.items()},
                "agreement": {**vars(near), "held_out": arguments.held_out},
                "fold": result.report.to_dict(),
                "latency_ms": vars(latency),
                "file": str(arguments.out),
                "onnx": None if exported is None else {"file": str(arguments.onnx), **exported},
            }
        )
    else:
        gone_text = f"{len(gone)} of {len(report)} rectifiers left the network"
        lines = [str(report), gone_text]
        lines += [
            f"{name}: error of its gate {fit.relative:.3g} of its output (root mean square), "
            f"{fit.max_error:.3g} at most"
            for name, fit in linear.fits.items()
        ]
        lines += [
            f"the padding of {second!r} lies in front of {first!r} now: fine-tune"
            for first, second in linear.moved
        ]
        lines += [str(result.report), _agreement_text(near, arguments.held_out)]
        lines.append(f"saved to {arguments.out}")
        if exported is not None:
            lines.append(_exported_text(arguments.onnx, exported))
        results.print("\n".join(lines), markup=False, soft_wrap=True)
    if not gone:
        log("no rectifier has zero entropy, so no layer left the network")
    return 0 if gone else 1


def _agreement_text(near: Agreement, held_out: str | None) -> str:
    return (
        f"the same class as the original on {near.same_class:.2%} of {near.samples} "
        f"{'held-out' if held_out else 'scanned'} samples; logits moved by {near.relative:.1e} of "
        f"their size, {near.max_abs:.1e} at most"
    )


def _held_out(arguments: argparse.Namespace, example: Tensor) -> list[Tensor]:
    """The batches to compare on: of the shape and dtype of those that are scanned."""
    x, _ = read_samples(arguments.held_out, arguments.data_root, {})
    if (x.shape[1:], x.dtype) != (example.shape[1:], example.dtype):
        raise ValueError(
            f"--held-out must hold samples like those of --data, {list(example.shape[1:])} of "
            f"{example.dtype} (got {list(x.shape[1:])} of {x.dtype})"
        )
    return list(x.split(arguments.batch))


def _need_place(option: str, path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{option} must be a file (got the folder {path}); add a name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option}: there is no folder {path.parent}; make it first")


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"--onnx needs {error.name}, which is not installed; run `pip install onnx onnxscript`"
        ) from error


def export(model: fx.GraphModule, example: Tensor, path: Path) -> dict[str, float | None]:
    """Write a model as ONNX, of any batch size where it allows, and compare it with onnxruntime.

    Returns:
        ``max_abs`` and ``max_rel`` on the example; None where onnxruntime is not installed.

    Raises:
        ValueError: the file gives something else than the model; it is not written.
    """
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim.AUTO},),
        )
        expected = model(example)
    assert program is not None
    content = program.model_proto.SerializeToString()
    found: dict[str, float | None] = {"max_abs": None, "max_rel": None}
    try:
        import onnxruntime
    except ImportError:
        pass
    else:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        given = {session.get_inputs()[0].name: example.cpu().numpy()}
        got = [torch.from_numpy(array) for array in session.run(None, given)]
        max_abs, max_rel = difference(got, [tensor.cpu() for tensor in tree_leaves(expected)])
        limit = _ONNX_LIMIT.get(example.dtype, 2e-2)
        if not max_rel <= limit:
            raise ValueError(
                f"--onnx: onnxruntime differs from the folded model by {max_rel:.1e} relative "
                f"(limit {limit:.0e}), so {path} was not written"
            )
        found = {"max_abs": max_abs, "max_rel": max_rel}
    write_atomically(path, content)
    return found


def _exported_text(path: Path, exported: dict[str, float | None]) -> str:
    if exported["max_rel"] is None:
        return f"exported to {path}; install onnxruntime to have it compared"
    return f"exported to {path}: onnxruntime differs by {exported['max_rel']:.1e} relative"
