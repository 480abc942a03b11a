"""The certifying scan: integer counts over a whole data set, in evaluation mode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..graph import ExampleInputs, training_mode
from ..ranks import Group, gathered
from ..sharding import full, reshard
from .ranks import check_equal_weights
from .report import EntropyReport
from .tracker import track

Batch = Any
#: Outputs that differ by less than this, relative to the largest, are equal up to float rounding.
_EQUAL_OUTPUTS = 1e-6


def fingerprint(model: nn.Module) -> str:
    """Hash of every parameter and buffer: name, dtype, shape and bits.

    A scan's report carries it, so that zero entropy certified for one set of weights is never used
    on another. Buffers that ``state_dict`` leaves out count too: outputs depend on them. Parameters
    that are spread over processes are gathered one at a time, on all of them.
    """
    reshard(model)
    digest = hashlib.blake2b(digest_size=16)
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = full(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


def call_model(model: nn.Module, batch: Batch, device: torch.device) -> Any:
    """Run a model on a batch: a tensor, (inputs, targets, ...) or a mapping of arguments."""

    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{key: there(value) for key, value in batch.items() if key != "labels"})
    if isinstance(batch, tuple | list):
        return model(there(batch[0]))
    return model(there(batch))


def logits_of(output: Any) -> Tensor:
    """The tensor of a model's output: itself, ``output.logits`` or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"expected the model to return a tensor, or something with .logits (got "
        f"{type(output).__name__}); wrap it in a module that returns the logits"
    )


class _SameOutput:
    """Whether every sample gets the same logits."""

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.samples = 0
        self.same = True

    def see(self, logits: Tensor) -> None:
        logits = logits.detach().flatten(1).double() if logits.dim() > 1 else logits.double()
        self.samples += len(logits)
        if not self.same or logits.numel() == 0:
            return
        if self.first is None:
            self.first = logits[0].clone()
        if self.first.shape != logits.shape[1:]:  # padded to another length: it did look at it
            self.same = False
            return
        scale = max(float(self.first.abs().max()), 1e-30)
        self.same = float((logits - self.first).abs().max()) <= _EQUAL_OUTPUTS * scale

    def join(self, device: torch.device, group: Group) -> None:
        """Take in what the other processes saw."""
        own = self.first if self.first is not None else torch.empty(0, dtype=torch.float64)
        facts = torch.tensor([self.samples, self.same, len(own)], device=device)
        samples, same, lengths = torch.stack(gathered(facts, group)).unbind(1)
        longest = int(lengths.max())
        self.samples = int(samples.sum())
        self.same = bool(same.all()) and bool(((lengths == longest) | (lengths == 0)).all())
        if not self.same or longest == 0:
            return
        padded = torch.zeros(longest, dtype=torch.float64, device=device)
        padded[: len(own)] = own
        firsts = torch.stack(gathered(padded, group))[lengths > 0]
        scale = max(float(firsts[0].abs().max()), 1e-30)
        self.same = float((firsts - firsts[0]).abs().max()) <= _EQUAL_OUTPUTS * scale


def scan(
    model: nn.Module,
    batches: Iterable[Batch],
    example_inputs: ExampleInputs = None,
    *,
    forward: Callable[[nn.Module, Batch], Any] | None = None,
    ignore: tuple[str, ...] | list[str] = (),
    progress: Callable[[Iterable[Batch]], Iterable[Batch]] | None = None,
    group: Group = None,
) -> EntropyReport:
    """Measure a model on a whole data set and certify which rectifiers have zero entropy.

    The model runs in evaluation mode without gradients and is left as it was. The report carries
    the fingerprint of its parameters and buffers, and whether the network is ``cut``: more than one
    sample, and equal logits for all of them.

    Args:
        model: any model that :func:`layer_collapse.track` takes, not tracked already.
        batches: of tensors, (inputs, targets) pairs or mappings of keyword arguments; the whole
            training split for a certificate that means something.
        example_inputs: as for :func:`layer_collapse.track`.
        forward: calls the model on a batch and returns its logits, where the default cannot.
        ignore: rectifiers to leave out.
        progress: wraps the iterable, e.g. a progress bar.
        group: processes that scan a part of the data each, e.g. ``torch.distributed.group.WORLD``;
            all get the report on all of the data. A part may be empty; a model under
            ``fully_shard`` needs equally many batches on all processes.

    Raises:
        ValueError: no batch, or no sample in any of them.
        RuntimeError: the weights changed during the scan, or differ between processes.
    """
    before = fingerprint(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if group is not None:
        check_equal_weights(before, device, group)
    outputs = _SameOutput()
    with (
        track(model, example_inputs, ignore=ignore) as tracker,
        training_mode(model, False),
        torch.no_grad(),
    ):
        for batch in progress(batches) if progress else batches:
            result = forward(model, batch) if forward else call_model(model, batch, device)
            outputs.see(logits_of(result))
        report = tracker.entropy(group)
    if group is not None:
        outputs.join(device, group)
    if outputs.samples == 0:
        raise ValueError("the data to scan hold no sample; pass at least one batch")
    if fingerprint(model) != before:
        raise RuntimeError("the weights or buffers changed during the scan; scan an idle model")
    same = outputs.same and outputs.samples > 1
    return replace(
        report,
        cut=report.cut or same,
        cut_by=report.cut_by or (f"all {outputs.samples} samples get equal logits" if same else ""),
        certified=True,
        fingerprint=before,
        samples=outputs.samples,
    )
