"""What a graph holds: tensors, ties between them, values written in place, dead parts."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph import submodule


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by path, tied ones under each of their paths."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )


def tied(module: nn.Module) -> set[str]:
    """Paths of all tensors that share their memory with another path."""
    at: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, tensor in tensors(module).items():
        key: tuple[Any, ...] = (id(tensor),)
        if type(tensor) in (Tensor, nn.Parameter) and tensor.numel():
            key = (tensor.device, tensor.untyped_storage().data_ptr())
        at[key].append(name)
    return {name for names in at.values() if len(names) > 1 for name in names}


def writes_into(module: fx.GraphModule, node: fx.Node, value: fx.Node) -> bool:
    """Whether ``node`` changes the memory of ``value``."""
    if not node.args or node.args[0] is not value:
        return False
    if node.op == "call_module":
        return bool(getattr(submodule(module, node), "inplace", False))
    if node.kwargs.get("inplace", False) or node.kwargs.get("out") is not None:
        return True
    name = str(getattr(node.target, "__name__", node.target))
    in_place_operator = getattr(node.target, "__module__", "") == "_operator" and (
        name.startswith("i") and name not in ("is_", "is_not", "invert", "inv", "index")
    )
    return in_place_operator or (name.endswith("_") and not name.endswith("__"))


def remove_dead(module: fx.GraphModule) -> None:
    """Erase nodes whose value nobody reads, then the modules and tensors that nobody uses."""
    for node in reversed(list(module.graph.nodes)):
        if node.users or node.op in ("placeholder", "output") or node.target is torch._assert:
            continue
        source = node.args[0] if node.args else None
        # Something written in place lives on in its source while others read that.
        if (
            isinstance(source, fx.Node)
            and writes_into(module, node, source)
            and (len(source.users) > 1 or source.op in ("placeholder", "get_attr"))
        ):
            continue
        module.graph.erase_node(node)
    modules = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    attributes = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    emptied = set[str]()
    for path in tensors(module):
        owner, _, name = path.rpartition(".")
        parts = owner.split(".")
        inside = any(".".join(parts[: i + 1]) in modules for i in range(len(parts)))
        if path not in attributes and not inside:
            delattr(module.get_submodule(owner), name)
            emptied.add(owner)
    module.delete_all_unused_submodules()
    left = dict(module.named_modules())
    for path in emptied & set(left) - {""}:
        module.set_submodule(path, _shell(left[path]))


def _shell(module: nn.Module) -> nn.Module:
    """What is left of a layer without its tensors: a name for the modules in it."""
    shell = nn.Module()
    shell._modules, shell._parameters = module._modules, module._parameters
    shell._buffers, shell.training = module._buffers, module.training
    shell._non_persistent_buffers_set = module._non_persistent_buffers_set
    return shell
