"""Merges are chosen by time where asked for; the times themselves are injected."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from layer_collapse.reduce.fold import fold
from layer_collapse.reduce.gate import AffineGate
from layer_collapse.reduce.latency import compare, in_turns
from layer_collapse.reduce.report import size_of

from . import models


class Stopwatch:
    """Says what it is told, and remembers what it was given to time."""

    def __init__(self, *times: tuple[float, float]) -> None:
        self.times, self.results = list(times), list[tuple[Tensor, Tensor]]()

    def __call__(self, apart: Callable[[], Any], merged: Callable[[], Any]) -> tuple[float, float]:
        self.results.append((apart(), merged()))
        return self.times[min(len(self.results), len(self.times)) - 1]


def chain(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 9), nn.Dropout(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 9), nn.Linear(9, 4)
    ).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms_are_timed_as_they_are_stored(dtype: torch.dtype) -> None:
    model, x = chain(dtype), torch.randn(3, 4).to(dtype)
    watch = Stopwatch((0.31, 0.22), (0.22, 0.31))
    result = fold(model, x, always_fold=False, stopwatch=watch)
    (kept,) = result.report.folds
    (refused,) = result.report.refusals
    assert (kept.name, kept.before_ms, kept.after_ms) == ("0", 0.31, 0.22)
    assert (refused.name, refused.reason) == ("4", "slower: 0.31 ms merged, 0.22 ms apart")
    assert "(0.31 -> 0.22 ms)" in str(result.report)
    assert json.loads(result.report.to_json())["folds"][0]["after_ms"] == 0.22
    assert len(watch.results) == 2  # a merge that comes again is not timed again
    for apart, merged in watch.results:
        assert apart.dtype == merged.dtype == dtype
        assert apart.shape == merged.shape == (3, 4)
        torch.testing.assert_close(merged, apart, rtol=0.05, atol=0.05)


def test_a_merge_that_is_no_faster_stays_out() -> None:
    result = fold(chain(), torch.randn(3, 4), always_fold=False, stopwatch=Stopwatch((1.0, 1.0)))
    assert [r.reason for r in result.report.refusals] == ["slower: 1 ms merged, 1 ms apart"] * 2
    assert result.report.after == result.report.before


def test_other_folds_and_other_callers_are_not_timed() -> None:
    def never(*_: object) -> tuple[float, float]:
        raise AssertionError

    assert len(fold(chain(), torch.randn(3, 4), stopwatch=never).report.folds) == 2
    model = models.make("residual", ["mixed", "empty"], 0)
    report = fold(model, models.inputs(model), without=["linear"], always_fold=False,
                  stopwatch=never).report  # fmt: skip
    assert {f.rule for f in report.folds} >= {"gate", "neurons", "constant"}
    assert all(f.before_ms is None for f in report.folds)


def test_the_region_of_a_transformer_block_is_cut_out_alone() -> None:
    model = models.make("vit", ["on", "mixed"], 1)
    watch = Stopwatch((2.0, 1.0))
    result = fold(model, models.inputs(model), always_fold=False, stopwatch=watch)
    assert [a.shape for a, _ in watch.results] == [(2, 5, 8)] * 2
    merges = [f for f in result.report.folds if f.rule == "linear"]
    assert [f.after_ms for f in merges] == [1.0, 1.0]


def test_in_turns_and_compare() -> None:
    calls = list[str]()
    first, second = in_turns(
        lambda: calls.append("a"), lambda: calls.append("b"), rounds=3, seconds=1e-9
    )
    assert first > 0
    assert second > 0
    turns = "".join(key for key, _ in groupby(calls))
    assert turns == "ab" * 4  # one to warm up, then both in every round
    model = models.make("chain", ["on"], 2)
    x = models.inputs(model)
    folded = fold(model, x).model
    latency = compare(model, folded, (x,), rounds=2, seconds=1e-4)
    assert (latency.batch, latency.threads) == (2, torch.get_num_threads())
    assert latency.ratio == latency.after / latency.before
    assert model.training


def test_report_with_latency_and_without_the_proof_end_to_end() -> None:
    model = models.make("resnet", ["on"], 3)
    x = models.inputs(model)
    result = fold(model, x, prove=False)
    report = result.report
    assert (report.proven, report.checked_sizes, report.max_rel) == (False, [], 0.0)
    assert "not compared end to end" in str(report)
    assert "latency" not in str(report)
    report.latency = compare(model, result.model, x, rounds=2, seconds=1e-4)
    assert f"batch 2, {report.latency.threads} threads" in str(report)
    assert json.loads(report.to_json())["latency"]["batch"] == 2
    proven = fold(model, x).report
    assert proven.proven
    assert "largest difference end to end" in str(proven)


def test_macs_are_those_of_the_formulas() -> None:
    model = models.make("resnet", ["relu"], 4)  # stem 3 -> 6, two convolutions, head, 6 x 6 pixels
    positions = 2 * 36
    expected = positions * (3 * 6 * 9 + 2 * 6 * 6 * 9) + 2 * 6 * 3
    assert fold(model, models.inputs(model)).report.before.macs == expected
    model = models.make("vit", ["relu"], 4)
    tokens, width = 2 * 5, 8
    linear = 2 * 4 * (27 * width) + tokens * 12 * width * width + 2 * width * 3
    attention = 2 * tokens * 5 * width
    assert fold(model, models.inputs(model)).report.before.macs == linear + attention


def test_macs_of_torchs_own_attention() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]

    report = fold(Attention(), torch.randn(2, 5, 8)).report
    assert report.before.macs == 10 * 4 * 64 + 2 * 10 * 5 * 8


class _Looks(nn.Module):
    """Cannot be followed by shapes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = nn.Linear(4, 4, bias=False), torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.inner(x) if x.sum() > 0 else x


class _Keeps(_Looks):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [_Looks, _Keeps])
def test_macs_of_a_module_that_is_called_as_a_whole(kind: type[_Looks]) -> None:
    graph, inner = fx.Graph(), kind()
    graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
    module = fx.GraphModule(nn.ModuleDict({"inner": inner}), graph)
    seen: list[Any] = []
    inner.inner.register_forward_hook(lambda *call: seen.append(call[2]))
    x = torch.ones(3, 4)
    assert size_of(module, [x]).macs == 3 * 4 * 4
    for value in (*seen, module.inner.seen):
        assert type(value) is Tensor  # never a tensor without values


def by_macs(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
    """A stopwatch that does not tick: multiply-adds in place of milliseconds."""
    counts = []
    for call in (first, second):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(float(counter.get_total_flops() // 2))
    return counts[0], counts[1]


def bottleneck(inside: int, outside: int, stride: int = 1) -> nn.Module:
    torch.manual_seed(0)
    gates = [AffineGate(torch.rand(inside), torch.randn(inside), 1) for _ in range(2)]
    return nn.Sequential(
        nn.Conv2d(outside, inside, 1), nn.BatchNorm2d(inside), gates[0],
        nn.Conv2d(inside, inside, 3, stride, 1, groups=inside), gates[1],
        nn.Conv2d(inside, outside, 1), nn.ReLU(),
    ).eval()  # fmt: skip


def test_merges_that_pay_only_together() -> None:
    model, x = bottleneck(48, 8), torch.randn(2, 8, 10, 10)
    result = fold(model, x, always_fold=False, stopwatch=by_macs)
    assert result.report.after.depth == 1
    assert result.report.after.macs < result.report.before.macs
    merges = [f for f in result.report.folds if f.after_ms is not None]
    assert len(merges) == 1  # the first is slower alone, and has no times of its own
    assert merges[0].after_ms < merges[0].before_ms  # type: ignore[operator]
    torch.testing.assert_close(result.model(x), model(x), atol=1e-5, rtol=1e-5)


def test_chains_that_do_not_pay_stay() -> None:
    model, x = bottleneck(8, 8), torch.randn(2, 8, 10, 10)
    result = fold(model, x, always_fold=False, stopwatch=by_macs)
    assert result.report.after.depth == 3
    assert sum("slower" in r.reason for r in result.report.refusals) == 2
    assert fold(model, x).report.after.depth == 1
