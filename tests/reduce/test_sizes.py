"""Folds that hold for one size only: found, whatever makes them so, and guarded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layer_collapse.reduce.fold import fold
from layer_collapse.reduce.proof import FoldError

from .test_fold import relative


class Way(nn.Module):
    """``way(self, x)`` on layers h and e, of which e has no weights."""

    def __init__(self, way: Callable[[Any, Any], Tensor], h: nn.Module, e: nn.Module) -> None:
        super().__init__()
        self.way, self.h, self.e = way, h, e
        nn.init.zeros_(e.weight)

    def forward(self, x: Any) -> Tensor:
        return self.way(self, x)


def signals(way: Callable[[Any, Any], Tensor]) -> Way:
    torch.manual_seed(0)
    return Way(way, nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)).double().eval()


def never_wrong(model: nn.Module, example: Any, *others: Any, prove: bool = True) -> None:
    """Right where the unfolded model is, or refused: at no size silently wrong."""
    result = fold(model, example, prove=prove)
    with torch.no_grad():
        assert relative(result.model(example), model(example)) < 1e-10
        for other in others:
            expected = model(other)
            if result.report.only_sizes and other.shape[1:] != example.shape[1:]:
                with pytest.raises(ValueError, match="folded for inputs of shape"):
                    result.model(other)
            else:
                assert relative(result.model(other), expected) < 1e-10


x, longer = torch.randn(2, 4, 8).double(), torch.randn(2, 4, 12).double()
WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "times a size": lambda s, x: s.h(x) + s.e(x) * x.shape[2],
    "plus an index": lambda s, x: s.h(x) + s.e(x) * torch.arange(x.shape[2]).sum(),
    "sum over positions": lambda s, x: s.h(x.mean(2, keepdim=True)) + s.e(x).sum(2, keepdim=True),
    "softmax over positions": lambda s, x: s.h(x) + s.e(x).softmax(2),
    "interpolated": lambda s, x: s.h(x) + F.interpolate(s.e(x), size=x.shape[2:]),
    "read by a layer": lambda s, x: x.mean(1, keepdim=True) + s.h(s.e(x) * x.shape[2]),
}


@pytest.mark.parametrize("prove", [True, False])
@pytest.mark.parametrize("name", WAYS)
def test_constants_that_depend_on_a_size(name: str, prove: bool) -> None:
    model = signals(WAYS[name])
    never_wrong(model, x, longer, x[:1], longer[:1], prove=prove)


def test_a_pool_that_meets_a_border_only_where_there_is_more_than_one() -> None:
    model = signals(lambda s, x: s.h(x) + F.avg_pool1d(s.e(x), 3, 1, 1))
    never_wrong(model, x[..., :2], x[..., :6], x)


@pytest.mark.parametrize("prove", [True, False])
def test_constants_that_depend_on_the_number_of_samples(prove: bool) -> None:
    model = signals(lambda s, x: s.h(x) + s.e(x) * x.shape[0])
    result = fold(model, x, prove=prove)
    with torch.no_grad():
        assert relative(result.model(x[:1]), model(x[:1])) < 1e-10
    model = signals(lambda s, x: s.h(x) + s.e(x) * torch.arange(x.shape[0]).sum())
    with pytest.raises(FoldError, match="wrong for another number of samples"):
        fold(model, x)


def tail(stride: int = 1) -> nn.Sequential:
    """Two convolutions that become one with a map that holds as strides end."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(4, 6, 4, stride=4, bias=False), nn.Conv2d(6, 5, 3, stride, padding=1)
    )


SHRINKING: dict[str, Callable[[Tensor], Tensor]] = {
    "slices": lambda x: x[:, :, ::2, ::2],
    "interpolation": lambda x: F.interpolate(x, scale_factor=0.5),
    "unshuffled": lambda x: F.pixel_unshuffle(x, 2)[:, :4],
    "unfolded": lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2]], 1)[:, :4],
}


@pytest.mark.parametrize("prove", [True, False])
@pytest.mark.parametrize("name", SHRINKING)
def test_sizes_that_shrink_before_strides(name: str, prove: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tail = tail()

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(SHRINKING[name](x))

    torch.manual_seed(0)
    model = Net().double().eval()
    x = torch.randn(2, 4, 32, 32).double()
    result = fold(model, x, prove=prove)
    assert result.report.only_sizes == [[4, 32, 32]]
    for more in (4, 8, 16, 32):
        larger = torch.randn(1, 4, 32 + more, 32 + more).double()
        try:
            got = result.model(larger)
        except ValueError:
            continue
        assert relative(got, model(larger)) < 1e-10, more


@pytest.mark.parametrize("kind", [dict, list])
def test_inputs_in_a_mapping_or_a_list_are_guarded(kind: type) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tail = tail()

        def forward(self, batch: Any) -> Tensor:
            return self.tail(batch["image" if kind is dict else 0])

    def batch(side: int) -> Any:
        image = torch.randn(2, 4, side, side).double()
        return {"image": image, "name": "a"} if kind is dict else [image]

    model = Net().double().eval()
    result = fold(model, (batch(16),))
    assert result.report.only_sizes == [[4, 16, 16]]
    example = batch(16)
    assert relative(result.model(example), model(example)) < 1e-10
    with pytest.raises(ValueError, match="folded for inputs of shape"):
        result.model(batch(18))


def test_a_mapping_that_cannot_be_guarded_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tail = tail()

        def forward(self, batch: Any) -> Tensor:
            return self.tail(batch.get("image"))

    with pytest.raises(FoldError, match="where their size cannot be checked"):
        fold(Net().double(), ({"image": torch.randn(2, 4, 16, 16).double()},))


def test_larger_inputs_of_every_rank_are_tried() -> None:
    torch.manual_seed(0)
    line, volume = nn.Conv1d(3, 4, 3), nn.Conv3d(3, 4, 3)
    for layer, shape in ((line, (2, 3, 9)), (volume, (2, 3, 5, 5, 6))):
        model = nn.Sequential(layer, nn.BatchNorm1d(4) if layer is line else nn.BatchNorm3d(4))
        report = fold(copy.deepcopy(model), torch.randn(shape)).report
        assert report.checked_sizes[2:] == [
            [[3, *shape[1:]]],
            [[2, 3, *(n + 4 if n == shape[2] else n for n in shape[2:])]],
            *([[[2, 3, 5, 5, 10]]] if layer is volume else []),  # sides that differ, each
        ]
        assert report.only_sizes is None


def test_tokens_and_their_mask_grow_together() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.a, self.b = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.b(self.a(self.words(ids)) * mask[:, :, None])

    ids, mask = torch.randint(9, (2, 5)), torch.ones(2, 5)
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.a.weight[:2] = 0
        model.a.bias[:2] = 0
    report = fold(model, {"ids": ids, "mask": mask}).report
    assert report.folds
    assert [[2, 9], [2, 9]] in report.checked_sizes
    assert [[3, 5], [3, 5]] in report.checked_sizes
