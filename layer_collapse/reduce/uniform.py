"""What constant channels are behind each node: the node itself is run on them.

A channel stays constant if the result is the same at every position. A border of zero padding ends
that, since it depends on the size of the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from ..graph import BATCH_NORM, shape_of
from . import passing
from .gate import AffineGate
from .layers import CONV, bias_of, past_borders
from .proof import Float64
from .walk import factors, summands
from .work import Work
from .zeros import constant_rows


@dataclass(frozen=True)
class Layout:
    """The channels of a value.

    Attributes:
        dim: on which they lie.
        ids: [size of dim] int64, number of the channel at each place.
        constant: [size of dim] bool, whether it does not depend on the input.
        value: [size of dim] float64, of those that are constant.
    """

    dim: int
    ids: Tensor
    constant: Tensor
    value: Tensor


class Constants:
    """Evaluates nodes on the constant channels of what they read.

    Args:
        layouts: of the nodes so far; it may grow.
    """

    def __init__(self, work: Work, layouts: Mapping[fx.Node, Layout]) -> None:
        self.work = work
        self.layouts = layouts
        self.runner = Float64(work.module, garbage_collect_values=False)

    def evaluated(self, node: fx.Node, x: Layout) -> tuple[Layout, Tensor]:
        """The layout with the values of its constants.

        Returns:
            It, and [k] int64: the channels that are constants no more, because of a border.
        """
        nothing = x.ids[:0]
        layer, none = self.work.called(node), torch.zeros(len(x.ids), dtype=torch.float64)
        if not bool(x.constant.any()):
            return replace(x, value=none), nothing
        if passing.is_concatenation(node):
            return x, nothing
        if type(layer) in (nn.Linear, *CONV):
            assert layer is not None
            if bool((constant_rows(layer).cpu() == x.constant).all()):
                bias = bias_of(layer)
                value = none if bias is None else bias.to(none)
                return replace(x, constant=x.constant & value.isfinite(), value=value), nothing
        counts = [s for s in node.all_input_nodes if shape_of(s) is None]
        if counts and not passing.reshapes(node):
            # With a size, perhaps that of the batch: as a factor it leaves zeros what they are.
            kept = x.constant & (x.value == 0) & passing.scales(node)
            return replace(x, constant=kept, value=none), x.ids[x.constant & ~kept]
        result = self._run(node).movedim(x.dim, 0).flatten(1)
        value = result[:, 0]
        limit = 1e-12 * result.abs().amax(dim=1)
        gap = (result - value[:, None]).abs()
        uniform = (gap.amax(dim=1) <= limit).cpu()  # False for NaN
        return (
            replace(x, constant=x.constant & uniform, value=value.to(none)),
            x.ids[x.constant & ~uniform],
        )

    def _run(self, node: fx.Node) -> Tensor:
        reader, small = self.work.called(node), self._everywhere_alike(node)
        inputs = {
            s: self._sample(s, reader, small)
            for s in node.all_input_nodes
            if shape_of(s) is not None
        }
        if len(inputs) < len(node.all_input_nodes):  # it reads sizes as well
            return self.work.run([node], inputs)[node]  # type: ignore[no-any-return]
        self.runner.env = dict(inputs)
        result: Tensor = self.runner.run_node(node)
        return result

    def _everywhere_alike(self, node: fx.Node) -> bool:
        """Whether a node does the same at every position, so that one position tells."""
        module = self.work.called(node)
        return (
            type(module) in (AffineGate, nn.PReLU)
            or (type(module) in BATCH_NORM and getattr(module, "running_mean", None) is not None)
            or passing.is_elementwise(node, module)
            or summands(node) is not None
            or factors(node) is not None
        )

    def _sample(self, node: fx.Node, reader: nn.Module | None, small: bool) -> Tensor:
        """A value whose constant channels are as they will be; the others do not matter.

        Args:
            reader: large enough for this module to work beside its border, too.
            small: of size 1 along all dims but the channels'.
        """
        shape = past_borders(reader, self.work.shape(node))
        device = next((p.device for p in self.work.module.parameters()), torch.device("cpu"))
        x = self.layouts.get(node)
        if x is None:
            shape = (1,) * len(shape) if small else shape
            return torch.zeros(shape, dtype=torch.float64, device=device)
        view = [1] * len(shape)
        view[x.dim] = len(x.ids)
        sample = torch.where(x.constant, x.value, 0.0).to(device).view(view)
        return (sample if small else sample.expand(shape)).clone(
            memory_format=torch.contiguous_format
        )  # operations in place need memory of their own
