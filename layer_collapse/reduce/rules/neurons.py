"""Channels that do not depend on the input: their rows and the columns that read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ..channels import Channels, channels, unread
from ..gate import smallest_form
from ..layers import (
    CONV,
    constant_rows,
    past_borders,
    per_channel,
    selected,
    with_tensors,
    without_channels,
)
from ..layouts import Layout
from ..passing import concatenated, is_concatenation
from ..work import Plan, Refused, Work


def neurons(work: Work, node: fx.Node) -> Plan | None:
    """A row of zeros makes channel i the constant c_i: W2 x = W2[:, live] x[live] + W2 c.

    The row leaves with column i of every layer that reads it, and with its entry in everything
    between (batch norms, gates, depthwise convolutions); what c_i sends goes into the readers'
    biases. In a residual stream a channel leaves if it is constant wherever the stream is read;
    then it leaves all layers that write to the stream. Grouped convolutions lose whole groups or as
    many channels in each. In front of zero padding only channels with c_i = 0 can leave. A channel
    that all readers multiply by zero leaves too. A concatenation loses values that have no
    channel left.
    """
    if type(work.called(node)) not in (nn.Linear, *CONV):
        return None
    found = channels(work)
    if node not in found.layouts or not len(found.layouts[node].ids):
        return None
    stream = int(found.streams[found.layouts[node].ids[0]])
    writers = found.writers[stream]
    if writers[0] is not node:
        return None  # one plan for all layers that write to the stream
    return _Removal(work, found, stream, writers).plan()


class _Removal:
    """The channels of one stream that can leave together."""

    def __init__(self, work: Work, found: Channels, stream: int, writers: list[fx.Node]) -> None:
        self.work = work
        self.found = found
        self.writers = writers
        self.dead = found.removable & (found.streams == stream)  # by class
        self.reasons: list[tuple[Tensor, str]] = list(found.reasons)
        self.extra: dict[fx.Node, Tensor] = {}

    def plan(self) -> Plan | None:
        self._settle()
        if not bool(self.dead.any()):
            self._refuse()
            return None
        touched, modules = self._touched(), dict[str, nn.Module]()
        for node in touched:
            if node.op == "call_module" and not self._gone(node):
                modules[str(node.target)] = self._narrowed(node)
        becomes, arguments = self._concatenations(touched)
        readers = [n for n in touched if n in self.found.reads]
        targets = [n for n in readers if not self._dead_ids(self.found.layouts.get(n)).any()]
        inputs = {s for n in touched for s in n.all_input_nodes if s not in touched}
        losing = [n for n in self.writers if n in touched]
        who = f"{_listed(losing)} leave, read by {_listed(readers)}"
        return Plan(
            name=str(losing[0].target),
            detail=f"{int(self.dead.sum())} channels of {who}",
            sources=tuple(s for s in inputs if "tensor_meta" in s.meta and not self.work.known(s)),
            target=targets[0],
            others=tuple(targets[1:]),
            modules=modules,
            becomes=becomes,
            arguments=arguments,
        )

    # Which channels leave

    def _settle(self) -> None:
        """Take back channels until those that are left can leave together."""
        obstacles: dict[fx.Node, str | None] = {}
        while True:
            before = self.dead.clone()
            for node in self._touched():
                if node.op != "call_module":
                    continue
                changes = node in self.found.reads or not self._is_plain(node)
                if changes and node not in obstacles:
                    obstacles[node] = self.work.obstacle(node)
                if changes and (reason := obstacles[node]) is not None:
                    for x in (self.found.layouts.get(node), self.found.reads.get(node)):
                        self._keep(x, self._dead_ids(x), reason)
                if node in self.found.reads:
                    self._border(node)
                if type(self.work.called(node)) in (nn.Linear, *CONV):
                    self._equal_groups(node)
            if torch.equal(self.dead, before):
                return

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether a module that hands channels on has nothing to lose with them."""
        module = self.work.called(node)
        assert module is not None
        return not any(True for _ in module.parameters()) and not any(
            True for _ in module.buffers()
        )

    def _dead_ids(self, x: Layout | None) -> Tensor:
        """[places] bool: which of a layout's channels leave."""
        if x is None:
            return torch.zeros(1, dtype=torch.bool)
        return self.dead[self.found.classes[x.ids]]

    def _gone(self, node: fx.Node) -> bool:
        return node in self.found.layouts and bool(self._dead_ids(self.found.layouts[node]).all())

    def _keep(self, x: Layout | None, places: Tensor, reason: str) -> None:
        if x is not None and bool(places.any()):
            self.dead[self.found.classes[x.ids[places]]] = False
            self.reasons.append((x.ids[places], reason))

    def _touched(self) -> list[fx.Node]:
        """Nodes that give or read a channel that leaves, in the graph's order."""
        return [
            node
            for node in self.work.module.graph.nodes
            if bool(self._dead_ids(self.found.layouts.get(node)).any())
            or bool(self._dead_ids(self.found.reads.get(node)).any())
        ]

    def _border(self, node: fx.Node) -> None:
        """Work out what a reader's bias takes up; a map of the border is no bias."""
        x, layer = self.found.reads[node], self.work.module.get_submodule(str(node.target))
        self.extra.pop(node, None)
        sends = self._dead_ids(x) & ~unread(layer).cpu() & (x.value != 0)
        if not bool(sends.any()):
            return
        added = self._added(node, layer, x, sends)
        if added is None:
            self._keep(x, sends, f"they meet a border of zero padding in {str(node.target)!r}")
        else:
            self.extra[node] = added

    def _added(self, node: fx.Node, layer: nn.Module, x: Layout, sends: Tensor) -> Tensor | None:
        """[C2]: what the channels ``sends`` add to a reader's bias; None for a border map."""
        shape = list(past_borders(layer, self.work.shape(node.all_input_nodes[0])))
        shape[0] = shape[0] if x.dim == 0 else 1
        view = [1] * len(shape)
        view[x.dim] = len(x.ids)
        bare = with_tensors(layer, bias=None)
        given = torch.where(sends, x.value, 0.0).to(bare.weight.device)  # type: ignore[arg-type]
        with torch.no_grad():
            image: Tensor = bare(given.view(view).expand(shape))
        form = smallest_form(image)
        return per_channel(form, tuple(image.shape), self.found.layouts[node].dim)

    def _equal_groups(self, node: fx.Node) -> None:
        """Whole groups leave, or as many channels in each; and never all that a layer reads."""
        module = self.work.called(node)
        groups = int(getattr(module, "groups", 1))
        out, read = self.found.layouts[node], self.found.reads.get(node)
        if read is None and groups == 1:
            return
        rows = self._dead_ids(out).view(groups, -1)
        if bool(rows.all()):
            return  # the whole layer leaves
        if read is None and groups == len(out.ids) and self._hands_on(node):
            return
        columns = self._dead_ids(read) if read is not None else rows.new_zeros(groups)
        columns = columns.view(groups, -1)
        whole = rows.all(dim=1) & columns.all(dim=1)
        reason = f"the groups of {str(node.target)!r} would be left unequal"
        if groups == 1:
            reason = f"{str(node.target)!r} would be left with nothing to read"
        for x, mask in ((out, rows), (read, columns)):
            live = mask[~whole]
            fewest = min(int(live.sum(dim=1).min()), live.shape[1] - 1)
            spared = torch.zeros_like(mask)
            spared[~whole] = live & (live.cumsum(dim=1) > fewest)
            self._keep(x, spared.flatten(), reason)

    def _hands_on(self, node: fx.Node) -> bool:
        """Whether a depthwise convolution gives the channels that it reads."""
        above = self.found.layouts.get(node.all_input_nodes[0])
        return above is not None and torch.equal(
            above.ids.unique(), self.found.layouts[node].ids.unique()
        )

    def _refuse(self) -> None:
        """Say why channels stay that are constant where they are written."""
        classes, wanted = self.found.classes, torch.zeros_like(self.dead)
        for writer in self.writers:
            x, layer = self.found.layouts[writer], self.work.called(writer)
            assert layer is not None
            wanted[classes[x.ids[x.constant | constant_rows(layer).cpu()]]] = True
        why: dict[str, int] = {}
        for ids, reason in self.reasons:
            held = torch.zeros_like(wanted)
            held[classes[ids]] = True
            held &= wanted
            if bool(held.any()):
                why[reason] = why.get(reason, 0) + int(held.sum())
                wanted &= ~held
        if why:
            told = [f"{count} constant neurons stay: {reason}" for reason, count in why.items()]
            raise Refused("; ".join(told))

    # What becomes of the graph

    def _narrowed(self, node: fx.Node) -> nn.Module:
        module = self.work.module.get_submodule(str(node.target))
        out, read = self.found.layouts.get(node), self.found.reads.get(node)
        if type(module) in (nn.Linear, *CONV):
            assert out is not None
            rows = ~self._dead_ids(out)
            columns = torch.ones(_inputs(module), dtype=torch.bool)
            if read is not None:
                columns = ~self._dead_ids(read)
            elif self._hands_on(node):
                columns = ~self._dead_ids(self.found.layouts[node.all_input_nodes[0]])
            return selected(module, rows, columns, self.extra.get(node))
        assert out is not None
        keep, ndim = ~self._dead_ids(out), len(self.work.shape(node))
        return without_channels(module, keep, ndim - out.dim)

    def _concatenations(
        self, touched: list[fx.Node]
    ) -> tuple[dict[fx.Node, Any], dict[fx.Node, tuple[Any, ...]]]:
        """Values without a channel left are no longer concatenated."""
        becomes: dict[fx.Node, Any] = {}
        arguments: dict[fx.Node, tuple[Any, ...]] = {}
        for node in touched:
            if not is_concatenation(node) or self._gone(node):
                continue
            parts, _ = concatenated(node, len(self.work.shape(node)))
            kept = [part for part in parts if not self._gone(part)]
            if len(kept) == 1:
                becomes[node] = kept[0]
            elif len(kept) < len(parts):
                arguments[node] = (kept, *node.args[1:])
        return becomes, arguments


def _inputs(module: nn.Module) -> int:
    return int(module.in_features if type(module) is nn.Linear else module.in_channels)  # type: ignore[arg-type]


def _listed(nodes: list[fx.Node]) -> str:
    names = [str(n.target) for n in nodes]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
