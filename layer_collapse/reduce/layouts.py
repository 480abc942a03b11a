"""Where the channels of each value lie, and which of them are constant.

Every layer gives its output channels a number; the nodes behind it hand the numbers on: a
concatenation puts them side by side, a flatten repeats them, a sum or a product makes those that
meet one class. Behind a node that is not known here channels must stay. Constants go the same way:
see :mod:`.uniform`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from ..graph import BATCH_NORM, carries_data, shape_of
from . import passing
from .aliasing import writes_into
from .gate import AffineGate, ConstantBias
from .layers import CONV, channel_dim, stored_weight
from .uniform import Constants, Layout
from .walk import factors, summands
from .work import Work
from .zeros import constant_rows


class Layouts:
    """The layouts of a graph's values, found in one pass over its nodes.

    Attributes:
        numbers: how many channels there are.
        layouts: of every value whose channels are known.
        reads: what the columns of each Linear and Conv read, where that is known.
        same: pairs of [k] numbers of channels that leave together.
        beside: pairs of [k] numbers whose layers must be changed at the same time.
        fixed: numbers of channels that must stay, and why.
        borders: numbers of channels that a border of zero padding keeps from being constant.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.numbers = 0
        self.layouts: dict[fx.Node, Layout] = {}
        self.reads: dict[fx.Node, Layout] = {}
        self.same: list[tuple[Tensor, Tensor]] = []
        self.beside: list[tuple[Tensor, Tensor]] = []
        self.fixed: list[tuple[Tensor, str]] = []
        self.borders: list[tuple[Tensor, str]] = []
        constants = Constants(work, self.layouts)
        for node in self.work.module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            if not carries_data(node):
                self._size(node)
                continue
            found, hooked = self._layout(node), self.work.hooked(node)
            if found is not None and hooked:  # what its channels are then, the hooks alone know
                self.layouts[node] = replace(found, constant=torch.zeros_like(found.constant))
                self._stay(node, self._reason(node))
            elif found is not None:
                self.layouts[node], border = constants.evaluated(node, found)
                if len(border):
                    self.borders.append((border, "they meet a border of zero padding"))
            if found is None or hooked:
                for source in node.all_input_nodes:
                    self._stay(source, self._reason(node))

    def _reason(self, node: fx.Node) -> str:
        module = self.work.called(node)
        if node.op == "output":
            return "they are an output of the network"
        if self.work.hooked(node):
            return f"{str(node.target)!r} has hooks, which would see fewer of them"
        if type(module) in (nn.LayerNorm, nn.GroupNorm):
            return f"{str(node.target)!r} normalises over all channels"
        if module is not None:
            return f"{str(node.target)!r} ({type(module).__name__}) needs them all"
        name = getattr(node.target, "__name__", node.target)
        return f"{node.name!r} ({name}) mixes or regroups them"

    def _stay(self, node: fx.Node, reason: str) -> None:
        if node in self.layouts:
            self.fixed.append((self.layouts[node].ids, reason))

    def _new(self, count: int) -> Tensor:
        self.numbers += count
        return torch.arange(self.numbers - count, self.numbers)

    def _size(self, node: fx.Node) -> None:
        """Who reads the number of channels keeps it."""
        x = self.layouts.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        if x is not None and passing.asks_for(node, x.dim):
            self._stay(node.all_input_nodes[0], f"{node.name!r} reads their number")

    def _layout(self, node: fx.Node) -> Layout | None:
        """Channels of a node's value; ``constant`` says where nothing but constants meet."""
        module, shape = self.work.called(node), shape_of(node)
        if shape is None or not node.all_input_nodes:
            return None
        if any(
            len(s.users) > 1 and writes_into(self.work.module, node, s)
            for s in node.args
            if isinstance(s, fx.Node)
        ):  # others read what is written over
            return None
        if type(module) in (nn.Linear, *CONV):
            assert module is not None
            return self._layer(node, module, len(shape))
        if passing.is_concatenation(node):
            return self._concatenation(node, len(shape))
        if (pair := summands(node)) is not None or (pair := factors(node)) is not None:
            nodes = [p for p in pair if isinstance(p, fx.Node) and shape_of(p) is not None]
            if len(nodes) == 2:
                return self._meeting(node, nodes[0], nodes[1], summands(node) is None)
        data = [s for s in node.all_input_nodes if carries_data(s) and shape_of(s) is not None]
        x = self.layouts.get(data[0]) if len(data) == 1 else None
        if x is None:
            return None
        if _has_channels(module, x.dim, len(shape)):
            scale = module.scale if type(module) is AffineGate else getattr(module, "weight", None)
            if scale is None or type(module) is nn.PReLU:
                return x
            return Layout(x.dim, x.ids, x.constant | (scale.detach() == 0).cpu(), x.value)
        source = self.work.shape(data[0])
        moved = passing.moved(node, module, x.dim, source, shape)
        if moved is None:
            return None
        dim, repeats = moved
        if passing.written_size(node, dim):
            self._stay(data[0], f"{node.name!r} writes out their number; write flatten(1) instead")
        return Layout(
            dim,
            x.ids.repeat_interleave(repeats),
            x.constant.repeat_interleave(repeats),
            x.value.repeat_interleave(repeats),
        )

    def _layer(self, node: fx.Node, layer: nn.Module, ndim: int) -> Layout | None:
        """A layer gives new channels; a depthwise convolution hands on those that it reads."""
        dim, source = channel_dim(layer, ndim), node.all_input_nodes[0]
        if dim is None:
            return None
        groups, rows = int(getattr(layer, "groups", 1)), constant_rows(layer).cpu()
        columns = stored_weight(layer).shape[1]
        x = self.layouts.get(source)
        if x is not None and (x.dim != dim or len(x.ids) != groups * columns):
            self._stay(source, f"{str(node.target)!r} mixes what lies beside them")
            x = None
        zeros = torch.zeros(len(rows), dtype=torch.float64)
        if x is None:
            return Layout(dim, self._new(len(rows)), rows, zeros)
        if bool(x.constant.any()):  # rows of which only constants are left
            rows = constant_rows(layer, ~x.constant).cpu()
        if groups == len(x.ids) > 1:
            return Layout(dim, x.ids.repeat_interleave(len(rows) // groups), rows, zeros)
        self.reads[node] = x
        ids = self._new(len(rows))
        if groups > 1:
            self.beside.append((x.ids[:1], ids[:1]))  # its groups must stay equal on both sides
        return Layout(dim, ids, rows, zeros)

    def _concatenation(self, node: fx.Node, ndim: int) -> Layout | None:
        parts, dim = passing.concatenated(node, ndim)
        found = [self.layouts.get(part) for part in parts]
        known = [x for x in found if x is not None]
        if not known or any(x.dim != dim for x in known):
            return None
        full = []
        for part, x in zip(parts, found, strict=True):
            if x is None:
                size = self.work.shape(part)[dim]
                x = Layout(
                    dim, self._new(size), torch.zeros(size).bool(), torch.zeros(size).double()
                )
                self.fixed.append((x.ids, f"{part.name!r} gives all its channels"))
            full.append(x)
        ids = torch.cat([x.ids for x in full])
        return Layout(
            dim, ids, torch.cat([x.constant for x in full]), torch.cat([x.value for x in full])
        )

    def _meeting(self, node: fx.Node, a: fx.Node, b: fx.Node, product: bool) -> Layout | None:
        """A sum or a product: what meets is one class; zero times anything is zero."""
        shape, x, y = shape_of(node), self.layouts.get(a), self.layouts.get(b)
        if x is None:
            a, b, x, y = b, a, y, x
        other = shape_of(b)
        if x is None or shape is None or other is None:
            return None
        back = x.dim - len(self.work.shape(a))  # dims are aligned at their ends
        count = other[back] if len(other) >= -back else 1
        dim = back + len(shape)
        if shape[back] != len(x.ids):
            return None
        if y is None:
            if count != 1:
                return None
            constant = x.constant & (x.value == 0) if product else torch.zeros_like(x.constant)
            return Layout(dim, x.ids, constant, x.value)
        if y.dim - len(other) != back or len(y.ids) != len(x.ids):
            return None
        self.same.append((x.ids, y.ids))
        constant = x.constant & y.constant
        if product:
            constant |= (x.constant & (x.value == 0)) | (y.constant & (y.value == 0))
        return Layout(dim, x.ids, constant, x.value)


def _has_channels(module: nn.Module | None, dim: int, ndim: int) -> bool:
    """Whether a module has one entry per channel, on the channels' own dim."""
    if type(module) is nn.PReLU:
        return dim == 1 and module.weight.numel() > 1
    if type(module) is ConstantBias:
        return True
    return type(module) in (*BATCH_NORM, AffineGate) and channel_dim(module, ndim) == dim  # type: ignore[arg-type]
