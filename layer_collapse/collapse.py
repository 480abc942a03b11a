"""The whole method: rounds of measure, prune, retrain; then linearise, fold and prove.

Liao, Quétu, Nguyen, Tartaglione, "Layer Collapse Can be Induced by Unstructured Pruning", TMLR
2026.
The training loop is the caller's; this module decides what is pruned when, never how to train.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from . import checkpoint
from .graph import ExampleInputs, rectifier_nodes, trace
from .measure.report import EntropyReport
from .measure.scan import Batch, scan
from .measure.sites import find_sites
from .prune.masks import Masks
from .prune.rounds import CutError, Guards, candidate_weights, check_fraction, prune_round
from .prune.strategies import Strategy
from .prune.strategies import strategy as strategy_named
from .reduce.fold import FoldResult, fold
from .reduce.linearize import Linearized, linearize


@dataclass(frozen=True)
class Phase:
    """What the training callable is asked for.

    Attributes:
        kind: "dense" (before any pruning), "prune" (after the pruning of a round) or "accept"
            (fine-tune after a rectifier was linearised approximately).
        number: round, from 1 for "prune" and "accept"; 0 for "dense".
        seed: torch's generator has been seeded with it; the same in every repetition of the run.
    """

    kind: str
    number: int
    seed: int

    def __str__(self) -> str:
        return self.kind if self.kind == "dense" else f"{self.kind} {self.number}"


Train = Callable[[nn.Module, Masks, Phase], None]
Evaluate = Callable[[nn.Module], float]
Observe = Callable[[nn.Module], dict[str, float]]


@dataclass
class Step:
    """The state after one phase: sparsity of the candidates, accuracy and entropies (bits).

    ``observed`` is what the caller's ``observe`` saw; no choice depends on it.
    """

    round: int
    phase: str
    seed: int
    sparsity: float
    validation_accuracy: float
    entropy: dict[str, float | None]
    alive: dict[str, int]
    note: str = ""
    observed: dict[str, float] = field(default_factory=dict)


@dataclass
class CollapseResult:
    """What :func:`collapse` returns.

    Attributes:
        model: the folded network, in evaluation mode: an ordinary module.
        pruned: the model given, pruned and retrained, with all its rectifiers.
        linearized: its copy with gates, before folding.
        fold: every fold with its proof, every refusal with its reason.
        entropy: the certifying scan of ``pruned``.
        history: one :class:`Step` per phase.
        masks: which weights of ``pruned`` are alive.
        accepted: rectifiers linearised approximately within ``accept_loss``.
        stopped: why pruning ended before the last round, else "".
    """

    model: fx.GraphModule
    pruned: nn.Module
    linearized: Linearized
    fold: FoldResult
    entropy: EntropyReport
    history: list[Step]
    masks: Masks
    accepted: list[str] = field(default_factory=list)
    stopped: str = ""


class _Run:
    """One run of the loop with its state on disk after every phase."""

    def __init__(
        self,
        model: nn.Module,
        train: Train,
        evaluate: Evaluate,
        data: Iterable[Batch],
        example_inputs: ExampleInputs,
        settings: dict[str, Any],
        folder: Path | None,
        observe: Observe,
        log: Callable[[str], None],
    ) -> None:
        self.model, self.train, self.evaluate, self.observe = model, train, evaluate, observe
        self.data, self.example_inputs, self.log = data, example_inputs, log
        self.settings, self.seed = settings, int(settings["seed"])
        self.file = None if folder is None else folder / "state.safetensors"
        self.sites = find_sites(trace(model, example_inputs))
        weights = candidate_weights(model, self.sites)
        if not weights:
            reasons = "; ".join(f"{site.name}: {site.why_not}" for site in self.sites)
            raise ValueError(
                f"no rectifier of this model is fed by a layer of its own alone, so there is "
                f"nothing to collapse ({reasons or 'it has no rectifier'})"
            )
        self.masks = Masks(weights)
        self.history: list[Step] = []
        self.stopped = ""

    def scan(self, model: nn.Module | None = None) -> EntropyReport:
        return scan(model or self.model, self.data, self.example_inputs)

    def train_phase(self, model: nn.Module, phase: Phase) -> None:
        torch.manual_seed(phase.seed)
        model.train()
        self.train(model, self.masks, phase)
        self.masks.check_()

    def phase(self, kind: str, number: int) -> Phase:
        kinds = {"dense": 0, "prune": 1, "accept": 2}
        return Phase(kind, number, (self.seed * 3 + kinds[kind]) * 10_000 + number)

    def record(self, model: nn.Module, phase: Phase, report: EntropyReport, note: str = "") -> Step:
        step = Step(
            round=phase.number,
            phase=phase.kind,
            seed=phase.seed,
            sparsity=self.masks.sparsity(),
            validation_accuracy=self.evaluate(model),
            entropy={r.name: r.entropy if math.isfinite(r.entropy) else None for r in report},
            alive={name: self.masks.alive(name) for name in self.masks.names},
            note=note,
            observed=self.observe(model),
        )
        self.history.append(step)
        self.log(
            f"{phase}: sparsity {100 * step.sparsity:.2f} %, validation accuracy "
            f"{step.validation_accuracy:.2f} %, {len(report.zero_entropy)} of {len(report)} "
            "rectifiers at zero entropy" + (f"; {note}" if note else "")
        )
        return step

    def save(self) -> None:
        if self.file is None:
            return
        words = {name: self.masks.words(name) for name in self.masks.names}
        tensors = checkpoint.with_prefix("model.", self.model.state_dict())
        tensors |= checkpoint.with_prefix("mask.", words)
        meta = {
            "settings": self.settings,
            "history": [vars(step) for step in self.history],
            "stopped": self.stopped,
        }
        checkpoint.save(self.file, tensors, meta)

    def resume(self) -> None:
        """Take up the state of an interrupted run, if there is one."""
        if self.file is None or not self.file.exists():
            return
        tensors, meta = checkpoint.load(self.file)
        saved = meta.get("settings")
        if saved != self.settings:
            mine, other = self.settings, saved if isinstance(saved, dict) else {}
            absent = object()
            differ = [k for k in mine | other if mine.get(k, absent) != other.get(k, absent)]
            raise ValueError(
                f"{self.file} belongs to a run with other settings ({', '.join(differ)}); "
                "give this run another folder, or delete that one"
            )
        try:
            self.model.load_state_dict(checkpoint.without_prefix("model.", tensors))
            self.masks.load_words(checkpoint.without_prefix("mask.", tensors))
            self.history = [Step(**step) for step in meta["history"]]
            self.stopped = str(meta["stopped"])
            if not self.history:
                raise ValueError("it holds no phase")
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self.file} does not fit this model ({reason}); give this run another folder, or "
                "delete that one"
            ) from error
        self.log(f"resumed after {self.history[-1].phase} {self.history[-1].round}")

    def prune(self, rounds: int, fraction: float, strategy: Strategy, guards: Guards) -> None:
        """The dense phase and the pruning rounds that are not done yet."""
        if not self.history:
            phase = self.phase("dense", 0)
            self.train_phase(self.model, phase)
            self.record(self.model, phase, self.scan())
            self.save()
        done = self.history[-1].round
        report = self.scan() if done < rounds and not self.stopped else None
        for number in range(done + 1, rounds + 1):
            if self.stopped or report is None:
                break
            phase = self.phase("prune", number)
            before = copy.deepcopy(self.model.state_dict()), self.masks.clone()
            prune_round(self.model, self.masks, report, self.sites, fraction, strategy, guards)
            self.train_phase(self.model, phase)
            report = self.scan()
            if report.cut:
                self.stopped = f"round {number} cut the network ({report.cut_by}) and was undone"
                self.model.load_state_dict(before[0])
                self.masks.load_words({n: before[1].words(n) for n in before[1].names})
                report = self.scan()
                self.record(self.model, phase, report, note=self.stopped)
            else:
                self.record(self.model, phase, report)
            self.save()

    def accept(self, start: Linearized, points: float) -> tuple[Linearized, list[str]]:
        """Linearise further rectifiers from the lowest entropy up while accuracy allows.

        Deterministic from the pruned state, so an interrupted run repeats it with equal results.
        """
        current, accepted, refused = start, list[str](), set[str]()
        floor = self.evaluate(start.model) - points
        while rectifier_nodes(current.model):
            report = self.scan(current.model)
            left = [r for r in report if r.candidate and r.name not in refused and r.positions]
            if not left:
                break
            row = min(left, key=lambda r: r.entropy)
            phase = self.phase("accept", len(accepted) + len(refused) + 1)
            tried = linearize(
                current.model, report, self.example_inputs, names=[row.name], tolerance=math.inf
            )
            weights = dict(tried.model.named_parameters())
            masks, self.masks = self.masks, self.masks.clone()
            self.masks.rebind({name: weights[name] for name in self.masks.names})
            self.train_phase(tried.model, phase)
            note = f"{row.name} linearised at H = {row.entropy:.4f} bits"
            step = self.record(tried.model, phase, report, note)
            kept = step.validation_accuracy >= floor
            step.note += ", kept" if kept else ", rolled back"
            if kept:
                accepted.append(row.name)
                current = Linearized(tried.model, start.exact, tuple(accepted), tried.kept)
            else:
                refused.add(row.name)
                self.masks = masks
        return current, accepted


def collapse(
    model: nn.Module,
    train: Train,
    evaluate: Evaluate,
    data: Iterable[Batch],
    example_inputs: ExampleInputs = None,
    *,
    strategy: str | Strategy = "entropy",
    rounds: int = 5,
    fraction: float = 0.75,
    guards: Guards | None = None,
    accept_loss: float | None = None,
    seed: int = 0,
    folder: Path | str | None = None,
    settings: dict[str, Any] | None = None,
    observe: Observe = lambda model: {},
    log: Callable[[str], None] = lambda line: None,
) -> CollapseResult:
    """Make a network lose layers.

    First a dense phase, then ``rounds`` times: measure the entropies on all of ``data``, prune
    ``fraction`` of the candidates' alive weights where the strategy says, retrain with the masks.
    Then rectifiers of exactly zero entropy become gates, and the network is folded and proven.

    Args:
        model: trained in place (it ends up pruned); any model that torch.fx traces.
        train: ``train(model, masks, phase)`` trains for one phase and keeps pruned weights at zero:
            use :class:`MaskedSGD` or :class:`MaskedAdamW` with ``masks=masks``, or
            :func:`keep_pruned` on another optimiser. It returns at once where a phase needs no
            training. For equal results after an interruption it must depend on nothing but its
            arguments and torch's generator.
        evaluate: ``evaluate(model)`` gives the validation accuracy in percent.
        data: re-iterable batches of the training split, for the scans.
        example_inputs: one batch of inputs; needed for folding.
        strategy: "entropy", "magnitude", "uniform" or a :class:`Strategy`.
        fraction: share of the alive candidate weights pruned per round, above 0 and below 1.
        accept_loss: also linearise rectifiers of the lowest entropy, one by one with a fine-tune
            each, while validation accuracy stays within so many points; None for none.
        folder: keeps the state after every phase; the same call goes on after an interruption.
        settings: what else identifies this run in ``folder``; JSON data.
        observe: figures to note in the history after every phase (e.g. test accuracy).
        log: receives one line per phase.

    Raises:
        ValueError: nothing to collapse, bad arguments, or ``folder`` holds another run.
        RuntimeError: ``train`` revived pruned weights; names them.
    """
    if rounds < 0:
        raise ValueError(f"rounds must be 0 or more (got {rounds})")
    check_fraction(fraction)
    if accept_loss is not None and not accept_loss >= 0:
        raise ValueError(f"accept_loss must be 0 or more (got {accept_loss})")
    chosen, guards = strategy_named(strategy), guards or Guards()
    identity = {
        "strategy": repr(chosen),
        "rounds": rounds,
        "fraction": fraction,
        "guards": repr(guards),
        "seed": seed,
        **(settings or {}),
    }
    identity = json.loads(json.dumps(identity, allow_nan=False))  # as a checkpoint gives it back
    folder = None if folder is None else Path(folder)
    run = _Run(model, train, evaluate, data, example_inputs, identity, folder, observe, log)
    run.resume()
    run.prune(rounds, fraction, chosen, guards)
    model.eval()
    report = run.scan()
    if report.cut:
        raise CutError(f"the network is cut ({report.cut_by}); nothing can be said of its layers")
    linear = linearize(model, report, example_inputs)
    masks, accepted = run.masks, list[str]()
    if accept_loss is not None:
        linear, accepted = run.accept(linear, accept_loss)
    linear.model.eval()
    result = fold(linear.model, example_inputs)
    return CollapseResult(
        model=result.model,
        pruned=model,
        linearized=linear,
        fold=result,
        entropy=report,
        history=run.history,
        masks=masks,
        accepted=accepted,
        stopped=run.stopped,
    )
