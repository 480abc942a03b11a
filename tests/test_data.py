"""The loaders read what is there, refuse what is not, and cut the same splits every time."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from layer_collapse import data

STEMS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "t10k": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
TRAIN, TEST = 240, 30


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def contents() -> dict[str, bytes]:
    """Idx files in which the first two pixels of an image are its number."""
    made = {}
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        images = np.random.RandomState(count).randint(0, 256, (count, 28, 28))
        images[:, 0, 0], images[:, 0, 1] = np.arange(count) // 256, np.arange(count) % 256
        made[STEMS[part][0]] = idx(images)
        made[STEMS[part][1]] = idx(np.arange(count) % 10)
    return made


def write(folder: Path, made: dict[str, bytes], zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


def numbers(made: dict[str, bytes], dataset: data.Dataset, split: data.Split) -> list[int]:
    """Which images of the file a split holds, undoing the scaling."""
    raw = np.frombuffer(made[STEMS["train"][0]], np.uint8, offset=16).reshape(-1, 784)
    train = dataset.train.x.double()
    assert abs(float(train.mean())) < 1e-5
    assert abs(float(train.std(correction=0)) - 1) < 1e-5
    pixels = split.x.flatten(1).double()
    # The scaling is affine: recover it from any image's darkest and brightest pixel.
    low, high = float(pixels.min()), float(pixels.max())
    scaled = ((pixels - low) / (high - low) * 255).round().to(torch.uint8).numpy()
    found = [int(row[0]) * 256 + int(row[1]) for row in scaled]
    assert all((raw[i] == row).all() for i, row in zip(found, scaled, strict=True))
    return found


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_reads_both_layouts(tmp_path: Path, zipped: bool, below: str) -> None:
    made = contents()
    write(tmp_path / below, made, zipped)
    d = data.load("fashion-mnist", tmp_path)
    assert (len(d.train), len(d.validation), len(d.test)) == (220, 20, TEST)
    assert (d.name, d.classes, d.input_shape) == ("fashion-mnist", 10, (1, 28, 28))
    assert d.source == str(tmp_path / below)
    for split in (d.train, d.validation, d.test):
        assert split.x.dtype == torch.float32
        assert split.y.dtype == torch.int64
        assert split.x.shape == (len(split), 1, 28, 28)
    train, validation = numbers(made, d, d.train), numbers(made, d, d.validation)
    assert sorted(train + validation) == list(range(TRAIN))  # disjoint and complete
    assert d.train.y.tolist() == [i % 10 for i in train]  # labels stay with their images
    assert d.validation.y.tolist() == [i % 10 for i in validation]
    assert d.validation.y.bincount().tolist() == [2] * 10
    assert d.test.y.tolist() == [i % 10 for i in range(TEST)]  # official order


def spoil(name: str, change: Callable[[bytes], bytes]) -> Callable[[dict[str, bytes]], None]:
    def apply(made: dict[str, bytes]) -> None:
        made[name] = change(made[name])

    return apply


IMAGES, LABELS = STEMS["train"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil(IMAGES, lambda b: b[:-1]), "expected 188160 bytes of data .*got 188159"),
        (spoil(IMAGES, lambda b: b + b"\0"), "expected 188160 bytes of data .*got 188161"),
        (spoil(IMAGES, lambda b: b[:9]), "16 bytes of header .* and 9 bytes"),
        (spoil(IMAGES, lambda _: b""), "magic 0x00000803 .* and 0 bytes"),
        (spoil(IMAGES, lambda b: b"\0\0\x0d\x03" + b[4:]), "magic 0x00000803 .* 0x00000d03"),
        (spoil(LABELS, lambda b: b"\0\0\x08\x03" + b[4:]), "magic 0x00000801 .* 0x00000803"),
        (spoil(LABELS, lambda _: idx(np.zeros(9))), "240 images .* and 9 labels"),
        (spoil(LABELS, lambda b: b[:-1] + b"\x0a"), r"labels from 0 to 9 .* \(got 10\)"),
        (spoil(IMAGES, lambda _: idx(np.zeros((240, 8, 8)))), r"28 x 28 .* \(got \(8, 8\)\)"),
        (spoil(IMAGES, lambda _: idx(np.ones((240, 28, 28)))), "images that differ"),
        (
            lambda made: made.update(
                {IMAGES: idx(np.zeros((5, 28, 28))), LABELS: idx(np.zeros(5))}
            ),
            "at least 12 training images",
        ),
        (
            lambda made: made.update(
                {IMAGES: idx(np.zeros((0, 28, 28))), LABELS: idx(np.zeros(0))}
            ),
            "at least one",
        ),
    ],
)
def test_refuses_bad_files(
    tmp_path: Path, change: Callable[[dict[str, bytes]], None], message: str
) -> None:
    made = contents()
    change(made)
    write(tmp_path, made)
    with pytest.raises(ValueError, match=message) as caught:
        data.load("fashion-mnist", tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_refuses_a_gzip_cut_short_or_no_gzip(tmp_path: Path) -> None:
    write(tmp_path, contents(), zipped=True)
    path = tmp_path / f"{IMAGES}.gz"
    for content in (path.read_bytes()[:-20], b"no gzip at all", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz"):
            data.load("fashion-mnist", tmp_path)


def test_missing_folder_and_file_name_the_way_out(tmp_path: Path) -> None:
    way_out = "apt-get install dataset-fashion-mnist.*--data-root"
    with pytest.raises(FileNotFoundError, match=f"no such folder; .*{way_out}"):
        data.load("fashion-mnist", tmp_path / "nowhere")
    made = contents()
    del made[LABELS]
    write(tmp_path / "FashionMNIST" / "raw", made)
    with pytest.raises(FileNotFoundError, match=f"FashionMNIST/raw/{LABELS} .*{way_out}") as caught:
        data.load("fashion-mnist", tmp_path)
    assert IMAGES not in str(caught.value)  # only what is missing


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, contents())

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(OSError, match=r"data: cannot read .*: Permission denied"):
        data.load("fashion-mnist", tmp_path)


def test_the_packaged_fashion_mnist() -> None:
    if not data.FASHION_MNIST_ROOT.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    d = data.load("fashion-mnist", train_samples=1000)
    assert (len(d.train), len(d.validation), len(d.test)) == (1000, 5000, 10000)
    assert d.train.y.bincount().tolist() == [100] * 10
    assert d.validation.y.bincount().tolist() == [500] * 10
    assert d.test.y.bincount().tolist() == [1000] * 10
    assert d.test.y[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]


def test_digits_splits_are_fixed_disjoint_and_stratified() -> None:
    a, b = data.load("digits", seed=0), data.load("digits", seed=7)
    sizes = (len(a.train), len(a.validation), len(a.test))
    assert sizes == (1097, 200, 500)
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(a, name).x, getattr(b, name).x)
        assert torch.equal(getattr(a, name).y, getattr(b, name).y)
    whole = torch.cat([a.train.y, a.validation.y, a.test.y]).bincount().double() / 1797
    for split in (a.train, a.validation, a.test):
        # Largest remainders: no class is off by a sample or more per cut, of which there are two.
        assert float((split.y.bincount() - whole * len(split)).abs().max()) < 2
    from sklearn.datasets import load_digits

    raw = torch.from_numpy(load_digits().images).flatten(1).double()
    used = torch.cat([a.train.x, a.validation.x, a.test.x]).flatten(1).double()
    step = (used.max() - used.min()) / 16
    images = ((used - used.min()) / step).round()
    assert sorted(map(tuple, images.tolist())) == sorted(map(tuple, raw.tolist()))
    assert abs(float(a.train.x.mean())) < 1e-5
    assert abs(float(a.train.x.std(correction=0)) - 1) < 1e-5


def test_train_samples_depend_on_the_seed_and_nothing_else_does() -> None:
    a, b, again = (data.load("digits", seed=s, train_samples=100) for s in (0, 1, 0))
    assert len(a.train) == len(b.train) == 100
    assert torch.equal(a.train.x, again.train.x)
    assert not torch.equal(a.train.x, b.train.x)
    assert torch.equal(a.test.x, b.test.x)
    assert torch.equal(a.test.x, data.load("digits").test.x)  # same scaling, too
    assert set(a.train.y.bincount().tolist()) <= {9, 10, 11}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnist"}, r"expected one of digits, fashion-mnist \(got 'mnist'\)"),
        ({"name": "digits", "seed": -1}, r"expected a seed .* \(got -1\)"),
        ({"name": "digits", "train_samples": 0}, r"from 1 to 1097 .* \(got 0\)"),
        ({"name": "digits", "train_samples": 1098}, r"from 1 to 1097 .* \(got 1098\)"),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)  # type: ignore[arg-type]


def split_of(count: int) -> data.Split:
    return data.Split(torch.arange(count, dtype=torch.float32).reshape(-1, 1), torch.arange(count))


@pytest.mark.parametrize("size", [1, 3, 10, 11])
def test_batches_cover_every_sample_once(size: int) -> None:
    split = split_of(10)
    for generator in (None, torch.Generator().manual_seed(0)):
        parts = list(data.batches(split, size, generator=generator))
        assert all(len(x) == len(y) == size for x, y in parts[:-1])
        assert all(torch.equal(x.flatten().long(), y) for x, y in parts)
        labels = torch.cat([y for _, y in parts]).tolist()
        assert sorted(labels) == list(range(10))
        assert (labels == list(range(10))) == (generator is None)


def test_shuffling_follows_the_generator() -> None:
    split, g = split_of(50), torch.Generator()
    orders = []
    for seed in (1, 1, 2):
        g.manual_seed(seed)
        orders.append(torch.cat([y for _, y in data.batches(split, 7, generator=g)]).tolist())
    assert orders[0] == orders[1] != orders[2]
    assert orders[2] != torch.cat([y for _, y in data.batches(split, 7, generator=g)]).tolist()


def test_batches_object_is_re_iterable() -> None:
    held = data.Batches(split_of(10), 4)
    assert len(held) == len(list(held)) == 3
    first, second = ([y.tolist() for _, y in held] for _ in range(2))
    assert first == second == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("make", [data.batches, data.Batches])
def test_batches_refuse_at_once(make: Callable[[data.Split, int], object]) -> None:
    with pytest.raises(ValueError, match="empty split"):
        make(split_of(0), 4)
    with pytest.raises(ValueError, match="batch size of at least 1"):
        make(split_of(3), 0)


def test_a_split_needs_one_label_per_image() -> None:
    with pytest.raises(ValueError, match="3 images and 2 labels"):
        data.Split(torch.zeros(3, 1), torch.zeros(2, dtype=torch.int64))
