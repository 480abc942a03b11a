"""Folds that hold for one input size: the network refuses every other, also after a reload."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from layer_collapse import fold, load_folded, save_folded


def test_another_size_is_refused_before_and_after_a_reload(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 3, padding=1))
    x = torch.randn(2, 2, 6, 6)
    result = fold(model, x)
    assert result.report.only_sizes == [[2, 6, 6]]
    assert "for inputs of shape [N, 2, 6, 6] only: the network refuses others" in str(result.report)
    save_folded(result.model, tmp_path / "folded.safetensors")
    for folded in (result.model, load_folded(tmp_path / "folded.safetensors")):
        torch.testing.assert_close(folded(x[:1]), model(x[:1]), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"folded for inputs of shape \[N, 2, 6, 6\] only"):
            folded(torch.randn(1, 2, 7, 6))


def test_strides_that_end_otherwise_are_refused() -> None:
    """This merge is exact on 8 pixels and wrong, without a word, where strides end otherwise."""
    model = nn.Sequential(
        nn.Conv1d(1, 1, 2, stride=2, bias=False), nn.Conv1d(1, 1, 2, padding=1, bias=False)
    )
    guarded = 0
    for size in range(4, 12):
        result = fold(model, torch.randn(2, 1, size), border="refuse")
        if result.report.folds:
            with torch.no_grad():
                other = torch.randn(2, 1, size + 1)
                if result.report.only_sizes is None:
                    torch.testing.assert_close(result.model(other), model(other))
                else:
                    guarded += 1
                    with pytest.raises(ValueError, match="only"):
                        result.model(other)
    assert guarded


def test_any_size_needs_no_guard() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 1))
    result = fold(model, torch.randn(2, 2, 6, 6))
    assert result.report.folds
    assert result.report.only_sizes is None
    torch.testing.assert_close(
        result.model(y := torch.randn(1, 2, 9, 9)), model(y), rtol=1e-5, atol=1e-5
    )
