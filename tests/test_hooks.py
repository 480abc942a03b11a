"""Forward hooks of what a graph takes apart are named; they never see what is no tensor."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layer_collapse import fold
from layer_collapse.graph import TraceError, trace


class Block(nn.Module):
    """Linear and rectifier; torch.fx looks into it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


class Net(nn.Module):
    """A block, a sequence and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.more = Block(), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.more(self.block(x)))


def test_hooks_that_watch_see_tensors_only_and_are_named_as_lost() -> None:
    model, x, seen = Net().eval(), torch.randn(3, 4), list[Any]()
    for module in (model, model.block, model.more):
        module.register_forward_hook(lambda m, args, y: seen.append(y.detach()))
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    result = fold(model, x)
    assert {type(value) for value in seen} == {Tensor}
    reasons = {r.name: r.reason for r in result.report.refusals if r.rule == "trace"}
    assert set(reasons) == {"Net", "block", "more"}
    assert all("forward hooks, which do not run in the graph" in r for r in reasons.values())
    torch.testing.assert_close(result.model(x), model(x))


def test_what_the_hook_of_a_container_computes_is_part_of_the_graph() -> None:
    model, x = Net().eval(), torch.randn(3, 4)
    model.block.register_forward_hook(lambda m, args, y: y * 2)
    torch.testing.assert_close(fold(model, x).model(x), model(x))


def _root_hook(model: nn.Module) -> None:
    model.register_forward_hook(lambda m, args, y: y * 2)


def _patched(model: nn.Module) -> None:
    model.forward = types.MethodType(lambda self, x: self.head(x), model)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_root_hook, "its own forward hooks change the output; remove them or move them"),
        (_patched, "its forward was replaced on the object; define it in the class"),
    ],
)
def test_what_only_the_object_itself_does_is_refused(change: Any, told: str) -> None:
    model, x = Net().eval(), torch.randn(3, 4)
    change(model)
    for call in (trace, fold):
        with pytest.raises(TraceError, match=told):
            call(model, x)


def test_a_patched_forward_that_computes_the_same_is_traced() -> None:
    model, x = Net().eval(), torch.randn(3, 4)
    model.forward = types.MethodType(Net.forward, model)  # type: ignore[method-assign]
    torch.testing.assert_close(fold(model, x).model(x), model(x))
