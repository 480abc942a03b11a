"""State of optimisers goes with the parameters that folding left alone, and with no others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layer_collapse import MaskedAdamW, MaskedSGD, Masks, fold, transfer_optimizer_state
from layer_collapse.reduce.gate import AffineGate

MAKERS = {
    "sgd": lambda p, m: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p, m: torch.optim.Adam(p, 0.1, amsgrad=True),
    "adamw": lambda p, m: torch.optim.AdamW(p, 0.1),
    "rmsprop": lambda p, m: torch.optim.RMSprop(p, 0.1, momentum=0.9),
    "masked sgd": lambda p, m: MaskedSGD(p, 0.1, momentum=0.9, masks=m),
    "masked adamw": lambda p, m: MaskedAdamW(p, 0.1, masks=m),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    gate = AffineGate(torch.ones(6), torch.zeros(6))
    return nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), gate, nn.Linear(6, 5), nn.ReLU(),
        nn.Linear(5, 3),
    )  # fmt: skip


def optimizer(kind: str, model: nn.Module):  # type: ignore[no-untyped-def]
    return MAKERS[kind](list(model.parameters()), Masks(dict(model.named_parameters())))


def train(model: nn.Module, by: torch.optim.Optimizer, steps: int = 3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        by.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        by.step()


@pytest.mark.parametrize("kind", MAKERS)
def test_survivors_keep_their_state_and_step_on_alike(kind: str) -> None:
    model = network()
    before = optimizer(kind, model)
    train(model, before)
    folded = fold(model, torch.randn(2, 4)).model
    after = optimizer(kind, folded)
    result = transfer_optimizer_state(before, model, folded, after)
    assert result.carried == ("0.weight", "0.bias", "6.weight", "6.bias")
    assert result.fresh == {
        "4.weight": "its shape was [5, 6] and is [5, 5]",
        "4.bias": "its values changed",
    }
    assert result.gone == ("2.weight", "2.bias")
    ours, theirs = dict(folded.named_parameters()), dict(model.named_parameters())
    for name in result.carried:
        mine, state = after.state[ours[name]], before.state[theirs[name]]
        assert mine.keys() == state.keys()
        assert state
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(value))
            shared = isinstance(value, torch.Tensor) and value.data_ptr() == mine[key].data_ptr()
            assert not shared
    for name in result.fresh:
        assert all(not v.any() for v in after.state[ours[name]].values())
    # One more step from the same gradients moves survivors alike, bit by bit.
    for name in result.carried:
        gradient = torch.randn_like(ours[name])
        ours[name].grad, theirs[name].grad = gradient, gradient.clone()
    for name in set(theirs) - set(result.carried):
        theirs[name].grad = None
    before.step()
    after.step()
    for name in result.carried:
        assert torch.equal(ours[name], theirs[name]), name


def test_from_torchs_own_to_ours_the_new_masks_hold() -> None:
    model = network()
    before = torch.optim.AdamW(model.parameters(), 0.1)
    train(model, before)
    with torch.no_grad():
        model[6].weight[1] = 0
    folded = fold(model, torch.randn(2, 4)).model
    weight = folded.get_submodule("6").weight
    masks = Masks(dict(folded.named_parameters()))
    masks.prune_where_("6.weight", weight == 0)
    after = MaskedAdamW(folded.parameters(), 0.1, masks=masks)
    result = transfer_optimizer_state(before, model, folded, after)
    assert "6.weight" in result.carried
    assert torch.equal(masks.bool_mask("6.weight"), weight != 0)
    old, new = before.state[model[6].weight]["exp_avg"], after.state[weight]["exp_avg"]
    assert old[1].any()
    assert not new[1].any()
    assert torch.equal(new[[0, 2]], old[[0, 2]])


def test_before_the_first_step_nothing_is_carried() -> None:
    model = network()
    folded = fold(model, torch.randn(2, 4)).model
    result = transfer_optimizer_state(
        optimizer("sgd", model), model, folded, optimizer("sgd", folded)
    )
    assert result.carried == ()
    assert result.fresh["0.weight"] == "it had none"


def test_a_parameter_trained_since_is_another() -> None:
    model = network()
    before = optimizer("adam", model)
    train(model, before)
    folded = fold(model, torch.randn(2, 4)).model
    with torch.no_grad():
        folded.get_submodule("0").bias[0] += 1
    after = optimizer("adam", folded)
    result = transfer_optimizer_state(before, model, folded.to(torch.float32), after)
    assert result.fresh["0.bias"] == "its values changed"
    half = copy.deepcopy(folded).half()
    with pytest.raises(TypeError, match="of one kind"):
        transfer_optimizer_state(before, model, half, optimizer("sgd", half))
    result = transfer_optimizer_state(before, model, half, optimizer("adam", half))
    assert result.fresh["6.bias"] == "its dtype was torch.float32 and is torch.float16"


def test_user_errors_change_nothing() -> None:
    model = network()
    before = optimizer("adam", model)
    train(model, before)
    folded = fold(model, torch.randn(2, 4)).model
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match="history spans all"):
        transfer_optimizer_state(lbfgs, model, folded, torch.optim.LBFGS(folded.parameters()))
    with pytest.raises(ValueError, match="got none of them"):
        transfer_optimizer_state(before, model, folded, optimizer("adam", network()))


def test_a_copy_of_the_trained_model_is_refused() -> None:
    model = network()
    before = optimizer("adam", model)
    train(model, before)
    folded = fold(model, torch.randn(2, 4)).model
    after = optimizer("adam", folded)
    with pytest.raises(ValueError, match="expected model_before to be the model that optimizer_be"):
        transfer_optimizer_state(before, copy.deepcopy(model), folded, after)
    assert not after.state
