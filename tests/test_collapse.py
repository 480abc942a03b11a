"""The whole loop around somebody's own training code, on real digits."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layer_collapse import (
    CutError,
    Guards,
    MaskedSGD,
    Masks,
    Phase,
    UniformMagnitude,
    checkpoint,
    collapse,
    data,
    keep_pruned,
    load_folded,
    save_folded,
    scan,
)
from layer_collapse.models import ResMLP
from layer_collapse.training import accuracy

DIGITS = data.load("digits", train_samples=400)
SCANNED = data.Batches(DIGITS.train, 150)
EXAMPLE = DIGITS.train.x[:8]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ResMLP((1, 8, 8), 10, width=24, hidden=32, blocks=4)


def optimizer_of(kind: str, model: nn.Module, masks: Masks) -> torch.optim.Optimizer:
    if kind == "masked":
        return MaskedSGD(model.parameters(), 0.05, 0.9, masks=masks)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4)
    if kind == "keep":
        keep_pruned(optimizer, masks)
    return optimizer


def trainer(kind: str, epochs: int = 4) -> Callable[[nn.Module, Masks, Phase], None]:
    def train(model: nn.Module, masks: Masks, phase: Phase) -> None:
        assert model.training
        optimizer = optimizer_of(kind, model, masks)
        for _ in range(epochs):
            for part in torch.randperm(len(DIGITS.train)).split(40):  # torch's own generator
                loss = F.cross_entropy(model(DIGITS.train.x[part]), DIGITS.train.y[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return train


def evaluate(model: nn.Module) -> float:
    return accuracy(model, DIGITS.validation)


def run(kind: str = "masked", model: nn.Module | None = None, **options):
    options = {"rounds": 3, "fraction": 0.85, "guards": Guards(16, 2)} | options
    train = options.pop("train", None) or trainer(kind)
    return collapse(
        model or net(), train, options.pop("evaluate", evaluate), SCANNED, EXAMPLE, **options
    )


@pytest.mark.parametrize("kind", ["masked", "keep"])
def test_layers_leave_with_ones_own_training(kind: str) -> None:
    model, lines = net(), list[str]()
    result = run(kind, model, log=lines.append, observe=lambda m: {"parameters": 1.0})
    assert result.pruned is model
    gone = len(result.linearized.exact)
    assert gone >= 2
    assert result.fold.report.before.rectifiers == 4 - gone
    assert result.fold.report.after.rectifiers == 4 - gone
    assert result.fold.report.after.depth <= 10 - 2 * gone
    assert 0 < result.fold.report.max_rel <= 1e-5 or result.fold.report.max_rel == 0
    assert evaluate(result.model) == pytest.approx(evaluate(model), abs=0.51)
    assert evaluate(model) > 80
    assert not result.model.training
    x = DIGITS.test.x
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model.eval()(x), rtol=1e-4, atol=1e-4)

    assert [(s.phase, s.round) for s in result.history] == [
        ("dense", 0),
        ("prune", 1),
        ("prune", 2),
        ("prune", 3),
    ]
    assert len({s.seed for s in result.history}) == 4
    total = sum(p.numel() for n, p in model.named_parameters() if n.endswith("fc1.weight"))
    assert result.history[0].sparsity == 0
    for before, after in zip(result.history, result.history[1:], strict=False):
        open_ = [row for row in result.entropy if before.entropy[row.name]]
        left = sum(before.alive[f"{row.feeding}.weight"] for row in open_)
        assert sum(before.alive.values()) - sum(after.alive.values()) == round(0.85 * left)
        assert after.sparsity == pytest.approx(1 - sum(after.alive.values()) / total)
    assert all(s.observed == {"parameters": 1.0} for s in result.history)
    assert len(lines) == 4
    assert lines[0].startswith("dense: sparsity 0.00 %, validation accuracy ")
    assert lines[-1].startswith("prune 3: ")
    assert result.stopped == ""
    assert result.entropy.certified
    assert sorted(result.linearized.exact) == sorted(scan(model, SCANNED, EXAMPLE).zero_entropy)
    for name in result.masks.names:
        weight = model.get_parameter(name)
        assert not weight[~result.masks.bool_mask(name)].any()


def test_the_folded_network_is_saved_and_loaded(tmp_path: Path) -> None:
    result = run(rounds=2, fraction=0.93)
    save_folded(result.model, tmp_path / "folded")
    loaded = load_folded(tmp_path / "folded")
    with torch.no_grad():
        assert torch.equal(loaded(EXAMPLE), result.model(EXAMPLE))
    assert torch.export.export(loaded, (EXAMPLE,)) is not None


@pytest.mark.parametrize("strategy", ["magnitude", "uniform", UniformMagnitude()])
def test_other_strategies(strategy) -> None:
    result = run(strategy=strategy, rounds=1)
    alive = result.history[-1].alive
    assert sum(alive.values()) == 4 * 24 * 32 - round(0.85 * 4 * 24 * 32)
    if strategy != "magnitude":
        assert max(alive.values()) - min(alive.values()) <= 1


def test_training_that_revives_weights_is_refused_by_name() -> None:
    phases = []

    def train(model: nn.Module, masks: Masks, phase: Phase) -> None:
        phases.append(str(phase))
        trainer("plain", 1)(model, masks, phase)

    with pytest.raises(RuntimeError, match=r"got \d+ others in 'blocks\.\d\.fc1\.weight'"):
        run(train=train)
    assert phases == ["dense", "prune 1"]


class Plain(nn.Sequential):
    """No way around: whoever lets the floor go cuts it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Flatten(),
            nn.Linear(64, 16),
            nn.ReLU(),
            nn.Linear(16, 16),
            nn.ReLU(),
            nn.Linear(16, 10),
        )


def killing_trainer(at: str) -> Callable[[nn.Module, Masks, Phase], None]:
    """Biases so low that nothing passes: what too much pruning ends in."""

    def train(model: nn.Module, masks: Masks, phase: Phase) -> None:
        trainer("masked", 2)(model, masks, phase)
        if str(phase) == at:
            with torch.no_grad():
                model[3].bias.fill_(-1e6)

    return train


def test_a_round_that_cuts_the_network_is_undone(tmp_path: Path) -> None:
    states: dict[str, dict[str, Tensor]] = {}

    def observe(model: nn.Module) -> dict[str, float]:
        states[str(len(states))] = copy.deepcopy(model.state_dict())
        return {}

    model = Plain()
    result = run(
        model=model, train=killing_trainer("prune 2"), rounds=4, observe=observe, folder=tmp_path
    )
    assert result.stopped.startswith("round 2 cut the network (")
    assert result.stopped.endswith("and was undone")
    assert [s.round for s in result.history] == [0, 1, 2]
    assert result.history[2].note == result.stopped
    assert result.history[2].alive == result.history[1].alive
    assert result.history[2].entropy == result.history[1].entropy
    assert all(torch.equal(v, states["1"][k]) for k, v in model.state_dict().items())
    result.masks.check_()
    assert not result.entropy.cut
    assert evaluate(result.model) == result.history[1].validation_accuracy
    # A second call with the folder does not try the rounds again.
    again = run(
        model=Plain(), train=killing_trainer("never"), rounds=4, observe=observe, folder=tmp_path
    )
    assert again.stopped == result.stopped
    assert again.history == result.history


def test_a_network_cut_before_any_pruning_is_refused() -> None:
    with pytest.raises(CutError, match="the network is cut"):
        run(model=Plain(), train=killing_trainer("dense"), rounds=0)
    with pytest.raises(CutError, match="go back to the round before"):
        run(model=Plain(), train=killing_trainer("dense"))


def test_a_sequential_network_survives_every_round() -> None:
    result = run(model=Plain(), rounds=5, fraction=0.95, guards=Guards(48, 2))
    assert not result.entropy.cut
    assert set(result.history[-1].alive.values()) == {48}
    assert evaluate(result.model) > 30


def test_accept_loss_linearises_more() -> None:
    plain = run(rounds=1)
    result = run(rounds=1, accept_loss=100.0)
    left = {f"blocks.{i}.act" for i in range(4)} - set(plain.linearized.exact)
    assert left
    assert set(result.accepted) == left
    assert set(result.linearized.approximate) == left
    assert result.linearized.exact == plain.linearized.exact
    assert result.fold.report.after.rectifiers == 0
    assert len(result.history) == 2 + len(left)
    assert all("linearised at H = " in s.note for s in result.history[2:])
    assert all(s.note.endswith(", kept") for s in result.history[2:])
    # Lowest entropy first: each was the lowest of what was left when it was chosen.
    assert [s.phase for s in result.history[2:]] == ["accept"] * len(left)
    first = min(plain.history[-1].entropy.items(), key=lambda item: (item[0] not in left, item[1]))
    assert result.accepted[0] == first[0]
    assert result.history[:2] == plain.history
    for name in result.masks.names:  # the pruned network is as it was
        assert torch.equal(result.pruned.get_parameter(name), plain.pruned.get_parameter(name))


def test_accept_loss_rolls_back_what_costs_too_much() -> None:
    """An evaluation that punishes every further gate refuses them all, one after the other."""
    plain = run(rounds=1)

    def strict(model: nn.Module) -> float:
        return 50.0 + sum(type(m) is nn.ReLU for m in model.modules())

    result = run(rounds=1, accept_loss=0.5, evaluate=strict)
    kept = 4 - len(plain.linearized.exact)
    assert result.accepted == []
    assert result.linearized.approximate == ()
    assert [s.note.endswith(", rolled back") for s in result.history[2:]] == [True] * kept
    assert result.fold.report.after.rectifiers == kept
    result.masks.check_()
    with torch.no_grad():
        torch.testing.assert_close(result.model(EXAMPLE), plain.model(EXAMPLE))
    # One gate may be had for one point, not two.
    one = run(rounds=1, accept_loss=1.0, evaluate=strict)
    assert len(one.accepted) == 1
    assert [s.note.rsplit(", ", 1)[1] for s in one.history[2:]].count("kept") == 1


def test_two_runs_are_equal_bit_for_bit() -> None:
    model, other = net(), net()
    first = run(model=model, accept_loss=3.0, rounds=2)
    torch.manual_seed(99)  # what the caller's generator holds does not matter
    second = run(model=other, accept_loss=3.0, rounds=2)
    assert first.history == second.history
    for a, b in ((first.pruned, second.pruned), (first.model, second.model)):
        assert a.state_dict().keys() == b.state_dict().keys()
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert first.accepted == second.accepted
    third = run(rounds=1, seed=1)
    assert third.history[0].seed != first.history[0].seed
    assert third.history[0].entropy != first.history[0].entropy


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    whole = run(rounds=2, settings={"sizes": (1, 2), "x": {"y": None}})

    class Stop(Exception):
        pass

    def interrupted(at: str):
        def train(model: nn.Module, masks: Masks, phase: Phase) -> None:
            trainer("masked")(model, masks, phase)
            if str(phase) == at:
                raise Stop

        return train

    options = {"rounds": 2, "settings": {"sizes": (1, 2), "x": {"y": None}}, "folder": tmp_path}
    lines: list[str] = []
    for at in ("dense", "prune 1", "prune 2"):
        with pytest.raises(Stop):
            run(train=interrupted(at), **options)
    result = run(**options, log=lines.append)
    assert lines[0] == "resumed after prune 1"
    assert result.history == whole.history
    state = whole.pruned.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in result.pruned.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    run(rounds=0, folder=tmp_path, settings={"mine": 1})
    before = (tmp_path / "state.safetensors").read_bytes()
    for options, key in (
        ({"seed": 1}, "seed"),
        ({"fraction": 0.5}, "fraction"),
        ({"strategy": "uniform"}, "strategy"),
        ({"guards": Guards(17, 2)}, "guards"),
        ({"rounds": 1}, "rounds"),
        ({"settings": {"mine": 2}}, "mine"),
        ({"settings": {"mine": 1, "more": 1}}, "more"),
        ({"settings": {}}, "mine"),
    ):
        given = {"rounds": 0, "folder": tmp_path, "settings": {"mine": 1}} | options
        with pytest.raises(ValueError, match=rf"other settings \({key}\); give this run another"):
            run(**given)
    same = {"rounds": 0, "folder": tmp_path, "settings": {"mine": 1}}
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="does not fit this model"):
        run(model=ResMLP((1, 8, 8), 10, width=24, hidden=33, blocks=4), **same)
    tensors, meta = checkpoint.load(tmp_path / "state.safetensors")
    assert (tmp_path / "state.safetensors").read_bytes() == before
    for spoil in ({"history": []}, {"history": [{"round": 0}]}, {"history": None}):
        checkpoint.save(tmp_path / "state.safetensors", tensors, meta | spoil)
        with pytest.raises(ValueError, match="does not fit this model"):
            run(**same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": -1}, r"rounds must be 0 or more \(got -1\)"),
        ({"fraction": 0.0}, "fraction must be above 0 and below 1"),
        ({"fraction": 1.0}, "fraction must be above 0 and below 1"),
        ({"fraction": math.nan}, "fraction must be above 0 and below 1"),
        ({"strategy": "egp"}, "unknown strategy 'egp'"),
        ({"accept_loss": -1.0}, "accept_loss must be 0 or more"),
        ({"accept_loss": math.nan}, "accept_loss must be 0 or more"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))}, "nothing to collapse"),
    ],
)
def test_bad_arguments_are_refused_before_any_training(options, message) -> None:
    def never(*_: object) -> None:
        raise AssertionError("trained")

    with pytest.raises(ValueError, match=message):
        run(train=never, **options)


def test_json_of_the_history_is_plain(tmp_path: Path) -> None:
    result = run(rounds=1, folder=tmp_path)
    _, meta = checkpoint.load(tmp_path / "state.safetensors")
    assert meta["history"] == [vars(step) for step in result.history]
    json.dumps(meta, allow_nan=False)
