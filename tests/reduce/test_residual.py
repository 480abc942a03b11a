"""Sums of a convolution with its input, or with another one, become one convolution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layer_collapse.reduce.fold import FoldResult, fold
from layer_collapse.reduce.gate import AffineGate

from .test_convolution import C, grid, made, reasons, same, seeded


class Sum(nn.Module):
    """Layers by name; forward is given."""

    def __init__(self, way: Callable[[Sum, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.way = way
        seeded(*layers.values())
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def identity(s: Sum, x: Tensor) -> Tensor:
    return x + s.conv(x)


def parallel(s: Sum, x: Tensor) -> Tensor:
    return s.a(x) + s.b(x)


def folded(model: nn.Module, *shape: int) -> FoldResult:
    x = grid(*shape)
    result = fold(model, x)
    same(model, result, x)
    same(model, result, grid(shape[0], *(n + 2 for n in shape[1:])))
    return result


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (C(4, 4, 3, padding=1), (4, 6, 5)),
        (C(4, 4, 5, padding=2, bias=False), (4, 6, 5)),
        (C(6, 6, 3, padding=1, groups=6), (6, 6, 5)),
        (C(6, 6, (1, 3), padding=(0, 2), dilation=(1, 2), groups=3), (6, 6, 5)),
        (C(4, 4, 3, padding="same", padding_mode="reflect"), (4, 6, 5)),
        (C(4, 4, 2, padding="same"), (4, 6, 5)),
        (C(4, 4, 1), (4, 6, 5)),
        (nn.Conv1d(4, 4, 3, padding=1), (4, 9)),
        (nn.Conv3d(2, 2, 3, padding=1), (2, 4, 5, 3)),
    ],
)
def test_identity_is_one_on_the_centre_tap(conv: nn.Module, shape: tuple[int, ...]) -> None:
    result = folded(Sum(identity, conv=conv), *shape)
    assert made(result) == ["residual"]
    assert [n.op for n in result.model.graph.nodes] == ["placeholder", "call_module", "output"]
    left = result.model.get_submodule("conv")
    assert (left.kernel_size, left.groups) == (conv.kernel_size, conv.groups)


def test_either_order_in_place_and_behind_dropout() -> None:
    def in_place(s: Sum, x: Tensor) -> Tensor:
        y = s.drop(s.conv(s.drop(x)))
        y += x
        return y

    model = Sum(in_place, conv=C(4, 4, 3, padding=1), drop=nn.Dropout())
    assert made(folded(model, 4, 6, 5)) == ["residual"]
    model = Sum(lambda s, x: s.conv(x).add(x), conv=C(4, 4, 3, padding=1))
    assert made(folded(model, 4, 6, 5)) == ["residual"]


@pytest.mark.parametrize(
    ("a", "b", "kernel"),
    [
        (C(4, 6, 3, 2, 1), C(4, 6, 1, 2), (3, 3)),
        (C(4, 6, 1, 2, bias=False), C(4, 6, 3, 2, 1, bias=False), (3, 3)),
        (C(4, 6, 5, padding=2, groups=2), C(4, 6, 3, padding=1), (5, 5)),
        (C(4, 6, (3, 1), padding=(1, 0)), C(4, 6, (1, 3), padding=(0, 1)), (3, 3)),
        (C(4, 6, 3, padding=2, dilation=2), C(4, 6, 1), (3, 3)),
        (C(4, 8, 3, groups=4, padding=1), C(4, 8, 3, groups=2, padding=1), (3, 3)),
        (C(4, 6, 3, padding=1, padding_mode="circular"), C(4, 6, 1), (3, 3)),
        (C(4, 6, 4, padding="same"), C(4, 6, 2, padding="same"), (4, 4)),
    ],
)
def test_parallel_convolutions(a: nn.Module, b: nn.Module, kernel: tuple[int, int]) -> None:
    result = folded(Sum(parallel, a=a, b=b), 4, 8, 6)
    assert made(result) == ["residual"]
    (left,) = result.model.children()
    assert left.kernel_size == kernel


def test_all_branches_of_a_block_that_trained_with_many() -> None:
    """3x3, 1x1 and identity, each with a batch norm, as re-parametrised networks train."""

    def block(s: Sum, x: Tensor) -> Tensor:
        return s.bn3(s.three(x)) + s.bn1(s.one(x)) + s.bn0(x)

    norms = {f"bn{i}": nn.BatchNorm2d(4) for i in (0, 1, 3)}
    model = Sum(block, three=C(4, 4, 3, padding=1, bias=False), one=C(4, 4, 1, bias=False), **norms)
    result = folded(model, 4, 6, 5)
    assert [type(m) for m in result.model.children()] == [C]
    assert made(result).count("residual") == 2


def test_input_that_is_a_convolution_itself() -> None:
    def block(s: Sum, x: Tensor) -> Tensor:
        y = s.stem(x)
        return y + s.conv(y)

    model = Sum(block, stem=C(3, 4, 3, padding=1), conv=C(4, 4, 3, padding=1))
    assert made(folded(model, 3, 6, 5)) == ["residual"]


def test_a_gate_beside() -> None:
    gate = AffineGate(torch.tensor([1.0, 0.0, 0.5, 1.0]), torch.tensor([0.0, 6.0, 0.0, 0.0]))
    model = Sum(lambda s, x: s.conv(x) + s.gate(x), conv=C(4, 4, 3, padding=1), gate=gate)
    assert made(folded(model, 4, 6, 5)) == ["residual"]


def test_a_linear_residual_block_becomes_one_layer() -> None:
    def block(s: Sum, x: Tensor) -> Tensor:
        return x + s.down(s.wide(s.up(x)))

    model = Sum(block, up=C(4, 8, 1, bias=False), wide=C(8, 8, 3, padding=1, groups=8),
                down=C(8, 4, 1))  # fmt: skip
    result = folded(model, 4, 6, 5)
    assert sorted(made(result)) == ["convolution", "convolution", "residual"]
    assert len(list(result.model.children())) == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_two_beside_each_other(data: st.DataObject) -> None:
    def drawn(*values: object) -> object:
        return data.draw(st.sampled_from(values))

    torch.manual_seed(data.draw(st.integers(0, 99)))
    stride, layers = drawn(1, 2), list[nn.Module]()
    for _ in range(2):
        kernel, dilation = drawn(1, 3, 5), drawn(1, 2)
        padding = dilation * (kernel - 1) // 2  # type: ignore[operator]
        groups, bias, mode = drawn(1, 2, 4), drawn(True, False), drawn("zeros", "circular")
        layers.append(C(4, 4, kernel, stride, padding, dilation, groups, bias, mode))  # type: ignore[arg-type]
    result = folded(Sum(parallel, a=layers[0], b=layers[1]), 4, 12, 14)
    first, second = layers
    if first.kernel_size == (1, 1) or second.kernel_size == (1, 1):
        assert made(result) == ["residual"]
    else:
        alike = (first.padding_mode, first.dilation) == (second.padding_mode, second.dilation)
        assert (
            made(result) == ["residual"] if alike else made(result) or reasons(result, "residual")
        )


def test_refusals() -> None:
    x = grid(4, 8, 8)
    twice = Sum(lambda s, x: (y := s.conv(x)) + x + torch.tanh(y), conv=C(4, 4, 3, padding=1))
    assert "used elsewhere" in reasons(fold(twice, x), "residual")
    hooked = Sum(identity, conv=C(4, 4, 3, padding=1))
    hooked.conv.register_forward_hook(lambda *_: None)
    assert "hooks" in reasons(fold(hooked, x), "residual")
    modes = Sum(parallel, a=C(4, 4, 3, padding=1), b=C(4, 4, 3, padding=1, padding_mode="reflect"))
    assert "another padding mode" in reasons(fold(modes, x), "residual")
    apart = Sum(parallel, a=C(4, 4, 3, padding=1), b=C(4, 4, 3, padding=3, dilation=3))
    assert "common grid" in reasons(fold(apart, x), "residual")
    other = Sum(lambda s, x: torch.tanh(x) + s.conv(x), conv=C(4, 4, 3, padding=1))
    assert made(fold(other, x)) == []
    broadcast = Sum(lambda s, x: x + s.conv(x), conv=C(4, 1, 3, padding=1))
    assert made(fold(broadcast, x)) == []
    shared = Sum(lambda s, x: s.conv(x) + s.conv(torch.tanh(x)), conv=C(4, 4, 3, padding=1))
    assert made(fold(shared, x)) == []
