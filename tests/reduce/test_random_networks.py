"""Random networks: what folding gives is the unfolded network, and what it leaves has a reason.

The networks are random_networks.py's. The reference is the module itself in float64; the theorems
by which a merge is exact are folding_oracle.py's. Nothing of the package takes part in either.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from layer_collapse.reduce import proof, rules
from layer_collapse.reduce.fold import FoldResult, fold
from layer_collapse.reduce.gate import ConstantBias, FixedSize
from layer_collapse.reduce.work import Plan, Work

from . import folding_oracle as oracle
from .random_layers import CLASSES, Builder
from .random_networks import Network, known_pair, network

LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}
LEAST_SHARE = 2.0  # per cent


def relative(got: Tensor, expected: Tensor) -> float:
    error, scale = float((got - expected).abs().max()), float(expected.abs().max())
    return error / scale if error else 0.0


def answer(model: nn.Module, x: Tensor) -> Tensor | Exception:
    """What a model gives, or what it raises where it does not take this size."""
    with torch.no_grad():
        try:
            result: Tensor = model(x)
        except (RuntimeError, ValueError) as error:
            return error
    return result


def validity(result: FoldResult) -> str:
    """For which input sizes the report says that the folded network is right."""
    details = [f.detail for f in result.report.folds]
    if any("this input size only" in detail for detail in details):
        return "one size"
    return "as the strides end" if any("strides end" in detail for detail in details) else "any"


def assert_equal(net: Network, unfolded: nn.Module, result: FoldResult) -> None:
    """Equal on every size that the report vouches for, to the accuracy of the stored dtype.

    A smaller image than the example may be refused by torch: a merged convolution pads more than
    either of the two, and circular padding goes once around at most.
    """
    dtype = next(iter(unfolded.parameters())).dtype
    reference, candidate = copy.deepcopy(unfolded).double(), copy.deepcopy(result.model).double()
    example = net.shapes[0]
    step = next((m.step for m in result.model.modules() if isinstance(m, FixedSize)), 0)
    assert all(step % more == 0 for more in net.period)  # the guard lets nothing wrong in
    # what it lets in grows with the product of all strides: too large an image proves no more
    alike = [(1, example[1], *(n + step for n in example[2:]))] if 0 < step <= 16 else []
    shapes = {
        "any": net.shapes,
        "as the strides end": [example, *alike],
        "one size": [example],
    }
    for shape in shapes[validity(result)]:
        x = net.inputs(shape)
        expected = answer(reference, x)
        if isinstance(expected, Exception):
            assert shape != example, expected
            continue
        got = answer(candidate, x)
        if isinstance(got, Exception):
            assert shape[-1] < example[-1], got
            assert "adding" in str(got), got
            continue
        assert got.shape == expected.shape
        assert relative(got, expected) <= LIMIT[dtype], list(shape)
    if dtype is torch.float32:  # in its own arithmetic not much worse than the unfolded one in its
        x = net.inputs(example)
        with torch.no_grad():
            expected = reference(x)
            plain, ours = unfolded(x.to(dtype)).double(), result.model(x.to(dtype)).double()
        assert relative(ours, expected) <= 1e-5 + 4 * relative(plain, expected)


def assert_nothing_left(net: Network, result: FoldResult, tally: Counter) -> None:
    """No exact merge was missed, and every pair that stays is named with a reason."""
    if any(r.rule == "cut" for r in result.report.refusals):
        return
    graph = oracle.Graph(copy.deepcopy(result.model).double(), net.inputs(net.shapes[0]))
    for link in oracle.links(graph):
        names = {str(n.target) for n in (link.first, *link.between, link.second)}
        reasons = [r.reason for r in result.report.refusals if r.name in names]
        clause = oracle.clause(graph, link)
        tally["left", "named" if reasons else "unnamed"] += 1
        # A layer without weights is a constant, which leaves with its branch or not at all.
        empty = any(not bool(graph.called(n).weight.any()) for n in (link.first, link.second))
        free = graph.free(link.first) and graph.free(link.second)
        if clause is not None and free and not empty:
            raise AssertionError(f"{names} are one layer ({clause}), yet both stay: {reasons}")
        assert reasons, f"{names} stay without a reason"
        if link.pooled and not any(isinstance(graph.called(n), ConstantBias) for n in link.between):
            obstacles = ("pool", "has hooks", "is shared", "used elsewhere")
            assert any(known in reason for reason in reasons for known in obstacles), reasons
    assert oracle.leftovers(graph) == []
    assert oracle.sums(graph) == []


def plain(reason: str) -> str:
    """A reason without the names and numbers of one network."""
    return re.sub(r"\d[\d.e+-]*", "#", re.sub(r"'[^']*'", "...", reason))


def check(net: Network, tally: Counter) -> None:
    tally.update(net.drawn)
    x = net.inputs(net.shapes[0])
    graph = oracle.Graph(copy.deepcopy(net.model), x)
    for link in oracle.links(graph):
        tally["link", "pooled" if link.pooled else oracle.clause(graph, link) or "inexact"] += 1
    for dtype in LIMIT:
        model = copy.deepcopy(net.model).to(dtype)
        result = fold(model, x.to(dtype), border=net.border)
        assert_equal(net, model, result)
        assert_nothing_left(net, result, tally)
        tally.update(("fold", f.rule) for f in result.report.folds)
        tally.update(("refused", f"{r.rule}: {plain(r.reason)}") for r in result.report.refusals)
        tally["valid for", validity(result)] += 1


def shares(tally: Counter) -> Iterator[tuple[str, str, int, float]]:
    """(family, class, number, per cent of the family's draws)."""
    for family, classes in CLASSES.items():
        total = sum(tally[family, name] for name in classes)
        for name in classes:
            yield family, name, tally[family, name], 100 * tally[family, name] / max(total, 1)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_networks(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    tally: Counter = Counter()

    @settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # a seed has no smaller form
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**24 - 1).map(network))
    def every(net: Network) -> None:
        check(net, tally)

    every()
    rows = list(shares(tally))
    with capsys.disabled():
        print()
        for family, name, count, share in rows:
            print(f"{family:14} {name:22} {count:6} {share:5.1f} %")
        for kind in ("link", "left", "fold", "valid for", "refused"):
            for (family, name), count in sorted(tally.items(), key=lambda item: -item[1]):
                if family == kind:
                    print(f"{kind:14} {count:6} {name}")
    seen = sum(tally["network", name] for name in CLASSES["network"])
    assert seen >= number
    assert [row for row in rows if row[3] < LEAST_SHARE] == []


# That the test can fail


def off_by_one_tap(rule: rules.Rule, planted: list[str]) -> rules.Rule:
    def wrong(work: Work, node: fx.Node) -> Plan | None:
        plan = rule(work, node)
        for module in plan.modules.values() if plan is not None else ():
            right = module.weight.detach().clone()
            with torch.no_grad():
                module.weight.copy_(right.roll(1, -1))
            if not torch.equal(module.weight, right):
                planted.append(plan.name)
        return plan

    return wrong


@pytest.mark.parametrize("proven", [True, False])
def test_a_wrong_composition_is_caught(proven: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the proof of the fold; and without any proof, by the comparison of this test."""
    planted: list[str] = []
    for name in ("linear", "convolution"):
        monkeypatch.setitem(rules.RULES, name, off_by_one_tap(rules.RULES[name], planted))
    if not proven:
        monkeypatch.setattr(proof, "difference", lambda candidate, reference: (0.0, 0.0))
    wrong = caught = 0
    for seed in range(40):
        planted.clear()
        net = network(seed)
        result = fold(net.model, net.inputs(net.shapes[0]), border=net.border)
        if not planted:
            continue
        wrong += 1
        if proven:
            x = net.inputs(net.shapes[0])
            with torch.no_grad():
                assert relative(result.model(x), net.model(x)) <= LIMIT[x.dtype]
            refused = {r.name for r in result.report.refusals if "relative error" in r.reason}
            caught += planted[-1] in refused
        else:
            with contextlib.suppress(AssertionError):
                assert_equal(net, net.model, result)
                continue
            caught += 1
    assert wrong >= 15
    assert caught >= 0.9 * wrong  # a tap may lie in the padding, a gate hide what is wrong


# The oracle itself


def convolution_of(layers: nn.Sequential, x: Tensor, mode: str) -> Tensor:
    """What a chain of two convolutions would give if it were one convolution.

    The weights are read off the chain without padding, one input pixel of one window at a time.
    """
    bare = copy.deepcopy(layers)
    convs = [m for m in bare if isinstance(m, oracle.CONV)]
    (k1, s1, d1, p1), (k2, s2, d2, p2) = (
        (c.kernel_size, c.stride, c.dilation, oracle.padding(c)) for c in convs
    )
    for conv in convs:
        conv.padding, conv.padding_mode = (0,) * len(conv.kernel_size), "zeros"
    window = [
        b * (a - 1) + c * e * (d - 1) + 1 for a, b, c, d, e in zip(k1, d1, s1, k2, d2, strict=True)
    ]
    channels = convs[0].in_channels
    pixels = torch.eye(channels * torch.Size(window).numel(), dtype=torch.float64)
    with torch.no_grad():
        bias = bare(torch.zeros(1, channels, *window, dtype=torch.float64)).flatten()
        weight = (bare(pixels.view(-1, channels, *window)).flatten(1) - bias).T
    merged = oracle.CONV[len(window) - 1](
        channels,
        len(bias),
        tuple(window),
        tuple(a * b for a, b in zip(s1, s2, strict=True)),
        tuple(a + b * c for a, b, c in zip(p1, s1, p2, strict=True)),
        padding_mode=mode,
    ).double()
    with torch.no_grad():
        merged.weight.copy_(weight.reshape(merged.weight.shape))
        merged.bias.copy_(bias)
        result: Tensor = merged(x)
    return result


def is_uniform(conv: nn.Module) -> bool:
    """Whether a convolution is the same along every dim."""
    each = (conv.kernel_size, conv.stride, oracle.padding(conv))
    return all(len(set(sizes)) == 1 for sizes in each)  # type: ignore[arg-type]


def test_the_oracle_against_pairs_written_out() -> None:
    """Pairs that it calls one layer are; those that it never does are none at some size."""
    seen: Counter = Counter()
    for seed in range(250):
        b = Builder(seed)
        b.weights = "dense"
        b.channels, b.size = b.pick(2, 3), [b.pick(7, 8, 9, 12) for _ in range(b.pick(1, 1, 2))]
        start = [2, b.channels, *b.size]
        parts = known_pair(b) if b.often(50) else [*b.unit(), *b.unit()]
        convs = [number for number, m in enumerate(parts) if isinstance(m, oracle.CONV)]
        pair = nn.Sequential(*parts[convs[0] : convs[1] + 1]).eval()
        if any(oracle.padding(m) is None for m in (pair[0], pair[-1])):
            continue
        exact, clauses = [], set()
        for more in range(3):
            x = b.randn(*start[:2], *(n + more for n in start[2:]))
            graph = oracle.Graph(pair, x)
            links = oracle.links(graph)
            if not links:
                break  # a rectifier between them
            with torch.no_grad():
                expected = pair(x)
            errors = []
            for mode in CLASSES["padding mode"]:
                with contextlib.suppress(RuntimeError):  # more padding than pixels
                    errors.append(relative(convolution_of(pair, x, mode), expected))
            exact.append(min(errors) < 1e-12)
            clauses.add(clause := oracle.clause(graph, links[0]))
            assert exact[-1] or clause is None, (seed, clause, errors)
        if clauses == {None} and is_uniform(pair[0]) and is_uniform(pair[-1]):
            assert not all(exact), seed
        seen.update(clauses)
    assert min(seen[c] for c in (None, "valid", "pointwise", "tiles", "circular", "aligned")) >= 8
