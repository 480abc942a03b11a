"""``make gpu-report`` but for its GPU: every case on the CPU in small sizes, with a clock that
the test winds up."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from benchmarks import gpu_cases, gpu_report
from benchmarks.gpu_cases import OURS, Case, Contender, Sizes

SMALL = Sizes(planes=(2, 3, 5, 5), tokens=(2, 3, 8), weights=32 * 40, tensors=3, each=100)
ABOUT = {"date": "2026-01-02", "card": "Card", "torch": "2", "cuda": "13.0", "tests": "9 passed"}


def in_python(function):
    """Stands for torch.compile."""
    return function


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_one_sentence(capsys, tmp_path):
    assert gpu_report.main(["--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "gpu-report: needs a CUDA device, found none; see benchmarks/gpu.md"
    assert list(tmp_path.iterdir()) == []


def test_every_case_agrees_with_its_peers_and_can_be_called():
    torch.manual_seed(0)
    with torch.no_grad():
        found = list(gpu_cases.cases("cpu", SMALL, in_python))
        for case in found:
            for contender in case.contenders.values():
                contender.call()
    assert len(found) == len({case.name for case in found}) == 6 + 6 + 1
    peers = {name for case in found for name in case.contenders} - {OURS}
    assert peers == {
        "torch.relu (no counts)",
        "torch.compile",
        "forward hook",
        "torch fused",
        "torch.topk",
    }


def test_bytes_that_must_move():
    torch.manual_seed(0)
    with torch.no_grad():
        found = {case.name: case.contenders for case in gpu_cases.cases("cpu", SMALL, in_python)}
    assert found["relu + counts, [2, 3, 5, 5], float16"][OURS].moves == 150 * 2 * 2
    dense = found["SGD with momentum, 1280 weights, 0% pruned"]
    assert dense["torch fused"].moves == 1280 * 4 * 5
    assert dense[OURS].moves == 1280 * 4 * 5 + 160
    sparse = found["AdamW, 1280 weights, 99% pruned"]
    assert sparse[OURS].moves < 0.1 * sparse["torch fused"].moves


def test_a_peer_that_computes_something_else_stops_the_report(monkeypatch):
    monkeypatch.setattr(gpu_cases, "_counted_relu", lambda x, counts, dims: x)
    with pytest.raises(RuntimeError, match=r"relu \+ counts.*must equal the peer's"):
        next(gpu_cases.cases("cpu", SMALL, in_python))


def test_times_are_medians_after_the_warm_up_taken_in_turns():
    calls = []
    contenders = {n: Contender(1, lambda n=n: calls.append(n)) for n in "ab"}
    clock = itertools.chain([10.0**9] * 2 * gpu_report.WARM_UP, [1, 7, 2, 8, 60, 9])

    def timer(call):
        call()
        return next(clock)

    assert gpu_report.measure(contenders, timer, rounds=3) == {"a": 2, "b": 8}
    assert calls == ["a", "b"] * (gpu_report.WARM_UP + 3)


def test_speeds_are_bytes_over_time_and_shares_are_of_the_copy(tmp_path):
    case = Case("case", {OURS: Contender(4000, lambda: 0), "peer": Contender(8000, lambda: 0)})
    clock = itertools.cycle([2.0, 4.0, 16.0])  # the copy, ours, the peer
    rows = gpu_report.rows_of(case, "cpu", lambda call: next(clock), rounds=2)
    found = [(r.contender, r.microseconds, r.gigabytes_per_second, r.copy_share) for r in rows]
    assert found == [("copy", 2, 2.0, 1.0), (OURS, 4, 1.0, 0.5), ("peer", 16, 0.5, 0.25)]
    text = gpu_report.write(rows, ABOUT, tmp_path / "new")
    assert "| case | layer_collapse | 4.0 | 1 | 0.50 |" in text.splitlines()
    assert (tmp_path / "new" / "report.md").read_text() == text
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert written["about"] == ABOUT
    assert written["rows"][2]["copy_share"] == 0.25


def test_the_whole_report_on_a_machine_that_claims_a_gpu(monkeypatch, capsys, tmp_path):
    """main() itself, with the CPU behind its device and a clock behind its events."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(gpu_report.cuda, "BUILT", True)
    monkeypatch.setattr(gpu_report, "run_tests", lambda: (1, "1 failed, 8 passed"))
    monkeypatch.setattr(gpu_report, "cases", lambda _: gpu_cases.cases("cpu", SMALL, in_python))
    clock = itertools.count(1)

    def timer(call):
        call()
        return float(next(clock))

    real = gpu_report.rows_of
    monkeypatch.setattr(
        gpu_report, "rows_of", lambda case, device, _: real(case, "cpu", timer, rounds=1)
    )
    assert gpu_report.main(["--out", str(tmp_path)]) == 1  # a failed test fails the report
    assert "on Card" in capsys.readouterr().out
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert len(rows) == 6 * 5 + 6 * 3 + 3
    assert "op tests on that card: 1 failed, 8 passed" in (tmp_path / "report.md").read_text()
