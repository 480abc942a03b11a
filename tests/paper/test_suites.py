"""Which cells there are, and their order."""

from __future__ import annotations

import pytest

from layer_collapse.paper.networks import NETWORKS
from layer_collapse.paper.suites import ARMS, SHORT, SUITES, cells, copied
from layer_collapse.removal import REMOVALS


@pytest.mark.parametrize("quick", [True, False])
def test_the_first_cells_are_every_arm_of_one_network_per_family(quick: bool) -> None:
    found = cells("all", quick)
    first = found[: 3 * len(ARMS)]
    assert {(cell.network, cell.arm) for cell in first} == {
        (networks[0], arm) for networks in SUITES.values() for arm in ARMS
    }
    assert {cell.seed for cell in first} == {0}
    assert len({cell.key("v") for cell in found}) == len(found)
    assert (len(found) == len(first)) == quick


def test_every_network_meets_every_arm_with_three_seeds() -> None:
    found = cells("all", False)
    assert {cell.network for cell in found} == set(NETWORKS)
    for network in NETWORKS:
        for arm in ARMS:
            own = [cell for cell in found if (cell.network, cell.arm) == (network, arm)]
            counts = {cell.remove for cell in own}
            assert {(c.remove, c.seed) for c in own} == {(n, s) for n in counts for s in range(3)}
            assert counts == {0} if arm == "dense" else len(counts) >= 2
    assert set(REMOVALS) <= {cell.arm for cell in found if cell.network == "resnet20"}
    for networks in SUITES.values():
        found_there = {(c.arm, c.seed) for c in found if c.network == networks[0]}
        variants = ["continuous-loss", "continuous-random"]
        if networks[0] == "resnet20":
            variants = [arm for arm in REMOVALS if arm.startswith(("continuous-", "drop-"))]
        assert {(arm, seed) for arm in variants for seed in range(3)} <= found_there
    every = {cell.settings["epochs"] for cell in found if cell.network == "resnet20"}
    assert len(every) == 1 + len(SHORT)  # all arms alike, but for the short runs of continuous


def test_a_shallow_network_comes_after_the_one_that_it_copies() -> None:
    found = cells("all", False)
    places = {cell.key("v"): number for number, cell in enumerate(found)}
    for cell in found:
        if cell.arm == "shallow":
            assert places[copied(cell).key("v")] < places[cell.key("v")]


def test_a_suite_is_a_part_of_all() -> None:
    every = {cell.key("v") for cell in cells("all", False)}
    parts = [{cell.key("v") for cell in cells(suite, False)} for suite in SUITES]
    assert set.union(*parts) == every
    assert sum(map(len, parts)) == len(every)
    with pytest.raises(ValueError, match="expected a suite among cnn, vit, nlp, all"):
        cells("audio", False)
