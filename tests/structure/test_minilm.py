"""The plain-torch encoder against transformers' BertModel, whose weights it takes."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs transformers: `make structure` installs it")

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from layer_collapse.assets import fetch
from layer_collapse.models.encoder import Encoder, minilm, our_name
from layer_collapse.text import tokenize


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_equals_bert_model_on_random_weights(activation: str) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=20, hidden_act=activation,
    )  # fmt: skip
    theirs = transformers.BertModel(config).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases too, which begin at zero
    ours = Encoder(
        vocabulary=50, tokens=20, width=32, hidden=64, heads=4, blocks=3, activation=activation
    ).double()
    state: dict[str, Tensor] = {}
    for key, value in theirs.state_dict().items():
        if (name := our_name(key)) is not None:
            state[name] = value
    ours.load_state_dict(state)  # strict: no tensor is missing and none is left over
    ids = torch.randint(0, 50, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:], mask[2, 1:] = 0, 0
    assert_equal(theirs, ours, ids, mask)


@pytest.mark.slow  # it downloads 83 MB, once
def test_equals_bert_model_on_the_fetched_weights() -> None:
    """all-MiniLM-L6-v2 as this package serves it, in transformers' own model."""
    pytest.importorskip("tokenizers")
    folder = fetch("minilm")
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=512, hidden_act="gelu",
    )  # fmt: skip
    theirs = transformers.BertModel(config, add_pooling_layer=False)
    weights = load_file(folder / "weights.safetensors")
    left = theirs.load_state_dict(weights, strict=False)
    assert not left.missing_keys
    assert all("pooler" in key or "position_ids" in key for key in left.unexpected_keys)
    texts = ["a man is eating food", "somebody eats a meal, slowly and with pleasure", "stocks"]
    ids, mask = tokenize(texts, folder / "tokenizer.json", 16)
    assert mask.sum(1).unique().numel() == 3  # padding of every length takes part
    assert_equal(theirs.double().eval(), minilm().double(), ids, mask.long())


def assert_equal(theirs: nn.Module, ours: nn.Module, ids: Tensor, mask: Tensor) -> None:
    """Mean of the last hidden state over the tokens that count, in float64."""
    with torch.no_grad():
        tokens = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.double() / mask.sum(1, keepdim=True)
        expected = (tokens * weight.unsqueeze(-1)).sum(1)
        got = ours.eval()(ids, mask.double())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
