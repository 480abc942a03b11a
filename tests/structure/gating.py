"""Force rectifiers to be linear, as if pruning had made them so."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from layer_collapse.graph import rectifier_nodes, trace
from layer_collapse.measure.sites import find_sites
from layer_collapse.reduce.gate import AffineGate


def force_gates(
    model: nn.Module, example: Tensor | dict[str, Tensor], share: int = 3
) -> tuple[fx.GraphModule, list[str]]:
    """Every ``share``-th rectifier becomes a gate: in turns all ON, mixed, all OFF.

    OFF only where something leads around the layer; else mixed.

    Returns:
        The gated graph of a copy of the model, and the modes.
    """
    graph = trace(copy.deepcopy(model), example)
    sites = {site.node: site for site in find_sites(graph)}
    generator = torch.Generator().manual_seed(2)
    modes: list[str] = []
    for node in rectifier_nodes(graph)[::share]:
        site, mode = sites[node.name], ("on", "mixed", "off")[len(modes) % 3]
        if mode == "off" and not site.way_around:
            mode = "mixed"
        scale = {
            "on": torch.ones(site.neurons),
            "mixed": (torch.rand(site.neurons, generator=generator) < 0.6).float(),
            "off": torch.zeros(site.neurons),
        }[mode]
        if site.split is not None:  # one value per entry of the dim that holds more than channels
            scale = scale[None, :, None].expand(site.split).reshape(-1)
        gate = AffineGate(scale, torch.zeros_like(scale), site.channel_dim)
        graph.add_submodule(f"gate_{len(modes)}", gate)
        with graph.graph.inserting_before(node):
            call = graph.graph.call_module(f"gate_{len(modes)}", (node.all_input_nodes[0],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
        modes.append(mode)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph, modes
