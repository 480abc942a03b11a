"""Affine gates for rectifiers that still switch, fitted to data, with the error that they make."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..graph import ExampleInputs, ordered_inputs, rectifier_nodes, trace
from ..measure.scan import Batch, call_model
from ..measure.sites import Site, find_sites
from ..measure.valid import positions_mask
from .gate import AffineGate
from .holdings import own_copy

Valid = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Fit:
    """The gate that comes closest to one rectifier on the measured data.

    Attributes:
        gate: y = scale z + offset per neuron, by least squares over all counted positions.
        max_error: max|act(z) - (scale z + offset)| over neurons and positions.
        rms_error: root of the mean square of the same.
        relative: ``rms_error`` over the root mean square of act(z) itself; 0 where both are 0.
        positions: how many positions were measured, per neuron.
    """

    gate: AffineGate
    max_error: float
    rms_error: float
    relative: float
    positions: int


class _Moments:
    """Sums over positions of one rectifier's pre-activation z and activation y, in float64."""

    def __init__(self, neurons: int) -> None:
        self.count = self.judged = 0
        self.sums = torch.zeros(5, neurons, dtype=torch.float64)  # z, y, zz, zy, yy
        self.pivot: Tensor | None = None  # first values: sums of small numbers lose less
        self.max_error = 0.0
        self.squares = 0.0

    def add(self, z: Tensor, y: Tensor) -> None:
        """``z``, ``y``: [positions, neurons]."""
        if not len(z):
            return
        z, y = z.double(), y.double()
        if self.pivot is None:
            self.pivot = z[0].clone()
        z = z - self.pivot
        self.count += len(z)
        for number, product in enumerate((z, y, z * z, z * y, y * y)):
            self.sums[number] += product.sum(0).cpu()

    def gate(self) -> tuple[Tensor, Tensor]:
        """scale, offset: [neurons] float64; a constant input gives scale 0."""
        assert self.pivot is not None
        z, y, zz, zy, _ = self.sums / self.count
        spread = zz - z * z
        moves = spread > 1e-12 * zz
        scale = torch.where(moves, (zy - z * y) / spread.where(moves, torch.ones_like(z)), 0.0)
        return scale, y - scale * (z + self.pivot.cpu())

    def judge(self, z: Tensor, y: Tensor, scale: Tensor, offset: Tensor) -> None:
        if not len(z):
            return
        self.judged += len(z)
        gap = (y.double() - (z.double() * scale.to(z.device) + offset.to(z.device))).abs()
        self.max_error = max(self.max_error, float(gap.max()))
        self.squares += float((gap * gap).sum())


class _Watch(fx.Interpreter):
    """Runs a graph and shows what goes into and comes out of some rectifiers."""

    def __init__(self, graph: fx.GraphModule, see: Callable[[fx.Node, Tensor, Tensor], None]):
        super().__init__(graph)
        self.see = see
        self.nodes: Collection[fx.Node] = ()

    def run_node(self, n: fx.Node) -> object:
        if n not in self.nodes:
            return super().run_node(n)
        z = self.env[n.all_input_nodes[0]].clone()  # the rectifier may write over it
        y = super().run_node(n)
        self.see(n, z, y)
        return y


@torch.no_grad()
def fit_gates(
    model: nn.Module,
    data: Iterable[Batch],
    example_inputs: ExampleInputs = None,
    *,
    names: Collection[str] | None = None,
    valid: Valid | None = None,
) -> dict[str, Fit]:
    """Fit an affine gate to rectifiers and measure how far it is from them.

    GELU and SiLU are never exactly linear, and a ReLU need not be; a gate may still be close enough
    for the one who asks. Hand the fits that are to :func:`linearize` as ``fits=``.

    Args:
        model: any traceable module; run in evaluation mode and left as it is.
        data: re-iterable batches as for :func:`layer_collapse.scan`; they are read twice.
        example_inputs: as for the scan.
        names: rectifiers to fit; by default all whose neurons are known.
        valid: ``valid(batch)`` gives the mask of positions that count, e.g. [N, T] for tokens; by
            default the ``attention_mask`` of batches that are mappings and have one.

    Returns:
        One :class:`Fit` per rectifier, in the order of execution.

    Raises:
        ValueError: an unknown name, no position was measured, or ``data`` can be read only once.
    """
    graph = trace(own_copy(model).eval(), example_inputs)
    sites = {site.node: site for site in find_sites(graph)}
    known = {site.name for site in sites.values()}
    if unknown := set(names or ()) - known:
        raise ValueError(
            f"fit_gates: no rectifier is called {', '.join(sorted(unknown))}; the model has "
            f"{', '.join(sorted(known))}"
        )
    chosen = {
        node: sites[node.name]
        for node in rectifier_nodes(graph)
        if node.name in sites and (names is None or sites[node.name].name in names)
    }
    moments = {site.name: _Moments(site.neurons) for site in chosen.values()}
    current: list[Batch] = []

    def rows(site: Site, value: Tensor) -> Tensor:
        counted = valid(current[0]) if valid else _attention_mask(current[0])
        mask = None
        if counted is not None:
            mask = positions_mask(counted, value.shape, site.channel_dim, site.name)
        flat = value.movedim(site.channel_dim, -1)
        flat = flat.reshape(-1, flat.shape[-1]) if mask is None else flat[mask.to(flat.device)]
        return flat if site.split is None else _channels(flat, site)

    def first(node: fx.Node, z: Tensor, y: Tensor) -> None:
        site = chosen[node]
        moments[site.name].add(rows(site, z), rows(site, y))

    _pass(graph, data, chosen, first, current)
    for name, sums in moments.items():
        if not sums.count:
            raise ValueError(f"fit_gates: no position of rectifier {name!r} was measured")
    pairs = {name: sums.gate() for name, sums in moments.items()}

    def second(node: fx.Node, z: Tensor, y: Tensor) -> None:
        site = chosen[node]
        moments[site.name].judge(rows(site, z), rows(site, y), *pairs[site.name])

    _pass(graph, data, chosen, second, current)
    if any(sums.judged != sums.count for sums in moments.values()):
        raise ValueError(
            "fit_gates: data must give the same batches twice (the second time it gave others, or "
            "none); pass a list or a loader, not a generator"
        )
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return {
        site.name: _fit(site, moments[site.name], *pairs[site.name], like=reference)
        for site in chosen.values()
    }


def _pass(
    graph: fx.GraphModule,
    data: Iterable[Batch],
    chosen: Collection[fx.Node],
    see: Callable[[fx.Node, Tensor, Tensor], None],
    current: list[Batch],
) -> None:
    device = next((p.device for p in graph.parameters()), torch.device("cpu"))
    watch = _Watch(graph, see)
    watch.nodes = chosen

    class _Model(nn.Module):
        def forward(self, *args: object, **kwargs: object) -> object:
            return watch.run(*ordered_inputs(graph, kwargs or list(args)))  # type: ignore[arg-type]

    for batch in data:
        current[:] = [batch]
        call_model(_Model(), batch, device)


def _attention_mask(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def _channels(flat: Tensor, site: Site) -> Tensor:
    """[positions, before * neurons * after] as [positions * before * after, neurons]."""
    assert site.split is not None
    return flat.unflatten(-1, site.split).transpose(-1, -2).reshape(-1, site.neurons)


def _fit(site: Site, sums: _Moments, scale: Tensor, offset: Tensor, like: Tensor) -> Fit:
    values = sums.count * site.neurons
    size = float(sums.sums[4].sum())
    if site.split is not None:
        scale = scale[None, :, None].expand(site.split).reshape(-1)
        offset = offset[None, :, None].expand(site.split).reshape(-1)
    gate = AffineGate(scale.to(like), offset.to(like), site.channel_dim)
    return Fit(
        gate=gate,
        max_error=sums.max_error,
        rms_error=(sums.squares / values) ** 0.5 if values else 0.0,
        relative=(sums.squares / size) ** 0.5 if size else 0.0,
        positions=sums.count,
    )
