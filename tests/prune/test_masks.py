"""The bits of a model's weights."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from layer_collapse.prune.masks import Masks


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5))


def weights(module):
    return {name: p for name, p in module.named_parameters() if p.dim() > 1}


@pytest.fixture
def net():
    return model()


@pytest.fixture
def masks(net):
    return Masks(weights(net))


def test_starts_dense(net, masks):
    assert masks.names == ("0.weight", "2.weight")
    assert masks.is_dense
    assert masks.sparsity() == 0.0
    assert masks.alive("2.weight") == 40
    assert masks.words("2.weight").tolist() == [-1, 255]
    assert masks.bool_mask("0.weight").shape == net[0].weight.shape
    assert masks.bool_mask("0.weight").all()


def test_one_bit_per_weight():
    masks = Masks({"w": nn.Parameter(torch.zeros(1000, 1000))})
    words = masks.words("w")
    assert words.numel() * words.element_size() == 1000 * 1000 / 8


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_prune_exactly_the_smallest(layout):
    net = model().to(memory_format=layout)
    masks = Masks(weights(net))
    weight = net[0].weight
    threshold = weight.detach().abs().flatten().sort().values[100]
    expected = weight.detach().abs() >= threshold
    bias = net[0].bias.detach().clone()
    version = masks.version
    masks.prune_({"0.weight": 100})
    assert torch.equal(masks.bool_mask("0.weight"), expected)
    assert torch.equal(weight != 0, expected)
    assert torch.equal(net[0].bias, bias)
    assert masks.alive("0.weight") == weight.numel() - 100
    assert masks.alive("2.weight") == 40
    assert masks.sparsity() == pytest.approx(100 / 256)
    assert masks.sparsity(["2.weight"]) == 0.0
    assert not masks.is_dense
    assert masks.version > version
    masks.check_()


def test_layout_may_change_afterwards(net, masks):
    masks.prune_({"0.weight": 100})
    expected = masks.bool_mask("0.weight")
    net.to(memory_format=torch.channels_last)
    with torch.no_grad():
        net[0].weight.fill_(1)
    masks.apply_()
    assert torch.equal(net[0].weight != 0, expected)


def test_global_shares(net, masks):
    everything = torch.cat([p.detach().abs().flatten() for p in weights(net).values()])
    limit = everything.sort().values[149]
    masks.prune_(masks.shares(150))
    assert masks.alive("0.weight") + masks.alive("2.weight") == 256 - 150
    for name, parameter in weights(net).items():
        assert torch.equal(parameter != 0, masks.bool_mask(name))
        assert (parameter[parameter != 0].abs() > limit).all()
    assert masks.shares(0) == {"0.weight": 0, "2.weight": 0}
    assert masks.shares(3, ["2.weight"]) == {"2.weight": 3}


def test_prune_where(net, masks):
    pruned = torch.zeros(5, 8, dtype=torch.bool)
    pruned[:, 3] = True
    masks.prune_where_("2.weight", pruned)
    assert torch.equal(masks.bool_mask("2.weight"), ~pruned)
    assert net[2].weight[:, 3].eq(0).all()
    masks.prune_where_("2.weight", torch.zeros_like(pruned))
    assert masks.alive("2.weight") == 35


def test_check_names_revived_weights(net, masks):
    masks.prune_({"2.weight": 40})
    with torch.no_grad():
        net[2].weight[0, :3] = 1.0
    with pytest.raises(RuntimeError, match=r"must be 0.0 \(got 3 others in '2.weight'\)"):
        masks.check_()
    masks.apply_()
    masks.check_()


def test_for_parameter_is_by_identity(net, masks):
    assert masks.for_parameter(net[0].weight) is masks.words("0.weight")
    assert masks.for_parameter(net[0].bias) is None
    assert masks.for_parameter(net[0].weight.detach()) is None


def test_state_dict_survives_a_file(net, masks):
    masks.prune_({"0.weight": 70, "2.weight": 9})
    file = io.BytesIO()
    torch.save(masks.state_dict(), file)
    file.seek(0)
    other = model()
    loaded = Masks(weights(other))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for name in masks.names:
        assert torch.equal(loaded.words(name), masks.words(name))
    assert torch.equal(other[0].weight, net[0].weight)


def test_state_dict_is_a_copy(masks):
    state = masks.state_dict()
    masks.prune_({"0.weight": 70})
    assert state["words"]["0.weight"].eq(-1)[:-1].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("shapes"), r"keys must be 'words' and 'shapes' \(got 'words'\)"),
        (lambda s: s["words"].pop("0.weight"), r"words must name the same.*in 0.weight\)"),
        (lambda s: s["shapes"].update(x=[1]), r"shapes must name the same.*in x\)"),
        (
            lambda s: s["shapes"].update({"2.weight": [8, 5]}),
            r"'2.weight' must have shape \[5, 8\] \(got \[8, 5\]\)",
        ),
        (
            lambda s: s["words"].update({"2.weight": torch.zeros(3, dtype=torch.int32)}),
            r"words of '2.weight' must be int32 of shape \[2\] \(got torch.int32 of \[3\]\)",
        ),
        (lambda s: s["words"].update({"2.weight": torch.zeros(2)}), r"must be int32 of shape"),
        (
            lambda s: s["words"].update({"2.weight": torch.tensor([0, 256], dtype=torch.int32)}),
            r"no bit set beyond its 40 weights",
        ),
        (
            lambda s: s["words"].update({"2.weight": torch.tensor([0, -1], dtype=torch.int32)}),
            r"no bit set beyond its 40 weights",
        ),
    ],
)
def test_load_refuses_and_changes_nothing(net, masks, change, message):
    masks.prune_({"0.weight": 70})
    state = masks.state_dict()
    state["words"]["0.weight"].zero_()
    change(state)
    before = net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        masks.load_state_dict(state)
    assert masks.alive("0.weight") == 216 - 70
    assert torch.equal(net[0].weight, before)


def test_clone_is_independent(masks):
    masks.prune_({"0.weight": 10})
    other = masks.clone()
    other.prune_({"0.weight": 10})
    assert (masks.alive("0.weight"), other.alive("0.weight")) == (206, 196)


def test_rebind(net, masks):
    masks.prune_({"0.weight": 70})
    fresh = model()
    masks.rebind(dict(fresh.named_parameters()))
    assert torch.equal(fresh[0].weight, net[0].weight)
    assert masks.for_parameter(fresh[0].weight) is not None
    assert masks.for_parameter(net[0].weight) is None
    with pytest.raises(ValueError, match=r"must have the masked parameters \(got no '2.weight'\)"):
        masks.rebind({"0.weight": fresh[0].weight})
    wrong = {**weights(fresh), "2.weight": nn.Parameter(torch.zeros(2))}
    with pytest.raises(ValueError, match=r"'2.weight' must have shape \[5, 8\] \(got \[2\]\)"):
        masks.rebind(wrong)
    masks.check_()


def test_deepcopy_together(net, masks):
    twin, twin_masks = copy.deepcopy((net, masks))
    twin_masks.prune_({"0.weight": 70})
    assert twin[0].weight.eq(0).sum() == 70
    assert masks.is_dense


def test_refuses_parameters(net):
    with pytest.raises(ValueError, match="named_parameters must not be empty"):
        Masks({})
    with pytest.raises(ValueError, match=r"must have one name \(got 'a' and 'b'\)"):
        Masks({"a": net[0].weight, "b": net[0].weight})
    with pytest.raises(TypeError, match=r"'a' must be a parameter .*got Tensor of torch.float32"):
        Masks({"a": torch.zeros(3)})
    whole = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError, match=r"'a' must be a parameter .*got Parameter of torch.int64"):
        Masks({"a": whole})


def test_refuses_names_counts_and_nan(net, masks):
    for call in (masks.alive, masks.words, masks.bool_mask, lambda n: masks.prune_({n: 1})):
        with pytest.raises(KeyError, match="unknown parameter"):
            call("nobody")
    with pytest.raises(ValueError, match=r"'2.weight' must lie between 0 and its 40 .*got 41"):
        masks.prune_({"0.weight": 5, "2.weight": 41})
    with pytest.raises(ValueError, match=r"k must lie between 0 and the 256 alive .*got 257"):
        masks.shares(257)
    with pytest.raises(ValueError, match=r"names must differ"):
        masks.shares(2, ["0.weight", "0.weight"])
    with pytest.raises(ValueError, match=r"must be bool of shape \[5, 8\]"):
        masks.prune_where_("2.weight", torch.zeros(8, 5, dtype=torch.bool))
    with torch.no_grad():
        net[2].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"Masks.prune_: .*got NaN in '2.weight'"):
        masks.prune_({"0.weight": 5, "2.weight": 1})
    with pytest.raises(ValueError, match=r"Masks.shares: .*got NaN in '2.weight'"):
        masks.shares(5)
    assert masks.is_dense


def test_pruning_is_seen_by_backward(net, masks):
    loss = (net[2].weight ** 2).sum()
    masks.prune_({"2.weight": 3})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_odd_shapes():
    parameters = {str(n): nn.Parameter(torch.randn(n)) for n in (0, 1, 31, 32, 33)}
    parameters["scalar"] = nn.Parameter(torch.tensor(2.0))
    masks = Masks(parameters)
    masks.prune_({name: p.numel() for name, p in parameters.items()})
    assert masks.sparsity() == 1.0
    assert masks.sparsity(["0"]) == 0.0
    assert all(p.eq(0).all() for p in parameters.values())
