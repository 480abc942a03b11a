"""Which rectifiers leave together, and which cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layer_collapse.graph import trace
from layer_collapse.measure.sites import find_sites
from layer_collapse.models import build
from layer_collapse.removal.units import Unit, find_units, swappable

from .settings import Inverted, Parallel, encoder, resnet, vit


def _units(model: nn.Module, example: object, cut: tuple[str, ...] = ()) -> list[Unit]:
    graph = trace(model, example)  # type: ignore[arg-type]
    return find_units(graph, find_sites(graph), cut)


def test_a_branch_ends_in_its_last_batch_norm() -> None:
    model, loop = resnet()
    assert _units(model, loop.example_inputs) == [
        Unit((f"stages.{i}.0.act1",), (f"stages.{i}.0.conv1",), f"stages.{i}.0.bn2")
        for i in range(3)
    ]


@pytest.mark.parametrize("network", [vit, encoder])
def test_the_mlp_of_a_transformer_block_ends_in_its_second_layer(network: object) -> None:
    model, loop = network()  # type: ignore[operator]
    assert _units(model, loop.example_inputs) == [
        Unit((f"blocks.{i}.act",), (f"blocks.{i}.fc1",), f"blocks.{i}.fc2") for i in range(3)
    ]


def test_two_rectifiers_of_one_branch_leave_together() -> None:
    units = _units(Inverted(), torch.zeros(1, 4, 5, 5))
    assert units == [Unit(("act1", "act2"), ("expand", "depthwise"), "bn3")]


def test_branches_that_would_cut_the_network_together_do_not_both_leave() -> None:
    example = torch.zeros(1, 4)
    assert [unit.exit for unit in _units(Parallel(), example)] == ["left.2", "right.2"]
    assert _units(Parallel(), example, cut=("left.2",)) == []


def test_a_chain_has_no_branch() -> None:
    assert _units(build("mlp", (1, 4, 4), 2), torch.zeros(1, 1, 4, 4)) == []


def test_an_exit_has_a_bias_of_its_own() -> None:
    class Residual(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False)
            self.head = nn.Linear(4, 4)
            if tied:
                self.head.weight = self.fc1.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x + self.fc2(self.act(self.fc1(x))))

    example = torch.zeros(1, 4)
    assert [unit.exit for unit in _units(Residual(tied=False), example)] == ["fc1"]
    assert _units(Residual(tied=True), example) == []


def test_what_can_be_swapped_is_a_module_with_one_call() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.once, self.twice = nn.Linear(4, 4), nn.ReLU(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.twice(self.fc(self.twice(self.fc(x))))
            return self.fc(torch.relu(self.fc(self.once(self.fc(x)))))

    assert swappable(find_sites(trace(Mixed(), torch.zeros(1, 4)))) == {"once": "once"}
