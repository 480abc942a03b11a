"""Channels that do not depend on the input: their rows and the columns that read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ..channels import channels
from ..layers import CONV, selected, without_channels
from ..leaving import Leaving
from ..passing import concatenated, is_concatenation
from ..work import Plan, Refused, Work
from ..zeros import constant_rows


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


class _Removal(Leaving):
    """The plan by which the channels of one stream leave."""

    def plan(self) -> Plan | None:
        self.settle()
        if not bool(self.dead.any()):
            self._refuse()
            return None
        touched, modules = self.touched(), dict[str, nn.Module]()
        for node in touched:
            if node.op == "call_module" and not self.gone(node):
                modules[str(node.target)] = self._narrowed(node)
        becomes, arguments = self._concatenations(touched)
        readers = [n for n in touched if self.dead_ids(self.found.reads.get(n)).any()]
        targets = [n for n in readers if not self.dead_ids(self.found.layouts.get(n)).any()]
        losing = [n for n in self.writers if n in touched]
        who = f"{_listed(losing)} leave, read by {_listed(readers)}"
        return Plan(
            name=str(losing[0].target),
            detail=f"{int(self.dead.sum())} channels of {who}",
            sources=self._sources(touched),
            target=targets[0],
            others=tuple(targets[1:]),
            modules=modules,
            becomes=becomes,
            arguments=arguments,
        )

    def _sources(self, touched: list[fx.Node]) -> tuple[fx.Node, ...]:
        """What the proof makes random: but not what makes a layer's rows constants."""
        inside, sources, stack = set(touched), set[fx.Node](), list(touched)
        while stack:
            node = stack.pop()
            layer, x = self.work.called(node), self.found.layouts.get(node)
            derived = node not in touched
            if type(layer) in (nn.Linear, *CONV):
                assert layer is not None
                derived = x is not None and bool((x.constant & ~constant_rows(layer).cpu()).any())
            for source in node.all_input_nodes:
                known = self.found.layouts.get(source)
                if source in inside:
                    continue
                if derived and known is not None and bool(known.constant.any()):
                    inside.add(source)
                    stack.append(source)
                elif "tensor_meta" in source.meta and not self.work.known(source):
                    sources.add(source)
        return tuple(sources - inside)

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
            rows = ~self.dead_ids(out)
            columns = torch.ones(_inputs(module), dtype=torch.bool)
            if read is not None:
                columns = ~self.dead_ids(read)
            elif self.hands_on(node):
                columns = ~self.dead_ids(self.found.layouts[node.all_input_nodes[0]])
            return selected(module, rows, columns, self.extra.get(node))
        assert out is not None
        keep, ndim = ~self.dead_ids(out), len(self.work.shape(node))
        return without_channels(module, keep, ndim - out.dim)

    def _concatenations(
        self, touched: list[fx.Node]
    ) -> tuple[dict[fx.Node, Any], dict[fx.Node, tuple[Any, ...]]]:
        """Values without a channel left are no longer concatenated."""
        becomes: dict[fx.Node, Any] = {}
        arguments: dict[fx.Node, tuple[Any, ...]] = {}
        for node in touched:
            if not is_concatenation(node) or self.gone(node):
                continue
            parts, _ = concatenated(node, len(self.work.shape(node)))
            kept = [part for part in parts if not self.gone(part)]
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
