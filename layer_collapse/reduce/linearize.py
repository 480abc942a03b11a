"""Replace rectifiers that a certifying scan found linear by per-neuron affine gates."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from ..graph import ExampleInputs, record_shapes, rectifier_nodes, submodule, trace, training_mode
from ..measure.rectifiers import module_call, parse_function
from ..measure.report import (
    EMPTY,
    NONFINITE,
    UNMEASURED,
    EntropyReport,
    RectifierEntropy,
)
from ..measure.scan import fingerprint
from ..measure.sites import Site, find_sites, source_of
from ..ops.entropy import State
from ..ops.rectify import apply_torch
from ..prune.rounds import CutError
from .aliasing import later_reader, writes_into
from .approximate import Fit
from .gate import AffineGate
from .holdings import own_copy
from .move import move_padding


@dataclass(frozen=True)
class Linearized:
    """A model with gates in place of rectifiers.

    Attributes:
        model: graph module with the parameter names of the original; its weights are copies.
        exact: rectifiers replaced without any change on the scanned data.
        approximate: rectifiers replaced although some of their neurons still switch.
        kept: the others, with the reason.
        fits: of the approximate ones that were replaced by a fitted gate, that fit with its error.
        moved: pairs of convolutions whose padding now lies in front of the first ("move").
    """

    model: fx.GraphModule
    exact: tuple[str, ...]
    approximate: tuple[str, ...]
    kept: dict[str, str]
    fits: Mapping[str, Fit] = field(default_factory=dict)
    moved: tuple[tuple[str, str], ...] = ()


def _chosen(
    report: EntropyReport,
    names: Sequence[str] | None,
    tolerance: float | None,
    fits: Mapping[str, Fit],
) -> tuple[list[str], list[str], dict[str, str]]:
    """Rectifiers to replace exactly, to replace approximately, and to keep with the reason."""
    exact, approximate, kept = [], [], {}
    for name in (*(names or ()), *fits):
        report[name]  # an unknown name is an error
    for row in report:
        near = row.name in fits or (tolerance is not None and row.entropy <= tolerance)
        if row.state == UNMEASURED:
            kept[row.name] = "no data reached it"
        elif row.state == NONFINITE:
            kept[row.name] = "its input held NaN"
        elif names is not None and row.name not in names and row.name not in fits:
            kept[row.name] = "not asked for"
        elif row.zero_entropy:
            exact.append(row.name)
        elif near:
            approximate.append(row.name)
        else:
            limit = "" if tolerance is None else f", above the tolerance of {tolerance}"
            kept[row.name] = f"{row.mixed} neurons switch (H = {row.entropy:.4g} bits{limit})"
            if row.mixed == 0:
                kept[row.name] = f"{row.kind} is linear only where its layer is empty"
    refused = [name for name in names or () if name in kept]
    if refused:
        raise ValueError(
            f"rectifier {refused[0]!r} cannot be linearised: {kept[refused[0]]}; pass "
            "tolerance=BITS to accept that its output changes"
        )
    return exact, approximate, kept


def _constant_input(model: nn.Module, site: Site) -> Tensor:
    """What an empty feeding layer and its normalisations send to the rectifier: [C]."""
    assert site.feeding is not None
    feeding = model.get_submodule(site.feeding)
    weight = feeding.weight
    assert isinstance(weight, Tensor)
    if isinstance(feeding, nn.Linear):
        value = weight.new_zeros(1, feeding.in_features)
    else:  # the smallest input with an output position; every position is alike
        sizes = [
            d * (k - 1) + 1
            for k, d in zip(feeding.kernel_size, feeding.dilation, strict=True)  # type: ignore[arg-type]
        ]
        value = weight.new_zeros(1, int(feeding.in_channels), *sizes)  # type: ignore[arg-type]
    value = feeding(value)
    for path in site.norm:
        value = model.get_submodule(path)(value)
    while value.dim() > 2:
        value = value[..., 0]
    return value[0]


@torch.no_grad()
def gate_for(model: nn.Module, node: fx.Node, site: Site, row: RectifierEntropy) -> AffineGate:
    """The gate of one rectifier: y = scale z + offset per neuron.

    ReLU off (0, 0), on (1, 0); LeakyReLU and PReLU off (slope, 0); ReLU6 saturated (0, 6);
    Hardswish as ReLU. Behind an empty layer, GELU, SiLU and a Hardswish between its corners:
    (0, act(z)), z being a constant. Any other neuron that still switches becomes (1, 0): identity
    loses least before fine-tuning.

    Args:
        model: in evaluation mode; node and site are of its graph.
    """
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    assert row.neuron_states is not None
    states = torch.from_numpy(row.neuron_states).to(reference.device)
    scale = torch.ones(site.neurons, dtype=reference.dtype, device=reference.device)
    offset = torch.zeros_like(scale)
    called = model.get_submodule(site.source) if not site.functional else None
    if row.state == EMPTY and (row.mixed or not site.kind.piecewise_linear):
        call = (
            module_call(called, site.kind, _constant_input(model, site))
            if called is not None
            else parse_function(node.target, (_constant_input(model, site),), node.kwargs)
        )
        assert call is not None
        scale.zero_()
        offset.copy_(apply_torch(call))
    else:
        off = states == State.OFF
        slope: float | Tensor = 0.0
        if site.kind.name == "leaky_relu":
            bound = (
                module_call(called, site.kind, scale)
                if called is not None
                else parse_function(node.target, (scale, *node.args[1:]), node.kwargs)
            )
            assert bound is not None
            slope = bound.slope
        elif site.kind.name == "prelu":
            assert isinstance(called, nn.PReLU)
            slope = called.weight.expand(site.neurons)[off]
        scale[off] = slope
        scale[states == State.SATURATED] = 0.0
        offset[states == State.SATURATED] = 6.0
    if site.split is not None:  # one value per entry of the dim that holds more than channels
        scale = scale[None, :, None].expand(site.split).reshape(-1)
        offset = offset[None, :, None].expand(site.split).reshape(-1)
    return AffineGate(scale, offset, channel_dim=site.channel_dim)


def _place(graph: fx.GraphModule, node: fx.Node, site: Site, gate: AffineGate, alone: bool) -> None:
    """Put a gate where a rectifier was called; a module with one call keeps its path."""
    if not site.functional and alone:
        graph.set_submodule(site.source, gate)
        return
    path = f"gate_{node.name}"
    graph.add_submodule(path, gate)
    with graph.graph.inserting_before(node):
        replacement = graph.graph.call_module(path, (node.all_input_nodes[0],))
    replacement.meta = dict(node.meta)
    node.replace_all_uses_with(replacement)
    graph.graph.erase_node(node)


def linearize(
    model: nn.Module,
    entropy: EntropyReport,
    example_inputs: ExampleInputs = None,
    *,
    names: Sequence[str] | None = None,
    tolerance: float | None = None,
    fits: Mapping[str, Fit] | None = None,
    border: str = "keep",
) -> Linearized:
    """Replace rectifiers of zero entropy by affine gates; exact on the scanned data.

    Args:
        model: the model that was scanned, weights unchanged since; it is left as it is.
        entropy: report of :func:`layer_collapse.scan`.
        example_inputs: as given to the scan.
        names: rectifiers to replace; by default all that may be.
        tolerance: bits; also replace rectifiers whose layer entropy (mean over all neurons) is at
            most this, each neuron by identity unless it was never on. Their output changes, so
            fine-tune and check the accuracy.
        fits: rectifiers to replace by a fitted gate although they still switch, from
            :func:`layer_collapse.reduce.approximate.fit_gates`: those whose error is small enough
            for you. One of zero entropy gets its exact gate all the same.
        border: "move" lets the first of two convolutions around a linearised rectifier pad for
            both, where zero padding between them would keep them from being merged exactly. The
            function changes at the border: fine-tune before folding.

    Raises:
        ValueError: the report certifies nothing, belongs to other weights, or a named rectifier is
            not linear; ``tolerance`` is negative or NaN, or ``border`` is unknown.
        CutError: the network is cut.
    """
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 bits or more (got {tolerance})")
    if border not in ("keep", "move"):
        raise ValueError(f"linearize: border must be 'keep' or 'move' (got {border!r})")
    if not entropy.certified:
        raise ValueError(
            "linearize needs the report of layer_collapse.scan(model, data); counts taken while "
            "weights move certify nothing"
        )
    if fingerprint(model) != entropy.fingerprint:
        raise ValueError(
            "the model's weights differ from those that were scanned; scan again, then linearize"
        )
    if entropy.cut:
        raise CutError(f"the network is cut ({entropy.cut_by}), so its zero entropies mean nothing")
    fits = fits or {}
    exact, approximate, kept = _chosen(entropy, names, tolerance, fits)
    graph = trace(own_copy(model), example_inputs)
    known = tuple(row.name for row in entropy)
    sites = {site.name: site for site in find_sites(graph) if site.name in known}
    nodes = {node.name: node for node in rectifier_nodes(graph)}
    calls = [source_of(node) for node in nodes.values()]
    gates = []
    with training_mode(graph, False):
        for name in (*exact, *approximate):
            site = sites[name]
            node = nodes[site.node]
            if site.kind.name == "prelu" and submodule(graph, node) is None:
                kept[name] = "a functional PReLU has its slopes in the graph"
                continue
            if (reader := _other_reader(graph, node)) is not None:
                place = reader.target if reader.op == "call_module" else reader.name
                kept[name] = (
                    f"it writes in place what {place!r} reads through a view; let it write "
                    "elsewhere (inplace=False) and read its result"
                )
                continue
            fitted = name in fits and name in approximate
            gate = fits[name].gate if fitted else gate_for(graph, node, site, entropy[name])
            gates.append((node, site, copy.deepcopy(gate)))
    for node, site, gate in gates:
        _place(graph, node, site, gate, calls.count((site.source, site.functional)) == 1)
    graph.graph.eliminate_dead_code(
        lambda n: n.is_impure() or (not n.users and _other_reader(graph, n) is not None)
    )
    graph.delete_all_unused_submodules()
    graph.recompile()
    moved = _moved(graph, [gate for _, _, gate in gates]) if border == "move" else ()
    if moved and example_inputs is not None:
        record_shapes(graph, example_inputs)
    return Linearized(
        graph,
        tuple(name for name in exact if name not in kept),
        tuple(name for name in approximate if name not in kept),
        kept,
        {name: fit for name, fit in fits.items() if name in approximate and name not in kept},
        moved,
    )


def _other_reader(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Who reads what a node writes in place, but not as its result: a gate writes nothing there."""
    sources = node.all_input_nodes[:1]
    writes = any(writes_into(graph, node, source) for source in sources)
    return later_reader(graph, node) if writes else None


def _moved(graph: fx.GraphModule, gates: list[AffineGate]) -> tuple[tuple[str, str], ...]:
    with training_mode(graph, False):
        pairs = [
            move_padding(graph, node)
            for node in reversed(graph.graph.nodes)  # from the last: what it hands on moves on
            if any(submodule(graph, node) is gate for gate in gates)
        ]
    return tuple(pair for pair in pairs if pair is not None)
