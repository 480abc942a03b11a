"""Image data for the experiments: fixed splits in memory, no downloads.

The splits are part of the benchmark, so they are the same in every run: one constant seed cuts
them, and pixels are scaled by statistics of the whole training split. The caller's ``seed`` only
picks which training images ``train_samples`` keeps; validation and test never depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from layer_collapse.idx import Labels, Pixels, find_fashion_mnist, read_pair

__all__ = ["FASHION_MNIST_ROOT", "NAMES", "Batches", "Dataset", "Split", "batches", "load"]

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts its idx files."""

_SPLIT_SEED = 20240416  # constant: every run and every version compares on the same images
_DIGITS_TEST, _DIGITS_VALIDATION = 500, 200
_VALIDATION_PART = 12  # Fashion-MNIST holds out 1/12 of its training images: 5,000 of 60,000

Part = tuple[Pixels, Labels]  # images that belong to one split, not scaled yet
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        x: float32 [N, *input_shape].
        y: int64 [N], classes from 0.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(
                f"Split: expected as many labels as images (got {len(self.x)} images and "
                f"{len(self.y)} labels)"
            )

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Dataset:
    """A data set cut into disjoint splits, standardised by its training statistics."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    input_shape: tuple[int, ...]  # of one sample: (channels, height, width)
    source: str  # where the data came from, in words


def load(
    name: str, root: Path | None = None, *, seed: int = 0, train_samples: int | None = None
) -> Dataset:
    """Load a data set by name.

    Args:
        name: ``digits`` (1,797 images [1, 8, 8] inside scikit-learn: 1,097 train, 200 validation,
            500 test) or ``fashion-mnist`` ([1, 28, 28]: 55,000 train, 5,000 validation, the
            official 10,000 test).
        root: folder of the Fashion-MNIST idx files (raw or .gz), or one that holds torchvision's
            ``FashionMNIST/raw``; default :data:`FASHION_MNIST_ROOT`. Unused by ``digits``.
        seed: picks the training images that ``train_samples`` keeps, nothing else.
        train_samples: size of a stratified subset of the training split; None keeps all.

    Returns:
        The data set; pixels have zero mean and unit deviation over the whole training split.

    Raises:
        ValueError: unknown name, bad ``seed`` or ``train_samples``, or a malformed file.
        FileNotFoundError: the Fashion-MNIST files are not there.
        OSError: a file cannot be read.
        ImportError: ``digits`` without scikit-learn.
    """
    if name not in _LOADERS:
        raise ValueError(f"data: expected one of {', '.join(NAMES)} (got {name!r})")
    if not 0 <= seed < 2**32:
        raise ValueError(f"data: expected a seed from 0 to 2**32 - 1 (got {seed})")
    return _LOADERS[name](root, seed, train_samples)


def _load_digits(_: Path | None, seed: int, train_samples: int | None) -> Dataset:
    try:
        from sklearn.datasets import (  # type: ignore[import-untyped, unused-ignore]
            load_digits,
        )
    except ImportError as error:
        raise ImportError(
            "data: the digits come with scikit-learn, which is not installed; "
            "run `pip install scikit-learn`"
        ) from error
    raw: Any = load_digits()
    whole = (raw.images.astype(np.uint8), raw.target.astype(np.int64))  # pixels from 0 to 16
    test, rest = _hold_out(whole, _DIGITS_TEST)
    validation, train = _hold_out(rest, _DIGITS_VALIDATION)
    source = "scikit-learn, sklearn.datasets.load_digits"
    return _assemble("digits", source, (train, validation, test), seed, train_samples)


def _load_fashion_mnist(root: Path | None, seed: int, train_samples: int | None) -> Dataset:
    paths = find_fashion_mnist(Path(root) if root is not None else FASHION_MNIST_ROOT)
    official = read_pair(paths["train-images-idx3-ubyte"], paths["train-labels-idx1-ubyte"])
    test = read_pair(paths["t10k-images-idx3-ubyte"], paths["t10k-labels-idx1-ubyte"])
    count = len(official[1])
    if count < _VALIDATION_PART:
        raise ValueError(
            f"data: expected at least {_VALIDATION_PART} training images in "
            f"{paths['train-images-idx3-ubyte']} (got {count})"
        )
    validation, train = _hold_out(official, count // _VALIDATION_PART)
    source = str(paths["train-images-idx3-ubyte"].parent)
    return _assemble("fashion-mnist", source, (train, validation, test), seed, train_samples)


_LOADERS: dict[str, Callable[[Path | None, int, int | None], Dataset]] = {
    "digits": _load_digits,
    "fashion-mnist": _load_fashion_mnist,
}
NAMES = tuple(_LOADERS)


def _assemble(
    name: str, source: str, parts: tuple[Part, Part, Part], seed: int, train_samples: int | None
) -> Dataset:
    """Standardise (train, validation, test) by the whole of train, then take the subset of it."""
    train, validation, test = parts
    mean, deviation = _pixel_statistics(train[0])
    if deviation == 0.0:
        raise ValueError(f"data: expected images that differ (all pixels of {source} are equal)")
    if train_samples is not None:
        x, y = train
        if not 1 <= train_samples <= len(y):
            raise ValueError(
                f"data: expected train_samples from 1 to {len(y)} for {name} (got {train_samples})"
            )
        keep, _ = _stratified(y, train_samples, seed)
        train = (x[keep], y[keep])

    def split(part: Part) -> Split:
        x = torch.from_numpy(part[0]).unsqueeze(1).to(torch.float32)
        return Split(x.sub_(mean).div_(deviation), torch.from_numpy(part[1]))

    return Dataset(
        name=name,
        train=split(train),
        validation=split(validation),
        test=split(test),
        classes=10,
        input_shape=(1, *train[0].shape[1:]),
        source=source,
    )


def _hold_out(part: Part, count: int) -> tuple[Part, Part]:
    """Cut off ``count`` samples by the constant seed: (held out, the rest)."""
    x, y = part
    held, rest = _stratified(y, count, _SPLIT_SEED)
    return (x[held], y[held]), (x[rest], y[rest])


def _pixel_statistics(x: Pixels) -> tuple[float, float]:
    """Mean and standard deviation of all pixels, from integer counts.

    Integers make them equal to the last bit for any number of threads.
    """
    histogram = np.zeros(256, dtype=np.int64)
    for start in range(0, len(x), 4096):  # in blocks: bincount widens its input to int64
        histogram += np.bincount(x[start : start + 4096].ravel(), minlength=256)
    counts = [int(count) for count in histogram]
    total = sum(counts)
    first = sum(value * count for value, count in enumerate(counts))
    second = sum(value * value * count for value, count in enumerate(counts))
    return first / total, math.sqrt(second * total - first * first) / total


def _stratified(y: Labels, count: int, seed: int) -> tuple[Indices, Indices]:
    """Choose ``count`` of ``y`` with its class proportions (largest remainders, ties by class).

    Returns:
        The chosen indices and the others, both in shuffled order.
    """
    # RandomState's stream is frozen by NumPy for good; that of default_rng may change.
    order = np.random.RandomState(seed).permutation(len(y))
    sizes = [int(size) for size in np.bincount(y)]
    quotas = [count * size // len(y) for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda c: -(count * sizes[c] % len(y)))
    for c in by_remainder[: count - sum(quotas)]:
        quotas[c] += 1
    chosen = np.zeros(len(y), dtype=bool)
    for c, quota in enumerate(quotas):
        chosen[order[y[order] == c][:quota]] = True
    return order[chosen[order]], order[~chosen[order]]


def batches(
    split: Split, size: int, *, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk over a split once in batches; the last one may be shorter.

    Args:
        split: what to walk over.
        size: samples a batch, at least 1.
        generator: shuffles the samples; None keeps their order.

    Returns:
        An iterator of (x float32 [B, *input_shape], y int64 [B]).

    Raises:
        ValueError: empty split or ``size`` below 1, at the call and not at the first batch.
    """
    if size < 1:
        raise ValueError(f"batches: expected a batch size of at least 1 (got {size})")
    if not len(split):
        raise ValueError("batches: expected at least one sample (got an empty split)")
    if generator is None:
        return zip(split.x.split(size), split.y.split(size), strict=True)
    order = torch.randperm(len(split), generator=generator, device=generator.device)
    parts = order.to(split.x.device).split(size)
    return ((split.x[part], split.y[part]) for part in parts)


class Batches:
    """The batches of a split in fixed order, as often as one likes: for measuring.

    Args:
        split: what to walk over, not empty.
        size: samples a batch, at least 1; the last batch may be shorter.

    Raises:
        ValueError: as :func:`batches`.
    """

    def __init__(self, split: Split, size: int) -> None:
        batches(split, size)  # refuses bad arguments here, not in the middle of a run
        self.split = split
        self.size = size

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(self.split, self.size)
