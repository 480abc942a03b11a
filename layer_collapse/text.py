"""Sentences for the NLP experiments: read, tokenised to one length, with the padding marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import assets

__all__ = ["Sentences", "movie_snippets", "tokenize", "trec_questions"]


@dataclass(frozen=True)
class Sentences:
    """Tokenised sentences with their labels.

    Attributes:
        ids: int64 [N, T], token ids.
        mask: float32 [N, T], 1 for tokens and 0 for padding.
        y: int64 [N], classes from 0.
    """

    ids: Tensor
    mask: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Keyword arguments for :class:`layer_collapse.models.encoder.Encoder`, in order."""
        parts = zip(self.ids.split(size), self.mask.split(size), strict=True)
        return [{"input_ids": ids, "attention_mask": mask} for ids, mask in parts]


def tokenize(texts: Sequence[str], tokenizer: Path, tokens: int) -> tuple[Tensor, Tensor]:
    """Word pieces of every text, cut or padded to ``tokens``.

    Args:
        tokenizer: a tokenizer.json.

    Returns:
        ids int64 [N, tokens] and mask float32 [N, tokens].

    Raises:
        ImportError: the package ``tokenizers`` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("text: run `pip install tokenizers` to read sentences") from error
    reader: Any = Tokenizer.from_file(str(tokenizer))
    reader.enable_truncation(tokens)
    reader.enable_padding(length=tokens)
    pieces = reader.encode_batch(list(texts))
    ids = torch.from_numpy(np.array([p.ids for p in pieces], dtype=np.int64))
    mask = torch.from_numpy(np.array([p.attention_mask for p in pieces], dtype=np.float32))
    return ids, mask


def movie_snippets(tokens: int = 32, cache: Path | None = None) -> Sentences:
    """Snippets of film reviews, negative (0) or positive (1), from vaderSentiment's ground truth.

    Each comes with the mean valence that people gave it, -4 to 4; those between -1 and 1 are left
    out.

    Args:
        tokens: length to which MiniLM's word pieces are cut or padded.
        cache: as for :func:`layer_collapse.assets.fetch`.

    Raises:
        OSError: the data or the tokenizer cannot be downloaded.
        ImportError: the package ``tokenizers`` is not installed.
    """
    lines = (assets.fetch("movie-snippets", cache) / "snippets.tsv").read_bytes()
    texts, labels = [], []
    for line in lines.decode("utf-8", errors="replace").splitlines():
        fields = line.split("\t", 2)
        try:
            valence = float(fields[1])
        except (IndexError, ValueError):
            continue  # a few rows have no valence
        if len(fields) == 3 and abs(valence) >= 1:
            texts.append(fields[2].strip())
            labels.append(int(valence > 0))
    ids, mask = tokenize(texts, assets.fetch("minilm", cache) / "tokenizer.json", tokens)
    return Sentences(ids, mask, torch.tensor(labels))


def trec_questions(tokens: int = 32, cache: Path | None = None) -> Sentences:
    """TREC's questions by the kind of answer that they ask for, six classes in alphabetical order.

    ABBR, DESC, ENTY, HUM, LOC, NUM. Every question comes once: repeated ones are left out.

    Args:
        tokens: length to which MiniLM's word pieces are cut or padded.
        cache: as for :func:`layer_collapse.assets.fetch`.

    Raises:
        OSError: the data or the tokenizer cannot be downloaded.
        ImportError: the package ``tokenizers`` is not installed.
    """
    content = (assets.fetch("trec-questions", cache) / "questions.txt").read_bytes()
    kinds: dict[str, str] = {}
    for line in content.decode("utf-8", errors="replace").splitlines():
        label, _, question = line.strip().partition(" ")
        kind, colon, _ = label.partition(":")
        if colon and question:
            kinds.setdefault(question, kind)
    names = sorted(set(kinds.values()))
    ids, mask = tokenize(list(kinds), assets.fetch("minilm", cache) / "tokenizer.json", tokens)
    return Sentences(ids, mask, torch.tensor([names.index(kind) for kind in kinds.values()]))
