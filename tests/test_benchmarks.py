"""The benchmarks measure what they say they do; no time is asserted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import layer_collapse
from benchmarks import plot
from benchmarks.claims import CLAIMS, mean, verdicts
from benchmarks.harness import Effort, combine, machine, make_row, race, renewed
from benchmarks.networks import NETWORKS, evaluation, training_step
from benchmarks.peers import (
    EasierHook,
    EGPHook,
    Reparametrised,
    SignHook,
    hook_rectifiers,
    magnitudes,
    step_and_multiply,
)
from benchmarks.table import markdown, text
from layer_collapse import MaskedSGD, Masks
from layer_collapse.measure.rectifiers import RELU, Call
from layer_collapse.ops.rectify import counts_of, new_ledger, rectify_reference

ROOT = Path(__file__).parent.parent
ROW_KEYS = {
    *("claim", "case", "ours_ms", "peer", "peer_ms", "ratio", "unit", "value", "spread", "bar"),
    *(
        "worst",
        "holds",
        "rounds",
        "passes",
        "calls",
        "threads",
        "dtype",
        "shape",
        "device",
        "torch",
        "date",
    ),
}


def row(claim: str, ours: list[float], peer: list[float], threads: int = 1) -> dict:
    return make_row(claim, "a case", ours, peer, threads=threads, dtype="float32", shape=[4])


def hooked(hook, z, channel_dim):
    module, counting = nn.ReLU(), hook(channel_dim)
    module.register_forward_hook(counting)
    module(z)
    return counting


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_sign_hook_counts_as_the_twin_does(channel_dim):
    z = torch.randn(5, 3, 4, 7)
    ledger = new_ledger(RELU, z.shape[channel_dim])
    rectify_reference(Call(RELU, z), ledger, channel_dim)
    assert torch.equal(hooked(SignHook, z, channel_dim).positive, counts_of(ledger, RELU)[0])


@pytest.mark.parametrize("hook", [EGPHook, EasierHook])
def test_authors_hooks_give_our_entropy_on_one_batch_without_zeros(hook):
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU())
    x = torch.randn(50, 6)
    with layer_collapse.track(model) as tracker:
        model(x)
        expected = tracker.entropy()["1"].entropy
    assert hooked(hook, model[0](x), -1).entropy == pytest.approx(expected, rel=1e-5)


def test_authors_hooks_differ_on_zeros_and_average_over_batches():
    z = torch.tensor([[0.0], [0.0], [1.0], [-1.0]])
    quarter = 0.5 + 0.75 * math.log2(4 / 3)
    assert hooked(EGPHook, z, -1).entropy == pytest.approx(quarter)  # heaviside(0) is 0
    assert hooked(EasierHook, z, -1).entropy == pytest.approx(1.0)  # 1/4 log 4, twice
    hook = EGPHook(-1)
    for batch in (z, torch.ones(4, 1)):
        hook(nn.ReLU(), (batch,), batch)
    assert hook.entropy == pytest.approx(quarter / 2)


def test_peers_that_prune_agree_with_the_masked_step():
    weights, mask = [torch.randn(6, 5)], torch.rand(6, 5) < 0.5
    grads = [torch.randn(6, 5)]
    parameters = [nn.Parameter(weights[0].clone()) for _ in range(2)]
    masks = Masks({"w": parameters[0]})
    masks.prune_where_("w", ~mask)
    reparametrised = Reparametrised(weights, [mask])
    steps = [
        MaskedSGD([parameters[0]], 0.1, 0.9, masks=masks).step,
        step_and_multiply(torch.optim.SGD([parameters[1]], 0.1, 0.9), [mask]),
        reparametrised.step(torch.optim.SGD(reparametrised.parameters, 0.1, 0.9), grads),
    ]
    for parameter in parameters:
        parameter.grad = grads[0].clone()
    for _ in range(3):
        for step in steps:
            step()
    for other in (parameters[1], reparametrised.weights[0]):
        torch.testing.assert_close(other[mask], parameters[0][mask])
        assert not other[~mask].any()


def test_magnitudes_are_those_of_all_tensors():
    tensors = [torch.tensor([[-3.0, 1.0]]), torch.tensor([2.0])]
    assert magnitudes(tensors).tolist() == [3.0, 1.0, 2.0]


def test_networks_are_what_they_are_called():
    sizes = {
        name: sum(p.numel() for p in build()[0].parameters()) for name, build in NETWORKS.items()
    }
    assert sizes["resnet18"] == 11_173_962  # the published size for 10 classes and a 3x3 stem
    assert 2.6e6 < sizes["vit"] < 2.8e6
    model, _ = NETWORKS["resnet18"]()
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == 17


def test_encoder_masks_padding_and_trains():
    model, (ids, mask) = NETWORKS["encoder"]()
    ids, mask = ids[:4], mask[:4]
    other = torch.where(mask == 0, 5, ids)
    logits = evaluation(model, (ids, mask))()
    torch.testing.assert_close(evaluation(model, (other, mask))(), logits)
    with layer_collapse.track(model, (ids, mask)) as tracker:
        loss = training_step(model, (ids, mask))
        first = loss()
        assert loss() < first
        assert {r.positions for r in tracker.entropy()} == {2 * int(mask.sum())}


def test_hooks_go_to_the_named_rectifiers():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU())
    hooks = hook_rectifiers(model, SignHook, {"1": -1, "3": -1})
    model(torch.randn(5, 3))
    assert [hook.positions for hook in hooks.values()] == [5, 5]
    assert hooks["3"].positive.shape == (2,)


def test_race_takes_turns_and_prepares_every_call():
    calls = []

    def pedantic(target, setup, rounds):
        calls.append("timed")
        for _ in range(rounds):
            setup()
            target()

    sides = [lambda: calls.append("ours"), lambda: calls.append("a"), lambda: calls.append("b")]
    effort = Effort(1.0, 3, 3)
    times, repeats = race(pedantic, sides, effort, before=lambda: calls.append("-"))
    timed = calls[calls.index("timed") + 1 :]
    assert timed == ["-", "a", "-", "b", "-", "ours"] * 3
    assert repeats == 1
    assert [len(side) for side in times] == [3, 3, 3]
    calls.clear()
    _, repeats = race(pedantic, sides, Effort(1.0, 2, 2))
    assert repeats > 1
    assert calls.count("ours") - calls[: calls.index("timed")].count("ours") == 2 * repeats


def test_race_counts_the_first_round_of_slow_sides():
    rounds = []
    times, _ = race(
        lambda *_, **options: rounds.append(options["rounds"]), [int, int], Effort(0, 3)
    )
    assert rounds == [2]
    assert [len(side) for side in times] == [1, 1]


def test_row_is_the_median_of_the_rounds():
    made = row("relu_f32", [1.0, 2.0, 9.0], [1.0, 1.0, 3.0])
    assert made["value"] == made["ratio"] == 2.0
    assert made["spread"] == [1.5, 2.5]
    assert (made["ours_ms"], made["peer_ms"]) == (2000.0, 1000.0)
    assert made["holds"] is False
    assert row("overhead", [1.0, 1.0], [1.0, 1.0])["holds"] is None


def test_difference_is_judged_in_microseconds():
    made = row("call", [5e-6, 5e-6], [2e-6, 2e-6])
    assert made["value"] == pytest.approx(3.0)
    assert made["ratio"] == pytest.approx(2.5)
    assert made["holds"] is True


def test_mean_of_ratios_is_geometric():
    assert mean([0.5, 2.0], "ratio") == pytest.approx(1.0)
    assert mean([-1.0, 3.0], "us") == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "holds"),
    [([1.0, 1.0], True), ([0.8, 1.05], True), ([0.5, 1.2], False), ([1.05, 1.05], False)],
)
def test_claim_holds_by_mean_and_by_worst_case(values, holds):
    assert (CLAIMS["relu_f32"].bar, CLAIMS["relu_f32"].worst) == (1.00, 1.10)
    (verdict,) = verdicts(row("relu_f32", [value] * 2, [1.0] * 2) for value in values)
    assert verdict["holds"] is holds
    assert verdict["highest"] == max(values)


def test_thread_counts_are_judged_apart():
    rows = [row("evaluation", [t, t], [1.0, 1.0], threads=n) for n, t in ((2, 1.0), (1, 1.5))]
    assert [(v["threads"], v["holds"]) for v in verdicts(rows)] == [(1, False), (2, True)]


def test_table_marks_what_is_missed():
    rows = [
        row("relu_f32", [1.2] * 2, [1.0] * 2) | machine(),
        row("evaluation", [1.0] * 2, [1.0] * 2, threads=2) | machine(),
        row("hook_signs", [0.03] * 2, [1.0] * 2) | machine(),
    ]
    table = markdown(rows)
    assert "| **1.20** | - | 1.00 [1.10] |" in table
    assert "| 0.030 | - | - |" in table
    assert torch.__version__ in table
    assert "NO" in text(rows)


def test_passes_give_their_middle_and_their_range():
    times = {"relu_f32": (1.5, 1.0, 1.1), "evaluation": (1.0, 1.2, 1.4)}
    passes = [
        row(claim, [seconds[turn]] * 2, [1.0] * 2)
        for turn in range(3)
        for claim, seconds in times.items()
    ]
    rectifier, evaluation = combine(passes)
    assert (rectifier["value"], rectifier["spread"]) == (1.1, [1.0, 1.5])
    assert evaluation["passes"] == [1.0, 1.2, 1.4]
    assert combine([passes[0]]) == [passes[0]]
    assert combine([passes[0], passes[2]])[0]["value"] == 1.25  # not the better one
    second = row("relu_f32", [4.0] * 2, [1.0] * 2) | {"case": "another"}
    verdict = verdicts(combine([*passes, second, second, second]))[0]
    assert verdict["spread"] == pytest.approx([2.0, math.sqrt(6.0)])
    assert verdict["mean"] == pytest.approx(math.sqrt(4.4))
    assert "1.10, 1.00 to 1.50" in markdown([rectifier | machine()])
    assert "1.00 to 1.50" in text([rectifier])


def test_claims_that_are_not_measured_again_stay():
    old = [row(c, [v] * 2, [1.0] * 2) | machine() for c, v in (("relu_f32", 2.0), ("sgd_95", 3.0))]
    new = [row("sgd_95", [1.0] * 2, [1.0] * 2) | machine()]
    assert [(r["claim"], r["value"]) for r in renewed(old, new)] == [
        ("relu_f32", 2.0),
        ("sgd_95", 1.0),
    ]
    assert renewed([], new) == new
    with pytest.raises(ValueError, match="relu_f32 was measured on another, torch"):
        renewed([old[0] | {"device": "another"}], new)
    assert renewed([old[1] | {"device": "another"}], new) == new


def test_plot_has_a_line_per_kind_of_call():
    rows = []
    for claim, dtype in (("overhead", "float32"), ("overhead_inplace", "bfloat16")):
        for values in (1 << 20, 1 << 10):
            made = row(claim, [2.0] * 2, [1.0] * 2)
            rows.append(made | {"dtype": dtype, "shape": [values]})
    assert plot.lines([*rows, row("evaluation", [1.0] * 2, [1.0] * 2)]) == {
        ("f32", 1): [(4 << 10, 2.0), (4 << 20, 2.0)],
        ("bf16 in place", 1): [(2 << 10, 2.0), (2 << 20, 2.0)],
    }
    assert len(plot.draw({"rows": rows}).axes[0].lines) == 3  # and the one at 1.0


def test_run_writes_its_rows(tmp_path):
    path = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_call_overhead.py", "--quick"]
    command += ["--repeats=2", f"--results={path}", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())
    rows = results["rows"]
    assert [entry["claim"] for entry in results["claims"]] == ["call"] * len(results["claims"])
    assert {r["threads"] for r in rows} <= {1, 2}
    assert {r["claim"] for r in rows} == {"call"}
    for made in rows:
        assert set(made) == ROW_KEYS
        assert made["rounds"] >= 3
        assert made["calls"] > 1
        assert len(made["passes"]) == 2
        assert made["spread"] == [min(made["passes"]), max(made["passes"])]
