"""Fitted gates, and how far a changed network is from its original."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layer_collapse.measure.scan import scan
from layer_collapse.reduce.agreement import agreement
from layer_collapse.reduce.approximate import fit_gates
from layer_collapse.reduce.fold import fold
from layer_collapse.reduce.linearize import linearize


class Net(nn.Module):
    """Tokens [N, T, 5] through a GELU MLP and a functional SiLU; padding is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 7)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(7, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = F.silu(self.fc2(self.act(self.fc1(x))))
        return self.head((x * attention_mask.unsqueeze(-1)).mean(dim=1))


def batches(seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(4, 6, 5, generator=generator) * 2,
            "attention_mask": (torch.rand(4, 6, generator=generator) < 0.7).float(),
        }
        for _ in range(3)
    ]


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def test_fits_are_the_least_squares_ones(model: Net) -> None:
    data = batches()
    fits = fit_gates(model, data, data[0])
    assert list(fits) == ["act", ":silu"]
    with torch.no_grad():
        z = torch.cat([model.fc1(b["x"])[b["attention_mask"] != 0] for b in data]).double().numpy()
    y = F.gelu(torch.from_numpy(z)).numpy()
    fit = fits["act"]
    assert fit.positions == len(z) < 3 * 24
    gaps = []
    for neuron in range(7):
        columns = np.stack([z[:, neuron], np.ones(len(z))], axis=1)
        (scale, offset), *_ = np.linalg.lstsq(columns, y[:, neuron], rcond=None)
        assert float(fit.gate.scale[neuron]) == pytest.approx(scale, rel=1e-5)
        assert float(fit.gate.offset[neuron]) == pytest.approx(offset, rel=1e-5, abs=1e-6)
        gaps.append(np.abs(y[:, neuron] - columns @ (scale, offset)))
    assert fit.max_error == pytest.approx(np.max(gaps), rel=1e-4)
    assert fit.rms_error == pytest.approx(np.sqrt(np.mean(np.square(gaps))), rel=1e-4)
    assert fit.relative == pytest.approx(fit.rms_error / np.sqrt(np.mean(y**2)), rel=1e-4)


def test_a_constant_input_gives_a_constant(model: Net) -> None:
    nn.init.zeros_(model.fc1.weight)
    data = batches()
    fit = fit_gates(model, data, data[0], names=["act"])["act"]
    assert not bool(fit.gate.scale.any())
    torch.testing.assert_close(fit.gate.offset, F.gelu(model.fc1.bias.detach()))
    assert fit.max_error < 1e-6


def test_nearly_linear_rectifiers_fold_with_their_error_stated(model: Net) -> None:
    with torch.no_grad():
        model.fc1.weight *= 0.05  # z stays near its bias, where GELU is nearly a line
        model.fc1.bias.copy_(torch.linspace(2, 4, 7))
    data = batches()
    report = scan(model, data, data[0])
    fits = fit_gates(model, data, data[0], names=["act"])
    assert 0 < fits["act"].relative < 0.01
    linear = linearize(model, report, data[0], fits=fits)
    assert linear.approximate == ("act",)
    assert linear.exact == ()
    assert linear.fits["act"] is fits["act"]
    assert ":silu" in linear.kept
    result = fold(linear.model, data[0])
    assert result.report.after.depth == result.report.before.depth - 1
    near = agreement(model, result.model, batches(seed=1))
    assert near.samples == 12
    assert 0 < near.relative < 0.01
    assert near.max_abs < 0.05


def test_exact_gates_win_over_fitted_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    nn.init.constant_(model[0].bias, 50.0)
    data = [torch.randn(8, 4)]
    linear = linearize(model, scan(model, data), data[0], fits=fit_gates(model, data))
    assert linear.exact == ("1",)
    assert not linear.fits
    assert linear.model.get_submodule("1").is_identity()  # type: ignore[operator]


def test_bad_names_and_empty_data(model: Net) -> None:
    data = batches()
    with pytest.raises(ValueError, match=r"nowhere; the model has :silu, act"):
        fit_gates(model, data, data[0], names=["nowhere"])
    with pytest.raises(ValueError, match="no position of rectifier 'act' was measured"):
        fit_gates(model, [], data[0])
    with pytest.raises(ValueError, match="not a generator"):
        fit_gates(model, iter(data), data[0])
    with pytest.raises(ValueError, match="expected at least one sample"):
        agreement(model, model, [])


def test_the_model_is_left_as_it_was(model: Net) -> None:
    model.train()
    before = copy.deepcopy(model.state_dict())
    data = batches()
    fit_gates(model, data, data[0])
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_agreement_counts_classes() -> None:
    torch.manual_seed(0)
    first = nn.Linear(3, 4)
    second = copy.deepcopy(first)
    data = [torch.randn(50, 3), torch.randn(14, 3)]
    same = agreement(first, second, data)
    assert (same.samples, same.same_class, same.max_abs, same.relative) == (64, 1.0, 0.0, 0.0)
    nn.init.constant_(second.bias, 0.0)
    second.bias.data[2] = 100.0
    other = agreement(first, second, data)
    expected = torch.cat([first(x).argmax(1) == 2 for x in data]).float().mean()
    assert other.same_class == pytest.approx(float(expected))
