from __future__ import annotations

import copy

import pytest
import torch

from layer_collapse.reduce.gate import AffineGate, ConstantBias, smallest_form


def gate(*pairs: tuple[float, float], dim: int = 1) -> AffineGate:
    scale, offset = torch.tensor(pairs, dtype=torch.float32).T
    return AffineGate(scale, offset, dim)


@pytest.mark.parametrize("dim", [1, -1, 2, -2])
def test_each_neuron_gets_its_own_pair(dim: int) -> None:
    module = gate((0, 0), (1, 0), (0, 6), (0.1, 0), dim=dim)
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    y = module.double()(x).movedim(dim, 0)
    z = x.movedim(dim, 0)
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    assert torch.equal(y[1], z[1])
    assert torch.equal(y[2], torch.full_like(y[2], 6))
    assert torch.equal(y[3], z[3] * module.scale[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_identity_is_bit_exact_in_every_dtype(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 5) * 1e4).to(dtype)
    x[0, 0] = torch.finfo(dtype).tiny
    y = gate(*[(1.0, 0.0)] * 5)(x)
    assert y.dtype == dtype
    assert torch.equal(x, y)


def test_helpers_and_repr() -> None:
    assert gate((1, 0), (1, 0)).is_identity()
    assert not gate((1, 0), (1, 1e-9)).is_identity()
    assert gate((0, 0), (0, 6)).is_constant()
    assert not gate((0, 0), (1e-9, 0)).is_constant()
    text = repr(gate((0, 0), (1, 0), (0, 6), (0.1, 0)))
    assert text == "AffineGate(4, channel_dim=1, on=1, off=1, constant=1, other=1)"


def test_buffers_travel_with_the_module() -> None:
    module = gate((0, 0), (0, 6))
    assert set(module.state_dict()) == {"scale", "offset"}
    assert not list(module.parameters())
    assert copy.deepcopy(module).half().scale.dtype == torch.float16


def test_arguments_are_copied() -> None:
    scale = torch.ones(2)
    module = AffineGate(scale, torch.zeros(2))
    scale.zero_()
    assert module.is_identity()


@pytest.mark.parametrize(
    ("scale", "offset", "kind", "message"),
    [
        (torch.ones(2), torch.ones(3), ValueError, "one shape"),
        (torch.ones(2, 1), torch.ones(2, 1), ValueError, "one shape"),
        (torch.ones(2), torch.ones(2).double(), ValueError, "one dtype"),
        (torch.ones(2, dtype=torch.long), torch.ones(2), TypeError, "floating-point"),
        ([1.0], torch.ones(1), TypeError, "got list"),
    ],
)
def test_bad_arguments(scale, offset, kind, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(kind, match=message):
        AffineGate(scale, offset)


@pytest.mark.parametrize("shape", [(2, 3), (2,), (3, 1, 2)])
def test_wrong_number_of_neurons(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected 2 neurons along dim 1"):
        gate((1, 0), (1, 0))(torch.zeros(shape))


def test_constant_bias_adds_and_refuses_to_broadcast_the_input() -> None:
    value = torch.randn(4, 3, 3)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(ConstantBias(value)(x), x + value)
    for shape in ((2, 4, 1, 1), (2, 4, 5, 5), (3, 3)):
        with pytest.raises(ValueError, match="serves inputs of that size only"):
            ConstantBias(value)(torch.zeros(shape))
    with pytest.raises(TypeError, match="floating-point"):
        ConstantBias(torch.ones(2, dtype=torch.int64))


def test_smallest_form() -> None:
    value = torch.randn(4, 1, 1, dtype=torch.float64)
    assert smallest_form(value.expand(2, 4, 5, 6)).shape == (4, 1, 1)
    position = torch.randn(4, 5, 6, dtype=torch.float64)
    assert torch.equal(smallest_form(position.expand(3, 4, 5, 6)), position)
    assert smallest_form(torch.ones(2, 3, 4)).shape == (1,)
    assert smallest_form(torch.randn(7).expand(2, 3, 7)).shape == (7,)
    assert smallest_form(torch.tensor([[1.0, 1.0 + 1e-6]]).double()).shape == (2,)
