from __future__ import annotations

import math

import pytest
import torch

from layer_collapse.reduce.proof import difference, has_nan, tolerance

inf, nan = math.inf, math.nan


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        (t(1, 2), t(1, 2), (0, 0)),
        (t(1, 2.5), t(1, -4), (6.5, 6.5 / 4)),
        (t(0, 0), t(0, 0), (0, 0)),
        (t(0, 1e-30), t(0, 0), (1e-30, inf)),
        (t(1, nan), t(1, 2), (inf, inf)),
        (t(1, nan), t(1, nan), (inf, inf)),
        (t(1, inf), t(1, 2), (inf, inf)),
        (t(1, -inf), t(1, -inf), (0, 0)),
        (t(1, inf), t(1, -inf), (inf, inf)),
        (t(1), t(1, 1), (inf, inf)),
        (t(), t(), (0, 0)),
        ((t(1), [t(2)]), (t(1), [t(2.5)]), (0.5, 0.2)),
        ((t(1),), (t(1), t(1)), (inf, inf)),
        ({"a": t(1), "b": 3}, {"a": t(1), "b": 3}, (0, 0)),
        ({"a": t(1), "b": 4}, {"a": t(1), "b": 3}, (inf, inf)),
        (torch.tensor([1]), torch.tensor([2]), (inf, inf)),
        (torch.tensor([True]), torch.tensor([True]), (0, 0)),
    ],
)
def test_difference(candidate, reference, expected) -> None:  # type: ignore[no-untyped-def]
    assert difference(candidate, reference) == pytest.approx(expected)


def test_the_coarsest_dtype_decides() -> None:
    assert tolerance([]) == 1e-10
    assert tolerance([torch.float32, torch.bfloat16, torch.int64]) == 2e-2
    assert tolerance([torch.float64]) < tolerance([torch.float32]) < tolerance([torch.float16])


def test_has_nan() -> None:
    assert has_nan({"a": [t(1, nan)]})
    assert not has_nan({"a": [t(1, inf)], "b": None})
