"""What a rule proposes: one fold, before it is proven."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from .proof import Call


class Refused(Exception):
    """A fold that is not exact, or not safe; the message is the reason."""


class Slower(Refused):
    """A merge of two layers that takes longer than the two."""


@dataclass
class Plan:
    """One fold, before it is proven.

    Args:
        name: the layer that changes or leaves.
        detail: what happens, for the report.
        sources: values that the changed part of the graph reads; the proof makes them random.
        target: the value that must stay the same.
        modules: new modules by path; what is new in them is float64.
        becomes: nodes that leave, each with the node (or call) that takes its place.
        others: more values that must stay the same.
        arguments: new positional arguments of nodes that read less (a concatenation).
        rule: name for the report where it differs from the rule's own.
        merges: whether two weighted layers become one, which need not be faster: timed on request.
        sized: whether it holds for the spatial size of the example inputs only.
        stepped: whether it then holds for larger ones, too, on which strides end as on that.
    """

    name: str
    detail: str
    sources: tuple[fx.Node, ...]
    target: fx.Node
    modules: dict[str, nn.Module] = field(default_factory=dict)
    becomes: dict[fx.Node, fx.Node | Call] = field(default_factory=dict)
    others: tuple[fx.Node, ...] = ()
    arguments: dict[fx.Node, tuple[Any, ...]] = field(default_factory=dict)
    rule: str = ""
    merges: bool = False
    sized: bool = False
    stepped: bool = False

    def with_modules(self, change: Callable[[str, nn.Module], nn.Module]) -> Plan:
        """The plan with all its new modules changed, by path and module."""
        modules = {path: change(path, module) for path, module in self.modules.items()}
        becomes = {
            node: _changed(to, change) if isinstance(to, Call) else to
            for node, to in self.becomes.items()
        }
        return replace(self, modules=modules, becomes=becomes)


def _changed(call: Call, change: Callable[[str, nn.Module], nn.Module]) -> Call:
    below = call.source
    source = _changed(below, change) if isinstance(below, Call) else below
    return Call(call.path, change(call.path, call.module), source)
