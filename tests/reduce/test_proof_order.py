"""The figures of a proof do not depend on the order in which a rule lists its sources."""

from __future__ import annotations

import torch
from torch import nn

from layer_collapse.models import ResMLP
from layer_collapse.reduce.fold import fold
from layer_collapse.reduce.work import Plan, Work


def test_the_order_of_sources_changes_nothing(monkeypatch) -> None:
    torch.manual_seed(0)
    model, x = ResMLP((4,), 3, width=5, hidden=6, blocks=3), torch.randn(7, 4)
    nn.init.zeros_(model.blocks[2].fc1.weight)  # its constant goes to block 1, past the sum
    several: list[int] = []
    attempt = Work.attempt

    def permuted(turn: int):
        def attempt_permuted(work: Work, rule: str, plan: Plan):
            several.append(len(plan.sources))
            plan.sources = tuple(sorted(plan.sources, reverse=bool(turn)))
            return attempt(work, rule, plan)

        return attempt_permuted

    reports = []
    for turn in (0, 1):
        monkeypatch.setattr(Work, "attempt", permuted(turn))
        reports.append(fold(model, x).report)
    assert max(several) >= 2
    assert reports[0].folds == reports[1].folds
    assert any(one.max_abs > 0 for one in reports[0].folds)
