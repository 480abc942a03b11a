"""Folding: layers that pruning made linear or constant leave the network, exactly.

The rules are in :mod:`layer_collapse.reduce.rules`; nothing here knows them one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..graph import (
    ExampleInputs,
    carries_data,
    check_traceable,
    ordered_inputs,
    record_shapes,
    trace,
    without_cache,
)
from . import proof, rules, sizes
from .chains import pays_with_more
from .holdings import disown, remove_dead, sharing_copy, tensors
from .latency import Stopwatch, in_turns
from .plan import Plan, Slower
from .proof import FoldError
from .report import Fold, FoldReport, Refusal, size_of
from .rules.constant import cut_off
from .work import BORDERS, Refused, Work

__all__ = ["FoldError", "FoldResult", "fold"]

_LARGER = 4  # places by which inputs grow to see whether a fold depends on their size


@dataclass
class FoldResult:
    """The folded model, in evaluation mode, and what was done to it."""

    model: fx.GraphModule
    report: FoldReport


def fold(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    without: Collection[str] = (),
    border: str = "biasmap",
    always_fold: bool = True,
    prove: bool = True,
    stopwatch: Stopwatch = in_turns,
) -> FoldResult:
    """Fold everything that can be folded exactly; what cannot stays, with its reason.

    Rules, composed in float64 and stored in the model's dtypes (Liao, Quétu, Nguyen, Tartaglione,
    "Layer Collapse Can be Induced by Unstructured Pruning", TMLR 2026):

    * BatchNorm and :class:`~layer_collapse.reduce.gate.AffineGate` into the layer before them, or
      behind them where that is the smaller of two Linear: W' = diag(a) W, b' = a b + c;
    * neurons without weights: their row and the column that reads them leave;
    * two linear layers in a row: W = W2 W1, b = W2 b1 + b2;
    * two convolutions in a row, wherever no padding between them makes that inexact;
    * x + conv(x) and sums of parallel convolutions into one;
    * branches without weights: a constant, taken up by a bias of the residual stream.

    Every fold is proven by itself in float64, with its weights as they will be stored (relative
    error at most 1e-10 for float64, 1e-5 for float32, 2e-3 for float16, 2e-2 for bfloat16), then
    the folded model end to end on the example inputs, on normal noise, with one sample more and,
    where the model takes it, on a second size; where it is wrong at that, it refuses any other than
    the example's. Beyond the model itself this takes the memory of the folded one and of about one
    layer (the largest) more: float64 is for one module at a time.

    Args:
        model: a module in which rectifiers may have been replaced by gates; it is not changed.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments, a few
            samples in the shape the folded model will see.
        without: names of rules to leave out, e.g. "batch norm" where the folded network is to be
            trained further.
        border: what to do where the zero padding of the second of two convolutions makes their
            merging inexact: "biasmap" takes up what does not depend on the data in a map for the
            size of the example inputs, and refuses the rest; "ring" subtracts what is too much at
            the border, for any size; "refuse" keeps both.
        always_fold: merge two weighted layers even where that is slower. With False each merge is
            timed against the two layers, on the device, in the dtypes and shapes of the example
            inputs, and the faster form is kept; what is slower stays, with both times as reason.
        prove: compare the folded with the unfolded model end to end, unless nothing was folded.
            Without, the report says so; the proof of every single fold remains.
        stopwatch: what times two calls against each other, for ``always_fold=False``.

    Returns:
        The folded graph module (names of untouched layers are those of ``model``) and the report.
        A network that would be cut, its output a constant, comes back as it was, with a refusal
        under the rule "cut".

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no example inputs, ``without`` names no rule, or ``border`` is unknown.
        TraceError: the model cannot be traced or does not run on the inputs.
        FoldError: the folded model is not equal to the unfolded one; no model is returned.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold: expected an nn.Module (got {type(model).__name__})")
    if example_inputs is None:
        raise ValueError(
            "fold: expected example_inputs (got None); pass one batch of a few samples"
        )
    if unknown := set(without) - set(rules.RULES):
        raise ValueError(
            f"fold: no rule is called {', '.join(sorted(unknown))}; the rules are "
            f"{', '.join(rules.RULES)}"
        )
    if border not in BORDERS:
        raise ValueError(f"fold: border must be one of {', '.join(BORDERS)} (got {border!r})")
    graph = _traced(model, example_inputs)
    inputs = ordered_inputs(graph, example_inputs)
    work = Work(sharing_copy(graph), border, None if always_fold else stopwatch)
    size = size_of(graph, inputs)
    report = FoldReport(before=size, after=size)
    report.traced_by = graph.meta.get("traced_by", "fx")
    remove_dead(work.module)
    place = cut_off(work)
    if place is None:
        report.folds, report.refusals = _apply_rules(work, without)
        place = cut_off(work)  # rows and columns that are zero together show only now
    if place is not None:
        reason = "nothing leads around this layer: without it the output is a constant"
        report.folds, report.refusals = [], [Refusal(str(place.target), "cut", reason)]
        return FoldResult(_finished(graph, model), report)
    exported = report.traced_by == "export"  # the example's sizes are numbers in such a graph
    folded = work.finished()
    report.proven = prove
    step = 0 if work.fixed or exported else sizes.step_of(graph)
    sized = work.sized or exported
    if report.folds:  # else it is the same graph on the same weights: there is nothing to compare
        if prove:
            by = step if sized else _LARGER
            if not _prove_end_to_end(graph, folded, inputs, report, by):
                sized, step = True, 0
        report.after = size_of(folded, inputs)
    if sized:
        sizes.guard(work, step)
        shapes = [t.shape[1:] for t in tree_leaves(inputs) if isinstance(t, Tensor)]
        report.only_sizes = [list(shape) for shape in shapes]
    hidden = graph.meta.get("hidden", {})
    report.refusals += [Refusal(path, "trace", reason) for path, reason in hidden.items()]
    return FoldResult(_finished(folded, model), report)


def _traced(model: nn.Module, example_inputs: ExampleInputs) -> fx.GraphModule:
    """The model as a graph in evaluation mode that shares its parameters, shapes recorded.

    The graph is what everything is proven against, so it is compared with the model first.
    """
    check_traceable(model)
    model = sharing_copy(model).eval()
    if isinstance(model, fx.GraphModule):
        _simplified(model)
        record_shapes(model, example_inputs)
        return model
    graph = trace(model, example_inputs)
    _simplified(graph)
    got = record_shapes(graph, example_inputs)
    with torch.no_grad(), without_cache(model):
        expected = proof.answer(model, copy.deepcopy(example_inputs))
    if proof.has_nan(expected):
        raise FoldError(
            f"fold: {type(model).__name__} gives NaN on the example inputs, which equals nothing; "
            "look for weights or inputs that are not finite"
        )
    dtypes = [t.dtype for t in model.parameters() if t.is_floating_point()]
    _, error = proof.difference(proof.doubled(got), proof.doubled(expected))
    if not error <= proof.tolerance(dtypes):
        raise FoldError(
            f"fold: the traced graph of {type(model).__name__} differs from the model by "
            f"{error:.1e} on the example inputs; make its forward deterministic in evaluation mode"
        )
    return graph


def _simplified(graph: fx.GraphModule) -> None:
    """Take out what does nothing in evaluation, the mode of folded models.

    That is stochastic depth and the like, and assertions about shapes, which would count as readers
    of the values that they look at.
    """
    for node in list(graph.graph.nodes):
        if node.meta.get("identity"):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.graph.erase_node(node)
        elif node.target is torch._assert and not _reads_data(node):
            graph.graph.erase_node(node)
    graph.recompile()


def _reads_data(node: fx.Node) -> bool:
    """Whether a value depends on more than shapes."""
    if node.op in ("placeholder", "get_attr", "call_module"):
        return True
    return carries_data(node) and any(_reads_data(source) for source in node.all_input_nodes)


def _finished(graph: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """The graph in memory of its own, with the state_dict of the model as far as it goes.

    torch.fx forgets in every copy which buffers the model leaves out of it.
    """
    disown(graph, model)
    own = dict(model.named_modules())
    for path, module in graph.named_modules():
        temporary = own[path]._non_persistent_buffers_set if path in own else set[str]()
        module._non_persistent_buffers_set |= temporary & set(module._buffers)
    return graph


def _apply_rules(work: Work, without: Collection[str]) -> tuple[list[Fold], list[Refusal]]:
    """Try the rules on every node until none applies; refusals are those of the last round."""
    folds: list[Fold] = []
    while True:
        refusals: list[Refusal] = []
        before = len(folds)
        for name, rule in rules.RULES.items():
            if name in without:
                continue
            nodes = list(work.module.graph.nodes)
            if name in rules.FIRST:
                nodes.sort(key=partial(rules.FIRST[name], work))
            for node in nodes:
                if node.op == "placeholder" or node._erased:
                    continue
                place = str(node.target) if node.op == "call_module" else node.name
                try:
                    plan = rule(work, node)
                    if plan is not None:
                        place = plan.name
                        folds.append(_attempted(work, name, plan))
                except Refused as refused:
                    refusals.append(Refusal(place, name, str(refused)))
        if len(folds) == before:
            return folds, refusals


def _attempted(work: Work, rule: str, plan: Plan) -> Fold:
    try:
        return work.attempt(rule, plan)
    except Slower:
        if not pays_with_more(work, plan, lambda trial: _apply_rules(trial, ())):
            raise
        return work.attempt(rule, plan)


def _prove_end_to_end(
    unfolded: fx.GraphModule, folded: fx.GraphModule, inputs: list[Any], report: FoldReport, by: int
) -> bool:
    """Compare on the example, on noise, with one sample more and, for ``by`` > 0, on larger inputs.

    Returns:
        False where it is wrong at another size that the model takes; that holds for no other batch.
    """
    reference, candidate = proof.Float64(unfolded), proof.Float64(folded)
    generator = torch.Generator().manual_seed(1)
    limit = proof.tolerance([t.dtype for t in tensors(unfolded).values() if t.is_floating_point()])
    for number, sample in enumerate([proof.doubled(inputs), proof.noise(inputs, generator)]):
        try:
            expected = reference.run(*copy.deepcopy(sample))
        except Exception as error:
            raise FoldError(
                "fold: the unfolded model does not run in float64, in which folds are proven "
                f"({proof.first_line(error)}); keep casts to a fixed dtype out of its forward"
            ) from error
        if number and proof.has_nan(expected):
            continue  # noise that the model itself cannot digest proves nothing
        try:
            got = candidate.run(*copy.deepcopy(sample))
        except Exception as error:
            raise FoldError(
                f"fold: the folded model does not run ({proof.first_line(error)}), so none is "
                "returned; fold fewer layers"
            ) from error
        max_abs, max_rel = proof.difference(got, expected)
        if not max_rel <= limit:
            raise FoldError(
                f"fold: the folded model differs from the unfolded one by {max_rel:.1e} relative "
                f"(limit {limit:.0e}), so none is returned; fold fewer layers or store the model "
                "in a wider dtype"
            )
        _note(report, sample, max_abs, max_rel)

    def holds(growth: sizes.Growth) -> bool | None:
        """Whether it does in another size; None where the model does not take that."""
        sample = sizes.larger(inputs, growth, generator)
        try:
            expected = reference.run(*copy.deepcopy(sample))
        except Exception:
            return None
        if proof.has_nan(expected):
            return None
        try:
            got = candidate.run(*copy.deepcopy(sample))
        except Exception:
            return False
        max_abs, max_rel = proof.difference(got, expected)
        if max_rel <= limit:
            _note(report, sample, max_abs, max_rel)
        return max_rel <= limit

    if holds(sizes.batch_growth(inputs)) is False:
        raise FoldError(
            "fold: the folded model is wrong for another number of samples than the example's, so "
            "none is returned; keep what depends on that number out of layers that are constant"
        )
    return all(
        next((answer for answer in map(holds, ways) if answer is not None), True)
        for ways in (sizes.other_sizes(inputs, by) if by else ())
    )


def _note(report: FoldReport, sample: Any, max_abs: float, max_rel: float) -> None:
    report.max_abs = max(report.max_abs, max_abs)
    report.max_rel = max(report.max_rel, max_rel)
    shapes = [list(t.shape) for t in tree_leaves(sample) if isinstance(t, Tensor)]
    report.checked_sizes.append(shapes)
