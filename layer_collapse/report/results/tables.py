"""The experiments as markdown."""

from __future__ import annotations

import math
import statistics
from typing import Any

from ...paper.suites import SHORT
from ..text import format_value
from .summary import BANDS, gone, is_variant, on_common_seeds

__all__ = ["figures_of", "page"]

_HEAD = (
    "arm",
    "asked",
    "off",
    "test accuracy (%)",
    "to dense",
    "validation",
    "empty",
    "one-sided",
    "left as",
    "depth",
    "MACs",
    "time, batch 1",
    "time, batch 64",
    "changed",
    "seeds",
)


def page(content: dict[str, Any]) -> str:
    """All networks: their figures and tables, and what entropy has to do with sparsity."""
    networks = content["networks"]
    parts = [_opening(content), _within(networks), _against(networks), _correlations(networks)]
    parts += [_network(name, network) for name, network in networks.items()]
    return "\n\n".join(parts)


#: What each arm does, in a line; docs/removal.md says more.
_ARMS = """\
- `dense`: nothing leaves
- `continuous`: ours. In one training run branches become constants where that costs little, and
  rectifiers become linear elsewhere, by loss x entropy. Variants: `-loss`, `-entropy`, `-random`,
  another order; `-constant`, `-linear`, one form alone; `-once`, each at once; `-0.7`, `-0.33`, on
  so many of the epochs
- `drop`: early in one training run the branches that cost the least loss become constants, at once;
  `drop-linear`: rectifiers become linear instead
- `entropy`: the paper's method (EGP, NEPENTHE). Rounds of pruning and retraining, with more of the
  budget for layers of low entropy; `entropy-active`: EGP's other mean of |w|
- `magnitude`, `uniform`: the same with one threshold for all layers, or one share in each
- `easier`, `tlc`: one rectifier after another becomes the identity, by entropy or by the batch norm
  before it, with training between
- `shallow`: the architecture that `continuous` ended with, trained from scratch
"""


def _opening(content: dict[str, Any]) -> str:
    quick = " **A smoke test on few data: no evidence.**" if content["quick"] else ""
    return (
        f"Written by `{content['command']}` from the cells of code version `{content['code']}` "
        f"(torch {content['torch']}); the numbers are those of [results.json](results.json)."
        f"{quick}\n\n"
        f"{_ARMS}\n"
        "Every arm is asked for a number of rectifiers and has a number of epochs. "
        "Accuracies are mean ± sample deviation over the seeds, on a test set that took part in no "
        "choice; *to dense* is over the seeds that both have. *Off* counts rectifiers that are "
        "gone from the folded network, *empty* and *one-sided* those that the final scan found at "
        "exactly zero entropy. *Time* is processor time of one thread for the folded network, as a "
        "part of what the whole network needs unfolded, taken in turns, mean ± deviation; that of "
        "`dense` is what folding alone gives, and how far rows of equal MACs differ is the noise. "
        "*Changed* counts test samples on which folding changed the prediction. A network whose "
        "output no longer depends on its input is *cut*: its layers do not count as removed.\n\n"
        "![accuracy against rectifiers removed, all networks](frontier.svg)"
    )


_POINT = 1.0  # percentage points of accuracy
_COMPARED = ("continuous", "drop", "entropy", "magnitude", "shallow")


def _within(networks: dict[str, Any]) -> str:
    """What each arm reaches at nearly the dense network's accuracy."""
    most, least = [], []
    for name, network in networks.items():
        rows = network["rows"]
        if dense := _dense(rows):
            asked = max(row["asked"] for row in rows)
            most.append([name, str(asked), *(_most(rows, arm, dense) for arm in _COMPARED)])
            macs = network["whole"]["macs"]
            least.append([name, *(_least(rows, arm, dense, macs) for arm in _COMPARED)])
    return (
        "## What leaves within a point of the dense network\n\n"
        "Of the rows below, those whose accuracy on the validation split is at most "
        f"{_POINT:g} point under the dense network's, all trained for as many epochs. First table: "
        "the most rectifiers gone, next to the most that any arm was asked for. Second table: the "
        "least multiply-adds, in % of the unpruned network's. In brackets what that row's accuracy "
        "on the test set is relative to dense. Means over the seeds that both have. A shallow "
        "network is counted as what it copies. 0 or 100 %: no such row; -: not run yet.\n\n"
        + table(("network", "asked", *_COMPARED), most)
        + "\n\n"
        + table(("network", *_COMPARED), least)
    )


def _dense(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next((row for row in rows if row["arm"] == "dense" and "off" in row), {})


def _most(rows: list[dict[str, Any]], arm: str, dense: dict[str, Any]) -> str:
    """The most rectifiers gone within a point of dense."""
    near = _near(rows, arm, dense)
    if isinstance(near, str):
        return near
    if not near:
        return "0"
    best = max(near, key=gone)
    return f"{gone(best):.3g} ({_mean_difference(best, dense, 'test'):+.1f})"


def _least(rows: list[dict[str, Any]], arm: str, dense: dict[str, Any], whole: float) -> str:
    """The least multiply-adds within a point of dense."""
    near = _near(rows, arm, dense)
    if isinstance(near, str):
        return near
    if not near:
        return "100 %"
    best = min(near, key=lambda row: row["macs"])
    return f"{100 * best['macs'] / whole:.0f} % ({_mean_difference(best, dense, 'test'):+.1f})"


def _near(
    rows: list[dict[str, Any]], arm: str, dense: dict[str, Any]
) -> list[dict[str, Any]] | str:
    """Rows of an arm within a point of dense, or the word for why there is none to ask."""
    own = [row for row in rows if row["arm"] == arm and on_common_seeds(row, dense)]
    if not own:
        return "n/a" if any(row["arm"] == arm and "off" not in row for row in rows) else "-"
    least = -_POINT - 1e-9  # accuracies are sums of shares: one point is not always 1.0
    return [row for row in own if _mean_difference(row, dense, "validation") >= least]


def _mean_difference(ours: dict[str, Any], theirs: dict[str, Any], key: str) -> float:
    return statistics.mean(a - b for a, b in on_common_seeds(ours, theirs, key))


def _against(networks: dict[str, Any]) -> str:
    """Claim by claim: accuracy that continuous has over each rival, seed by seed."""
    rivals = ("entropy", "magnitude", "easier", "drop", "shallow")
    rows = []
    for name, network in networks.items():
        by_key = {(row["arm"], row["asked"]): row for row in network["rows"]}
        for asked in dict.fromkeys(a for arm, a in by_key if arm == "continuous"):
            ours = by_key["continuous", asked]
            reached = by_key.get(("entropy", asked), {})
            rows.append(
                [
                    name,
                    str(asked),
                    *(_difference(ours, by_key.get((arm, asked), {})) for arm in rivals),
                    *(_difference(by_key.get((arm, asked), {}), reached) for arm in SHORT),
                ]
            )
    return (
        "## What `continuous` is better by\n\n"
        "Points of test accuracy over each rival that was asked for as many rectifiers, mean ± "
        "sample deviation of the differences seed by seed (number of seeds; how many rectifiers "
        "the rival removed, where that is another number). **Bold** from three seeds on where a t "
        "test tells the mean from zero at 95 %: one of twenty such tests errs, and there are many "
        "here. The spread over seeds leaves out that all seeds share their training and "
        f"test samples. Last columns: {' and '.join(f'`{a}`' for a in SHORT)}, "
        "trained for so many of the epochs, over `entropy` with all of them.\n\n"
        + table(("network", "asked", *rivals, *(f"{p} to entropy" for p in SHORT.values())), rows)
    )


_T = {3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 % of Student's t, by number of values


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Mean and sample deviation over the seeds that both have."""
    found = [a - b for a, b in on_common_seeds(ours, theirs)]
    if not found:
        return "-"
    text, number = f"{statistics.mean(found):+.1f}", len(found)
    if number > 1:
        deviation = statistics.stdev(found)
        text += f" ± {deviation:.1f}"
        if abs(statistics.mean(found)) > _T.get(number, math.inf) * deviation / number**0.5:
            text = f"**{text}**"
    other = "" if gone(theirs) == gone(ours) else f"; {gone(theirs):.3g} off"
    return f"{text} ({number}{other})"


def _correlations(networks: dict[str, Any]) -> str:
    arms = ("magnitude", "entropy", "continuous")
    rows = []
    for name, network in networks.items():
        cells = [name]
        for arm in arms:
            found = network["correlation"].get(arm)
            cells.append(f"{found['rho']:.2f} ({found['points']:,})" if found else "-")
            within = found and found["within"] is not None
            cells.append(f"{found['within']:.2f} ({found['layers']})" if within else "-")
        rows.append(cells)
    late = [
        [
            name,
            *("-" if found["bands"][b] is None else f"{found['bands'][b]:.2f}" for b in BANDS),
        ]
        for name, network in networks.items()
        if (found := network["correlation"].get("magnitude"))
    ]
    return (
        "## Entropy against sparsity\n\nSpearman's rank correlation of a layer's entropy with the "
        "share of its weights that are zero, at the first count that the arm was asked for: of "
        "all layers, measurements and seeds together (number of pairs), and the median of those of "
        "each layer of each seed by itself (number of layers). Entropy-guided budgets follow the "
        "entropy, so theirs is in part by construction; magnitude's do not.\n\n"
        + table(("network", *(head for arm in arms for head in (arm, "each layer"))), rows)
        + "\n\nMean entropy (bits) of the layers of that sparsity under magnitude pruning:\n\n"
        + table(("network", *BANDS), late)
    )


def _network(name: str, network: dict[str, Any]) -> str:
    whole = network["whole"]
    rows = network["rows"]
    dense = _dense(rows)
    epochs = ", ".join(f"{arms} {count:g}" for arms, count in _by_epochs(network["epochs"]).items())
    text = [f"## {name}", f"{network['about']}. Epochs: {epochs}."]
    if whole:
        text[-1] += (
            f" The whole network: {whole['rectifiers']} rectifiers, depth {whole['depth']}, "
            f"{whole['parameters']:,} parameters, {whole['macs']:,} MACs."
        )
    if network["before_ms"]:
        times = (
            f"{format_value(ms, 'ms')} at batch {size}" for size, ms in network["before_ms"].items()
        )
        text[-1] += f" Unfolded it takes {', '.join(times)} (median of what the cells saw)."
    if dense and network["test_samples"]:
        share = dense["test_accuracy"]["mean"] / 100
        error = 100 * math.sqrt(share * (1 - share) / network["test_samples"])
        text[-1] += (
            f" One accuracy on {network['test_samples']:,} test samples is uncertain by "
            f"{error:.1f} points (one standard error), which all seeds share."
        )
    text[-1] += f" All cells so far: {network['cpu_minutes']:.1f} CPU minutes."
    shown = figures_of(network)
    text.append("\n".join(f"![{title}, {name}]({name}-{key}.svg)" for key, title in shown.items()))
    text.append(table(_HEAD, [_line(row, dense) for row in rows]))
    if notes := _notes(rows):
        text.append("\n".join(notes))
    return "\n\n".join(text)


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """What arms say of their cells, each once, with the counts that it was said of."""
    missing = [
        f"- {row['arm']}: n/a, {row['not_applicable']}" for row in rows if row["not_applicable"]
    ]
    asked: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for note in row["notes"]:
            asked.setdefault((row["arm"], note), []).append(str(row["asked"]))
    return list(dict.fromkeys(missing)) + [
        f"- {arm}, {' and '.join(counts)} asked: {note}" for (arm, note), counts in asked.items()
    ]


#: The figures of each network.
FIGURES = {
    "frontier": "accuracy against rectifiers removed",
    "macs": "accuracy against multiply-adds",
    "ablations": "accuracy of the variants",
    "entropy": "entropy of each layer over the epochs",
    "correlation": "entropy against sparsity",
    "sparsity": "sparsity of each layer",
    "latency": "latency",
    "gates": "neurons by what they do",
}


def figures_of(network: dict[str, Any]) -> dict[str, str]:
    """Titles by file; variants are drawn where some were run."""
    some = any(is_variant(row["arm"]) for row in network["rows"])
    return {key: title for key, title in FIGURES.items() if some or key != "ablations"}


def _by_epochs(epochs: dict[str, float]) -> dict[str, float]:
    """Arms that train equally long, named together."""
    together: dict[float, list[str]] = {}
    for arm, count in epochs.items():
        together.setdefault(count, []).append(arm)
    most = max(together, key=lambda count: len(together[count]))
    apart = {
        ", ".join(arms): count
        for count, arms in together.items()
        if count != most or len(arms) == 1
    }
    if len(together[most]) == 1:
        return apart
    return apart | {"all other arms" if apart else "all arms": most}


def _line(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    few = f"{row['whole']} of " if row["whole"] < row["seeds"] else ""
    begin, end = [row["arm"], str(row["asked"] or "-")], [f"{few}{row['seeds']}"]
    empty = len(_HEAD) - len(begin) - len(end)
    if "off" not in row:
        return begin + ["cut" if row["cut"] else "n/a"] + ["-"] * (empty - 1) + end
    off, accuracy = row["off"], row["test_accuracy"]
    cut = f", {row['cut']} cut" if row["cut"] else ""
    return [
        *begin,
        f"{off['mean']:.3g}",
        _spread(accuracy),
        f"{_mean_difference(row, dense, 'test'):+.1f}" if on_common_seeds(row, dense) else "-",
        _spread(row["validation_accuracy"]),
        f"{row['empty']:.3g}",
        f"{row['one_sided']:.3g}",
        ", ".join(f"{count:.3g} {kind}" for kind, count in row["kinds"].items()) or "-",
        f"{row['depth']:.3g}",
        format_value(round(row["macs"]), "count"),
        *(_ratio(row["latency"][size]) for size in ("1", "64")),
        str(row["changed_predictions"]),
        end[0] + cut,
    ]


def _spread(value: dict[str, Any]) -> str:
    deviation = "" if value["deviation"] is None else f" ± {value['deviation']:.1f}"
    return f"{value['mean']:.1f}{deviation}"


def _ratio(latency: dict[str, Any]) -> str:
    deviation = latency["ratio"]["deviation"]
    return f"{latency['ratio']['mean']:.2f}{'' if deviation is None else f' ± {deviation:.2f}'}"


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """A markdown table; numbers stand on the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)
