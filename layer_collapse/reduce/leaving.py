"""Which channels of a stream can leave together."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from .channels import Channels
from .float64 import call
from .gate import smallest_form
from .layers import CONV, past_borders, per_channel, unread, with_tensors
from .uniform import Layout
from .work import Work


class Leaving:
    """The channels of one stream that can leave together, see :meth:`settle`.

    Attributes:
        dead: [numbers] bool at the name of a class: whether it leaves.
        reasons: channels that stay, and why.
        extra: what the channels that leave add to the bias of each reader.
    """

    def __init__(self, work: Work, found: Channels, stream: int, writers: list[fx.Node]) -> None:
        self.work = work
        self.found = found
        self.writers = writers
        self.dead = found.removable & (found.streams == stream)  # by class
        self.reasons: list[tuple[Tensor, str]] = list(found.reasons)
        self.extra: dict[fx.Node, Tensor] = {}

    def settle(self) -> None:
        """Take back channels until those that are left can leave together."""
        obstacles: dict[fx.Node, str | None] = {}
        while True:
            before = self.dead.clone()
            for node in self.touched():
                if node.op != "call_module":
                    continue
                changes = node in self.found.reads or not self._is_plain(node)
                if changes and node not in obstacles:
                    obstacles[node] = self.work.obstacle(node)
                if changes and (reason := obstacles[node]) is not None:
                    for x in (self.found.layouts.get(node), self.found.reads.get(node)):
                        self._keep(x, self.dead_ids(x), reason)
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

    def dead_ids(self, x: Layout | None) -> Tensor:
        """[places] bool: which of a layout's channels leave."""
        if x is None:
            return torch.zeros(1, dtype=torch.bool)
        return self.dead[self.found.classes[x.ids]]

    def gone(self, node: fx.Node) -> bool:
        return node in self.found.layouts and bool(self.dead_ids(self.found.layouts[node]).all())

    def _keep(self, x: Layout | None, places: Tensor, reason: str) -> None:
        if x is not None and bool(places.any()):
            self.dead[self.found.classes[x.ids[places]]] = False
            self.reasons.append((x.ids[places], reason))

    def touched(self) -> list[fx.Node]:
        """Nodes that give or read a channel that leaves, in the graph's order."""
        return [
            node
            for node in self.work.module.graph.nodes
            if bool(self.dead_ids(self.found.layouts.get(node)).any())
            or bool(self.dead_ids(self.found.reads.get(node)).any())
        ]

    def _border(self, node: fx.Node) -> None:
        """Work out what a reader's bias takes up; a map of the border is no bias."""
        x, layer = self.found.reads[node], self.work.module.get_submodule(str(node.target))
        self.extra.pop(node, None)
        sends = self.dead_ids(x) & ~unread(layer).cpu() & (x.value != 0)
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
            image: Tensor = call(bare, [given.view(view).expand(shape)])
        form = smallest_form(image)
        return per_channel(form, tuple(image.shape), self.found.layouts[node].dim)

    def _equal_groups(self, node: fx.Node) -> None:
        """Whole groups leave, or as many channels in each; and never all that a layer reads."""
        module = self.work.called(node)
        groups = int(getattr(module, "groups", 1))
        out, read = self.found.layouts[node], self.found.reads.get(node)
        if read is None and groups == 1:
            return
        rows = self.dead_ids(out).view(groups, -1)
        if bool(rows.all()):
            return  # the whole layer leaves
        if read is None and groups == len(out.ids) and self.hands_on(node):
            return
        columns = self.dead_ids(read) if read is not None else rows.new_zeros(groups)
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

    def hands_on(self, node: fx.Node) -> bool:
        """Whether a depthwise convolution gives the channels that it reads."""
        above = self.found.layouts.get(node.all_input_nodes[0])
        return above is not None and torch.equal(
            above.ids.unique(), self.found.layouts[node].ids.unique()
        )
