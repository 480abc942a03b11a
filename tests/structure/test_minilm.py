"""The plain-torch encoder against transformers' BertModel, whose weights it takes."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs transformers: `make structure` installs it")

import torch
import transformers
from torch import Tensor

from layer_collapse.models.encoder import Encoder, _our_name


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
        if (name := _our_name(key)) is not None:
            state[name] = value
    ours.load_state_dict(state)  # strict: no tensor is missing and none is left over
    ids = torch.randint(0, 50, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:], mask[2, 1:] = 0, 0
    with torch.no_grad():
        tokens = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.double() / mask.sum(1, keepdim=True)
        expected = (tokens * weight.unsqueeze(-1)).sum(1)
        got = ours.eval()(ids, mask.double())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
