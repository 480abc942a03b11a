"""One cell of the experiments: build, train under an arm, measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..graph import ordered_inputs, trace
from ..prune.rounds import CutError
from ..reduce.report import size_of
from ..removal import REMOVALS, NotApplicable, Outcome
from ..training import Diverged
from .cells import Cell
from .controls import shallow, train_dense
from .loops import TrainingLoop
from .measure import measure, per_sample
from .networks import NETWORKS, Task

__all__ = ["CONTROLS", "run_cell"]

#: Arms that remove nothing while they train.
CONTROLS = ("dense", "shallow")


def run_cell(
    cell: Cell,
    task: Task,
    gone: Mapping[str, str] | None = None,
    report: Callable[[str], None] = lambda line: None,
    tick: Callable[[float], None] = lambda epochs: None,
) -> dict[str, Any]:
    """Compute one cell.

    Args:
        cell: its settings hold ``epochs``.
        task: the data in the sizes that its settings name.
        gone: for ``shallow``, which rectifiers the copied network has lost, and how.
        report: hears lines of progress.
        tick: hears how many epochs are trained.

    Returns:
        JSON data of :func:`layer_collapse.paper.measure.measure` with the size of the whole network
        and the seconds that the cell took; of an arm that cannot work on this network or whose
        training diverges, "n/a" with the reason; of a cut network, "cut" with what shows it.
    """
    network, epochs = NETWORKS[cell.network], float(cell.settings["epochs"])
    loop = TrainingLoop(
        task.training, task.validation, network.recipe, cell.seed, report=report, tick=tick
    )
    wall, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(cell.seed)
    model = network.build()
    graph = trace(model, loop.example_inputs)
    inputs = ordered_inputs(graph, loop.example_inputs)
    result: dict[str, Any] = {
        "network": per_sample(size_of(graph, inputs), loop.example_inputs),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    try:
        outcome: Outcome
        if cell.arm == "shallow":
            assert gone is not None
            model = shallow(model, gone, loop, cell.seed)
            note = f"architecture of {cell.settings['like']}, every layer with fresh weights"
            outcome = train_dense(model, loop, epochs, note)
        elif cell.arm == "dense":
            outcome = train_dense(model, loop, epochs)
        else:
            outcome = REMOVALS[cell.settings.get("strategy", cell.arm)]().run(
                model, loop, epochs, cell.remove
            )
        result |= measure(outcome, loop, task.test, network.build())
    except (NotApplicable, Diverged) as error:
        result["n/a"] = str(error)
    except CutError as error:
        result["cut"] = str(error)
    result["seconds"] = time.perf_counter() - wall
    result["cpu_seconds"] = time.process_time() - cpu
    return result
