"""A BERT encoder in plain modules, and MiniLM-L6 with its published weights."""

from __future__ import annotations

import math

from safetensors.torch import load_file
from torch import Tensor, nn

from .. import assets
from .options import activation_module

__all__ = ["Encoder", "minilm"]


class Attention(nn.Module):
    """Multi-head self-attention, post-norm. Tokens [N, T, D]; keys are masked by ``mask``."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``mask``: float [N, 1, 1, T], 0 where a token counts and -inf (or very low) elsewhere."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = self.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask)
        mixed = (self.dropout(weights) @ v).transpose(1, 2).flatten(2)
        out: Tensor = self.output(mixed)
        return out


class Block(nn.Module):
    """Post-norm transformer block: attention, then an MLP whose rectifier can be removed."""

    def __init__(
        self, width: int, hidden: int, heads: int, dropout: float, activation: str
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.fc1 = nn.Linear(width, hidden)
        self.act = activation_module(activation)
        self.fc2 = nn.Linear(hidden, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        out: Tensor = self.mlp_norm(x + self.dropout(self.fc2(self.act(self.fc1(x)))))
        return out


class Encoder(nn.Module):
    """BERT encoder with a classification head on the mean of the tokens.

    Args:
        classes: number of logits; 0 returns the mean of the tokens, [N, width].
        vocabulary: number of token ids.
        tokens: longest sequence.
        width, hidden, heads, blocks: sizes of the blocks.
        dropout: probability in training.
        activation: ``relu`` or ``gelu``.
    """

    def __init__(
        self,
        classes: int = 0,
        vocabulary: int = 30522,
        tokens: int = 512,
        width: int = 384,
        hidden: int = 1536,
        heads: int = 12,
        blocks: int = 6,
        dropout: float = 0.1,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(tokens, width)
        self.types = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, hidden, heads, dropout, activation) for _ in range(blocks)
        )
        self.head: nn.Module = nn.Linear(width, classes) if classes else nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode sentences.

        Args:
            input_ids: int64 [N, T], token ids.
            attention_mask: float [N, T], 1 for tokens and 0 for padding.

        Returns:
            float [N, classes], or [N, width] without a head.
        """
        mask = ((1.0 - attention_mask) * -1e9).unsqueeze(1).unsqueeze(1)
        positions = self.positions.weight[: input_ids.shape[1]]
        x = self.words(input_ids) + positions + self.types.weight[0]
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, mask)
        share = attention_mask / attention_mask.sum(dim=1, keepdim=True)
        out: Tensor = self.head((x * share.unsqueeze(-1)).sum(dim=1))
        return out


_NAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "types",
    "embeddings.LayerNorm": "norm",
}
_BLOCK_NAMES = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "mlp_norm",
}


def our_name(key: str) -> str | None:
    """The name in :class:`Encoder` of one of BertModel's tensors; None for what it has not."""
    path, _, tensor = key.rpartition(".")
    if path in _NAMES:
        return f"{_NAMES[path]}.{tensor}"
    if path.startswith("encoder.layer."):
        number, _, rest = path.removeprefix("encoder.layer.").partition(".")
        return f"blocks.{number}.{_BLOCK_NAMES[rest]}.{tensor}"
    return None  # position ids, and a pooler that the mean of the tokens does not need


def minilm(classes: int = 0, activation: str = "gelu") -> Encoder:
    """MiniLM-L6 (6 blocks of width 384) with the weights of all-MiniLM-L6-v2, downloaded once.

    Args:
        classes: size of a new, untrained head; 0 for none.
        activation: ``gelu`` as trained, or ``relu`` swapped in, to be fine-tuned.

    Raises:
        OSError: the weights cannot be downloaded.
    """
    model = Encoder(classes, activation=activation)
    theirs = load_file(assets.fetch("minilm") / "weights.safetensors")
    ours = {name: value for key, value in theirs.items() if (name := our_name(key)) is not None}
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("head.") for name in missing), missing
    return model.eval()
