"""What a graph holds: tensors, ties between them, dead parts."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from .aliasing import later_reader, writes_into


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by path, tied ones under each of their paths."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )


def attribute(module: nn.Module, path: str) -> Any:
    """What lies at a dotted path."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def sharing_copy(module: nn.Module) -> Any:
    """A deep copy, buffers included, whose parameters are the module's own."""
    return _copied(module, {id(p): p for p in module.parameters()} | _computed(module))


def own_copy(module: nn.Module) -> Any:
    """A deep copy, also of a module whose hooks keep computed tensors in it.

    ``torch.nn.utils.weight_norm`` and ``prune`` do, and torch itself does not copy those.
    """
    return _copied(module, _computed(module))


def _copied(module: nn.Module, memo: dict[int, Any]) -> Any:
    """A deep copy, or what keeps the module from being copied, by name."""
    try:
        return copy.deepcopy(module, dict(memo))
    except TypeError as error:
        for path, inside in module.named_modules():
            for name, value in vars(inside).items():
                if name.startswith("_") or _can_be_copied(value, memo):
                    continue
                place = f"{path}.{name}".lstrip(".")
                raise TypeError(
                    f"expected a model that copy.deepcopy copies (got {type(module).__name__}, "
                    f"whose attribute {place!r} it does not: {error}); keep it outside of the model"
                ) from error
        raise


def _can_be_copied(value: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True


def _computed(module: nn.Module) -> dict[int, Any]:
    """What deepcopy should take for tensors that autograd has made, by their id."""
    held = (value for inside in module.modules() for value in vars(inside).values())
    made = [value for value in held if isinstance(value, Tensor) and not value.is_leaf]
    return {id(value): value.detach().clone() for value in made}


def disown(module: nn.Module, other: nn.Module) -> None:
    """Copy, one by one, those tensors of ``module`` that lie in the memory of ``other``'s."""
    theirs = {_memory(tensor) for tensor in tensors(other).values()}
    copies: dict[int, Tensor] = {}
    for path, tensor in tensors(module).items():
        if _memory(tensor) in theirs:
            copied = copies.setdefault(id(tensor), copy.deepcopy(tensor))
            put(module, path, copied)


def put(module: nn.Module, path: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer at a path; the object that was there stays as it is."""
    owner, _, name = path.rpartition(".")
    holder = module.get_submodule(owner)
    if name in holder._parameters:
        holder._parameters[name] = tensor  # type: ignore[assignment]
    else:
        holder._buffers[name] = tensor


def like(old: Tensor, new: Tensor) -> Tensor:
    """``new`` as a parameter where ``old`` is one."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that share their memory; of a subclass (packed, quantised) the object."""
    if type(tensor) in (Tensor, nn.Parameter) and tensor.numel():
        return tensor.device, tensor.untyped_storage().data_ptr()
    return (id(tensor),)


def tied(module: nn.Module) -> set[str]:
    """Paths of all tensors that share their memory with another path."""
    at: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, tensor in tensors(module).items():
        at[_memory(tensor)].append(name)
    return {name for names in at.values() if len(names) > 1 for name in names}


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
            and (source.op in ("placeholder", "get_attr") or later_reader(module, node))
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
