"""Whole models: the folded one computes what the unfolded one does, and the layers are gone."""

from __future__ import annotations

import copy
import importlib
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from layer_collapse import graph
from layer_collapse.reduce import proof
from layer_collapse.reduce.fold import FoldError, fold
from layer_collapse.reduce.gate import AffineGate, ConstantBias
from layer_collapse.reduce.rules import RULES

from . import models

fold_module = importlib.import_module("layer_collapse.reduce.fold")
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(models.MODELS)),
    kinds=st.lists(st.sampled_from(models.GATES), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    sparsity=st.sampled_from([0.0, 0.3, 0.7]),
    seed=st.integers(0, 1000),
)
def test_folded_equals_unfolded(name, kinds, dtype, sparsity, seed) -> None:  # type: ignore[no-untyped-def]
    model = models.make(name, kinds, seed, sparsity).to(dtype)
    x = models.inputs(model, dtype)
    before, expected = state(model), models.in_float64(model, x)
    result = fold(model, x)
    assert relative(models.in_float64(result.model, x), expected) <= LIMIT[dtype]
    assert relative(result.model(x).double(), expected) <= max(LIMIT[dtype], 1e-9)
    after = state(model)
    assert all(module.training for module in model.modules())
    ours = {t.data_ptr() for t in result.model.parameters()}
    assert not ours & {t.data_ptr() for t in model.parameters()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(t.dtype == dtype for t in result.model.parameters())
    called = {n.target for n in result.model.graph.nodes if n.op == "call_module"}
    gates = {p for p, m in result.model.named_modules() if isinstance(m, AffineGate)}
    refused = {r.name for r in result.report.refusals}
    assert gates <= refused or "cut" in {r.rule for r in result.report.refusals}
    assert {p.rpartition(".")[0] for p, _ in result.model.named_parameters()} <= called | {""}


def test_all_off_mlp_block_leaves_the_vit_entirely() -> None:
    model = models.make("vit", ["off", "on", "gelu"], 0)
    result = fold(model, models.inputs(model))
    names = {name for name, _ in result.model.named_modules()}
    assert not names & {"fc1.0", "fc2.0", "norm2.0", "acts.0", "fc1.1", "acts.1"}
    assert {"fc2.1", "norm2.1", "fc1.2", "acts.2"} <= names
    assert not any(isinstance(m, ConstantBias) for m in result.model.modules())  # in proj.0
    assert result.model.get_submodule("fc2.1").weight.shape == (8, 8)
    report = result.report
    assert (report.before.depth, report.after.depth) == (1 + 3 * 4 + 1, 1 + 4 + 3 + 2 + 2 - 1 + 0)
    assert report.after.parameters == sum(p.numel() for p in result.model.parameters())


@pytest.mark.parametrize("kind", ["relu", "gelu"])
def test_empty_layer_needs_no_gate(kind: str) -> None:
    model = models.make("residual", [kind, "relu"], 1)
    nn.init.zeros_(model.first[0].weight)
    result = fold(model, models.inputs(model))
    names = {name for name, _ in result.model.named_modules()}
    assert not names & {"first.0", "second.0", "acts.0"}
    assert result.report.after.rectifiers == 1
    assert graph.depth(result.model) == graph.depth(graph.trace(model)) - 2
    assert {(f.name, f.rule) for f in result.report.folds} >= {
        ("first.0", "constant"),
        ("constant_bias_0", "absorb"),
    }


def test_zero_padding_gives_a_bias_map_for_one_size() -> None:
    model = models.make("resnet", ["six", "relu"], 2, sparsity=0)
    model.blocks[0].act.scale.zero_()  # all neurons constant, none of them zero everywhere
    model.blocks[0].act.offset.fill_(6.0)
    x = models.inputs(model)
    result = fold(model, x)
    assert [f.rule for f in result.report.folds if f.name == "blocks.0.conv1"] == ["biasmap"]
    assert result.model.get_submodule("constant_bias_0").value.shape == (6, 6, 6)
    assert relative(result.model(x), model.eval()(x)) < 1e-5
    with pytest.raises(ValueError, match=r"folded for inputs of shape \[N, 3, 6, 6\] only"):
        result.model(torch.zeros(1, 3, 8, 8))
    assert result.report.checked_sizes == [[[n, 3, 6, 6]] for n in (2, 2, 3)]


def test_uniform_constant_serves_every_size() -> None:
    model = models.make("resnet", ["off", "mixed"], 3)
    result = fold(model, models.inputs(model))
    assert [2, 3, 10, 10] in [sizes[0] for sizes in result.report.checked_sizes]
    x = torch.randn(1, 3, 9, 12)
    assert relative(result.model(x), model.eval()(x)) < 1e-5


def test_untouched_layers_keep_their_names() -> None:
    model = models.make("vit", ["gelu", "off", "gelu"], 4)
    folded = fold(model, models.inputs(model)).model
    kept = {k: v for k, v in model.state_dict().items() if k in folded.state_dict()}
    assert {"head.weight", "pos", "qkv.2.weight", "norm1.1.weight", "fc1.0.bias"} <= set(kept)
    missing = folded.load_state_dict(kept, strict=False)
    assert set(missing.missing_keys) == set(folded.state_dict()) - set(kept)
    untouched = ("head.weight", "pos", "qkv.2.weight", "fc1.2.weight")
    assert all(torch.equal(folded.state_dict()[k], model.state_dict()[k]) for k in untouched)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_within_its_tolerance(dtype: torch.dtype) -> None:
    model = models.make("residual", ["on", "mixed", "off"], 5).to(dtype)
    x = models.inputs(model, dtype)
    result = fold(model, x)
    assert {t.dtype for t in result.model.state_dict().values()} == {dtype}
    assert len(result.report.folds) >= 4
    error = relative(models.in_float64(result.model, x), models.in_float64(model, x))
    assert error <= LIMIT[dtype]
    assert error == pytest.approx(result.report.max_rel, rel=1) or error < result.report.max_rel


def test_channels_last_and_requires_grad_are_kept() -> None:
    model = models.make("resnet", ["mixed"], 6).to(memory_format=torch.channels_last)
    model.stem.weight.requires_grad_(False)
    folded = fold(model, models.inputs(model)).model
    for name in ("stem", "blocks.0.conv1", "blocks.0.conv2"):
        weight = folded.get_submodule(name).weight
        assert weight.is_contiguous(memory_format=torch.channels_last), name
        assert not weight.is_contiguous(), name
    assert not folded.stem.weight.requires_grad
    assert folded.get_submodule("blocks.0.conv2").weight.requires_grad


def test_graph_module_and_mapping_inputs_are_accepted() -> None:
    model = models.make("residual", ["on", "off"], 7)
    x = models.inputs(model)
    traced = graph.trace(model, x)
    text, before = traced.code, state(traced)
    result = fold(traced, {"x": x})
    assert (traced.code, len(traced.state_dict())) == (text, len(before))
    assert relative(result.model(x), model.eval()(x)) < 1e-5
    assert fold(result.model, (x,)).report.folds == []  # folding is finished after once


def test_cut_network_stays_as_it_was() -> None:
    model = models.make("chain", ["relu", "off", "relu"], 8)
    x = models.inputs(model)
    result = fold(model, x)
    assert [(r.name, r.rule) for r in result.report.refusals] == [("layers.4", "cut")]
    assert result.report.folds == []
    assert result.report.before == result.report.after
    assert torch.equal(result.model(x), model.eval()(x))


def test_rows_and_columns_that_cut_only_together() -> None:
    model = models.make("chain", ["relu"], 9)
    with torch.no_grad():
        model.layers[0].weight[:3] = 0
        model.head.weight[:, 3:] = 0
    result = fold(model, models.inputs(model))
    assert [r.rule for r in result.report.refusals] == ["cut"]
    assert result.report.before == result.report.after


def test_report_reads_well_and_is_json() -> None:
    model = models.make("resnet", ["off", "six"], 10)
    report = fold(model, models.inputs(model)).report
    content = json.loads(report.to_json())
    assert content["after"]["depth"] < content["before"]["depth"]
    assert {f["rule"] for f in content["folds"]} >= {"batch norm", "gate", "constant"}
    text = str(report)
    assert "blocks.0.conv1" in text
    assert "refused" in text
    assert f"{report.before.parameters:,}" in text
    assert 0 < report.max_rel <= 1e-5


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_compiles_and_exports(name: str) -> None:
    model = models.make(name, ["off", "six"], 11)
    x = models.inputs(model)
    folded = fold(model, x).model
    expected = folded(x)
    assert torch.equal(torch.export.export(folded, (x,)).module()(x), expected)
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x), expected) < 1e-6
    assert torch.equal(copy.deepcopy(folded)(x), expected)


# A proof that cannot fail proves nothing


@pytest.mark.parametrize("rule", ["batch norm", "gate", "constant", "absorb", "neurons", "linear"])
def test_a_wrong_rule_is_refused_and_the_model_stays_right(monkeypatch, rule: str) -> None:  # type: ignore[no-untyped-def]
    def wrong(module: nn.Module) -> nn.Module:
        module = copy.deepcopy(module)
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.data = tensor.data * 1.001 + 1e-4
        return module

    def planted(work, node):  # type: ignore[no-untyped-def]
        plan = RULES[rule](work, node)
        if plan is not None:
            plan.modules = {path: wrong(module) for path, module in plan.modules.items()}
            for place, to in plan.becomes.items():
                if isinstance(to, proof.Call):
                    plan.becomes[place] = proof.Call(to.path, wrong(to.module), to.source)
        return plan

    order = list(RULES)  # later rules might find a right way where this one was refused
    earlier = {name: RULES[name] for name in order[: order.index(rule)]}
    model = models.make("resnet" if rule == "batch norm" else "vit", ["off", "mixed"], 15, 0.3)
    x = models.inputs(model)
    assert any(f.rule == rule for f in fold(model, x).report.folds)
    monkeypatch.setattr(fold_module.rules, "RULES", {**earlier, rule: planted})
    result = fold(model, x)
    assert any("relative error of" in r.reason for r in result.report.refusals if r.rule == rule)
    # An identity gate leaves without new weights, so there was nothing to plant in it.
    folds = [f for f in result.report.folds if f.rule == rule and f.detail != "identity"]
    assert folds == []
    assert relative(result.model(x), model.eval()(x)) < 1e-5


def test_the_end_to_end_proof_stops_what_local_proofs_miss(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(proof, "TOLERANCE", {torch.float32: 1.0, torch.float64: 1.0})
    original = fold_module._prove_end_to_end

    def strict(*args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        with monkeypatch.context() as strictly:
            strictly.setattr(proof, "TOLERANCE", {torch.float32: 1e-5, torch.float64: 1e-10})
            original(*args, **kwargs)

    def planted(work, node):  # type: ignore[no-untyped-def]
        plan = RULES["linear"](work, node)
        for module in plan.modules.values() if plan else ():
            module.weight.data *= 1.01
        return plan

    monkeypatch.setattr(fold_module, "_prove_end_to_end", strict)
    monkeypatch.setattr(fold_module.rules, "RULES", {"gate": RULES["gate"], "linear": planted})
    model = models.make("chain", ["on", "relu"], 13)
    with pytest.raises(FoldError, match=r"differs from the unfolded one by .* none is returned"):
        fold(model, models.inputs(model))


def test_user_errors_are_one_sentence() -> None:
    model = models.make("chain", ["on"], 14)
    with pytest.raises(TypeError, match=r"expected an nn.Module \(got str\)"):
        fold("model", torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected example_inputs"):
        fold(model, None)
    with pytest.raises(graph.TraceError, match="does not run on the example inputs"):
        fold(model, torch.zeros(2, 99))


def test_a_model_with_chance_in_it_is_not_folded() -> None:
    class Noisy(models.Chain):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return super().forward(x + torch.rand_like(x))

    with pytest.raises(FoldError, match="deterministic"):
        fold(Noisy(["on"]), torch.zeros(2, 7))
