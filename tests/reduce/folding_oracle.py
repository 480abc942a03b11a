"""Which merges are exact, from the mathematics alone: the oracle of the tests with random networks.

It walks graphs of its own tracing and shares no code with the package. A *link* is a pair of
neighbouring linear maps with nothing but per-channel affine maps between them (batch norms, gates,
constants, dropouts in evaluation); :func:`clause` says by which theorem the two are one map of the
same kind, or None.

Notation: first layer (k1, s1, p1, d1), second (k2, s2, p2, d2), x of size n. The second layer sees
zeros (or mirrored, repeated values) where the merged one sees what the first would have computed
there, so the two agree only if that is the same:

* "valid": p2 = 0. The second layer never looks outside.
* "pointwise": zeros, and what the first sends for zeros is 0 (no bias, no shift, no constant), and
  k1 = 1. Outside, the first layer reads padding alone.
* "tiles": likewise with p1 = 0 and d1 (k1 - 1) < s1, where the strides cover x: the window before
  the first and the one behind the last touch no x.
* "circular": both circular, s1 = 1, and the first keeps the size: circular maps of one ring.
* "aligned": k1 = s1 = 1, p1 = 0: a map of each pixel, which commutes with any repetition of pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from layer_collapse.reduce.gate import AffineGate, ConstantBias

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEAR_MAPS = (nn.Linear, *CONV)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NOTHING = (nn.Dropout, nn.Identity)
POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        kept = (AffineGate, ConstantBias)
        return isinstance(m, kept) or super().is_leaf_module(m, qualified_name)


class Graph(fx.Interpreter):
    """A model in evaluation mode with the shape of every value for one input."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        graph = _Tracer().trace(model) if not isinstance(model, fx.GraphModule) else model.graph
        super().__init__(fx.GraphModule(model, graph))
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        with torch.no_grad():
            self.run(x)
        self.calls = [str(n.target) for n in self.nodes() if n.op == "call_module"]

    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value

    def called(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module":
            return None
        return self.module.get_submodule(str(node.target))

    def free(self, node: fx.Node) -> bool:
        """Whether the layer that a node calls may change: no hook, one call."""
        module = self.called(node)
        assert module is not None
        return not module._forward_hooks and self.calls.count(str(node.target)) == 1


def above(graph: Graph, node: fx.Node) -> Iterator[fx.Node]:
    """What a node reads, and what that reads, as far as there is one reader and one source."""
    while len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
        if len(node.users) != 1:
            return
        yield node


@dataclass(frozen=True)
class Link:
    first: fx.Node
    between: tuple[fx.Node, ...]  # from the first layer to the second
    second: fx.Node
    pooled: bool  # one of those between is a pooling


def links(graph: Graph) -> list[Link]:
    """All pairs of neighbouring linear maps of one kind."""
    found = []
    for node in graph.nodes():
        second = graph.called(node)
        if type(second) not in LINEAR_MAPS:
            continue
        between: list[fx.Node] = []
        for source in above(graph, node):
            module = graph.called(source)
            if type(module) is type(second):
                pooled = any(type(graph.called(n)) in POOLS for n in between)
                found.append(Link(source, tuple(between[::-1]), node, pooled))
                break
            if not isinstance(module, (*NORMS, *NOTHING, *POOLS, AffineGate, ConstantBias)):
                break
            between.append(source)
    return found


def sent_for_zeros(graph: Graph, link: Link) -> Tensor:
    """What the second layer reads where the first reads zeros: [C, ...]."""
    first = graph.called(link.first)
    assert first is not None
    weight, bias = first.weight, first.bias
    assert isinstance(weight, Tensor)
    value = bias if isinstance(bias, Tensor) else weight.new_zeros(len(weight))
    ndim = len(graph.shapes[link.first])
    value = value.detach().double().reshape(-1, *[1] * (0 if ndim < 3 else ndim - 2))
    for node in link.between:
        module = graph.called(node)
        if isinstance(module, NORMS):
            scale = 1 if module.weight is None else module.weight.detach()
            shift = 0 if module.bias is None else module.bias.detach()
            mean, spread = module.running_mean, module.running_var
            assert mean is not None
            assert spread is not None
            flat = (value.flatten() - mean) / torch.sqrt(spread + module.eps) * scale + shift
            value = flat.reshape(value.shape)
        elif isinstance(module, AffineGate):
            flat = value.flatten() * module.scale + module.offset
            value = flat.reshape(value.shape)
        elif isinstance(module, ConstantBias):
            value = value + module.value
    return value


def clause(graph: Graph, link: Link) -> str | None:
    """The theorem that makes two layers one, or None where there is none."""
    first, second = graph.called(link.first), graph.called(link.second)
    if link.pooled or any(_is_map(graph.called(n)) for n in link.between):
        return None
    if isinstance(first, nn.Linear):
        return "linear"
    assert isinstance(first, CONV)
    assert isinstance(second, CONV)
    p1, p2 = padding(first), padding(second)
    if p1 is None or p2 is None:
        return None  # an even kernel with "same": one more on one side
    k1, s1, d1 = first.kernel_size, first.stride, first.dilation
    mode1 = first.padding_mode if max(p1) else ""
    mode2 = second.padding_mode
    if max(p2) == 0:
        return "valid"
    if mode2 == "zeros":
        if bool(sent_for_zeros(graph, link).any()) or mode1 not in ("", "zeros"):
            return None
        if max(k1) == 1:
            return "pointwise"
        size = graph.shapes[link.first.all_input_nodes[0]][2:]
        if max(p1) == 0 and all(map(_tiles, size, k1, s1, d1)):
            return "tiles"
        return None
    if max(s1) > 1:
        return None
    keeps = all(2 * p == d * (k - 1) for p, d, k in zip(p1, d1, k1, strict=True))
    size = graph.shapes[link.first.all_input_nodes[0]][2:]
    once = all(a + b <= n for a, b, n in zip(p1, p2, size, strict=True))  # as far as torch pads
    if mode2 == "circular" and keeps and mode1 == "circular" and once:
        return "circular"
    return "aligned" if max(k1) == 1 and max(p1) == 0 else None


def _is_map(module: nn.Module | None) -> bool:
    """A constant that depends on the position, and so on the size of the input."""
    return isinstance(module, ConstantBias) and max(module.value.shape[1:], default=1) > 1


def _tiles(n: int, k: int, s: int, d: int) -> bool:
    reach = d * (k - 1)
    behind = ((n - reach - 1) // s + 1) * s  # where the window behind the last one starts
    return reach < s and behind >= n


def padding(layer: nn.Module) -> tuple[int, ...] | None:
    """Pixels of padding on either side; None where "same" pads one side more."""
    padding, k, d = layer.padding, layer.kernel_size, layer.dilation
    if padding == "same":
        total = [a * (b - 1) for a, b in zip(d, k, strict=True)]  # type: ignore[arg-type]
        return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
    assert isinstance(padding, tuple)
    return padding


def leftovers(graph: Graph) -> list[str]:
    """Batch norms and gates that a neighbouring layer could take exactly, and has not."""
    found = []
    for node in graph.nodes():
        module = graph.called(node)
        if not isinstance(module, (AffineGate, *NORMS)) or not graph.free(node):
            continue
        source = next((n for n in above(graph, node) if not _nothing(graph, n)), None)
        layer = None if source is None else graph.called(source)
        takes = isinstance(layer, LINEAR_MAPS) or (
            isinstance(module, AffineGate) and isinstance(layer, NORMS) and layer.affine
        )
        if takes and source is not None and graph.free(source):
            dims = _channel_dim(graph, source), _channel_dim(graph, node)
            if dims[0] == dims[1]:
                found.append(f"{node.target} could go into {source.target}, which it reads")
        reader = _below(graph, node)
        layer = None if reader is None else graph.called(reader)
        if not isinstance(layer, LINEAR_MAPS) or reader is None or not graph.free(reader):
            continue
        padded = isinstance(layer, CONV) and layer.padding_mode == "zeros"
        padded = padded and padding(layer) != (0,) * len(layer.kernel_size)
        last = len(graph.shapes[node]) - 1
        right = _channel_dim(graph, node) == (last if isinstance(layer, nn.Linear) else 1)
        if right and not (padded and bool(_shift(module).any())):
            found.append(f"{node.target} could go into {reader.target}, which reads it")
    return found


def sums(graph: Graph) -> list[str]:
    """Convolutions that could take the identity, or the 1x1 convolution, that they are added to."""
    found = []
    for node in graph.nodes():
        if len(node.all_input_nodes) != 2 or "add" not in str(node.target):
            continue
        pair = [_origin(graph, operand) for operand in node.all_input_nodes]
        for here, beside in (pair, pair[::-1]):
            conv, other = graph.called(here), graph.called(beside)
            alone = _below(graph, here) is node and graph.free(here) if conv is not None else False
            if not isinstance(conv, CONV) or not alone or padding(conv) is None:
                continue
            entrance = _origin(graph, here.all_input_nodes[0])
            before = [divmod(p, d) for p, d in zip(padding(conv) or (), conv.dilation, strict=True)]
            if entrance is beside:
                alike = conv.in_channels == conv.out_channels and max(conv.stride) == 1
                centre = [(k // 2, 0) for k in conv.kernel_size if k % 2]
                if alike and before == centre:
                    found.append(f"the identity beside {here.target}")
            elif isinstance(other, CONV) and _below(graph, beside) is node and graph.free(beside):
                same = _origin(graph, beside.all_input_nodes[0]) is entrance
                point = max(other.kernel_size) == 1 and padding(other) == (0,) * len(before)
                taps = all(
                    q < k and not rest
                    for (q, rest), k in zip(before, conv.kernel_size, strict=True)
                )
                if same and point and taps and other.stride == conv.stride:
                    found.append(f"{beside.target} beside {here.target}")
    return found


def _nothing(graph: Graph, node: fx.Node) -> bool:
    module = graph.called(node)
    return isinstance(module, NOTHING) and not module._forward_hooks


def _origin(graph: Graph, node: fx.Node) -> fx.Node:
    while _nothing(graph, node):
        node = node.all_input_nodes[0]
    return node


def _below(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The only node that reads a value."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if not _nothing(graph, node):
            return node
    return None


def _shift(module: nn.Module) -> Tensor:
    """What a batch norm or a gate gives for zeros."""
    if isinstance(module, AffineGate):
        return module.offset
    zeros = torch.zeros(1, int(module.num_features), *[1] * (NORMS.index(type(module)) + 1))
    with torch.no_grad():
        result: Tensor = module(zeros.double())
    return result


def _channel_dim(graph: Graph, node: fx.Node) -> int:
    module, ndim = graph.called(node), len(graph.shapes[node])
    if isinstance(module, AffineGate):
        return module.channel_dim % ndim
    return ndim - 1 if isinstance(module, nn.Linear) else 1
