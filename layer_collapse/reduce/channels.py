"""Which channels of a graph belong together, and which of them can leave.

Channels that meet in a sum or a product are one *class*, which leaves as a whole or not at all.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .layers import CONV, unread
from .layouts import Layouts
from .uniform import Layout
from .work import Work


@dataclass
class Channels:
    """What :func:`channels` finds.

    Attributes:
        layouts: of every value whose channels are known.
        reads: what the columns of each Linear and Conv read, where that is known.
        classes: [numbers] int64, the class of each channel, named by its smallest member.
        streams: [numbers] int64; classes that lie side by side in some value share a stream.
        writers: the layers that write to each stream, in the graph's order.
        removable: [numbers] bool at the name of a class: whether it is constant or unread wherever
            it is read.
        reasons: why the channels in a [k] tensor of numbers stay, the strongest first.
    """

    layouts: dict[fx.Node, Layout]
    reads: dict[fx.Node, Layout]
    classes: Tensor
    streams: Tensor
    writers: dict[int, list[fx.Node]]
    removable: Tensor
    reasons: list[tuple[Tensor, str]]


def channels(work: Work) -> Channels:
    """The channels of a graph in its present form."""
    version, found = work.cache.get("channels", (-1, None))
    if version != work.version:
        found = _classified(work)
        work.cache["channels"] = (work.version, found)
    assert isinstance(found, Channels)
    return found


def _classified(work: Work) -> Channels:
    found = Layouts(work)
    every = [*found.layouts.values(), *found.reads.values()]
    beside = found.beside + [(x.ids[:1].expand(len(x.ids)), x.ids) for x in every if len(x.ids)]
    classes = _components(found.numbers, found.same)
    removable = classes == torch.arange(found.numbers)
    late = []
    for node, x in found.reads.items():
        layer = work.module.get_submodule(str(node.target))
        needed = x.ids[~(x.constant | unread(layer).cpu())]
        removable[classes[needed]] = False
        late.append((needed, f"they are not constant where {str(node.target)!r} reads them"))
    for ids, _ in found.fixed:
        removable[classes[ids]] = False
    streams = _components(found.numbers, found.same + beside)
    writers: dict[int, list[fx.Node]] = defaultdict(list)
    for node, x in found.layouts.items():
        if len(x.ids) and type(work.called(node)) in (nn.Linear, *CONV):
            writers[int(streams[x.ids[0]])].append(node)
    return Channels(
        layouts=found.layouts,
        reads=found.reads,
        classes=classes,
        streams=streams,
        writers=writers,
        removable=removable,
        reasons=[*found.fixed, *found.borders, *late],
    )


def _components(count: int, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[count] int64: the smallest number that each number is joined to."""
    label = torch.arange(count)
    if not pairs:
        return label
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    while True:
        least = torch.minimum(label[a], label[b])
        new = label.scatter_reduce(0, label[a], least, "amin")
        new = new.scatter_reduce(0, label[b], least, "amin")
        new = new[new]
        if torch.equal(new, label):
            return label
        label = new
