"""What every way of tracing needs: example inputs, modes, the shapes of a graph's values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils._pytree import tree_leaves, tree_map_only

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any] | None


class TraceError(RuntimeError):
    """A model, or a rectifier in it, that cannot be analysed; the message is one sentence."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, to be quoted in another one."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def check_traceable(model: nn.Module) -> None:
    """Refuse forms of a model in which its layers cannot be seen.

    Raises:
        TraceError: it is scripted, was made by torch.export, or is wrapped.
    """
    instead = None
    if isinstance(model, torch.jit.ScriptModule):
        instead = "a scripted module has no forward in Python; pass the module that was scripted"
    elif isinstance(model, fx.GraphModule) and "train" in vars(model):
        instead = "torch.export made it of operators that are no layers; pass the model itself"
    elif isinstance(model, nn.DataParallel):
        instead = "it is a wrapper around the model; pass its .module"
    if instead is not None:
        raise TraceError(f"cannot trace {type(model).__name__}: {instead}")


@contextmanager
def training_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    """Every module of ``model`` in the given mode; afterwards each is as it was."""
    before = {module: module.training for module in model.modules()}
    model.train(mode)
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Language models do not return the keys and values that they cache for the next token.

    That is what their ``config.use_cache`` asks for where a call does not say ``use_cache``; every
    such config has its own value again afterwards.
    """
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    asking = [config for config in configs if getattr(config, "use_cache", None) is True]
    for config in asking:
        config.use_cache = False
    try:
        yield
    finally:
        for config in asking:
            config.use_cache = True


def bind(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs), {}


def ordered_inputs(module: fx.GraphModule, example_inputs: ExampleInputs) -> list[Any]:
    """Example inputs in the order of the graph's placeholders."""
    args, kwargs = bind(example_inputs)
    names = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    return [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]


def owner_path(node: fx.Node) -> str:
    """Path of the module in whose forward this node stands ("" for the root)."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]) if paths else ""


def _memory(value: Any) -> set[int]:
    """Addresses of the memory of all plain tensors in a value."""
    leaves = (leaf for leaf in tree_leaves(value) if type(leaf) in (Tensor, nn.Parameter))
    return {leaf.untyped_storage().data_ptr() for leaf in leaves} - {0}


class _Shapes(fx.Interpreter):
    """torch's ShapeProp, but for the traceback that it prints where the model does not run.

    Values without a tensor in them (sizes) are noted as they are; so are, by number, the inputs of
    a node in whose memory its value lies.
    """

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        tensors = []

        def described(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            tensors.append(value)
            return _extract_tensor_metadata(value)

        meta = map_aggregate(result, described)
        own = _memory(result)
        inputs = map(_memory, map(self.env.__getitem__, n.all_input_nodes))
        n.meta["shares_memory"] = tuple(i for i, theirs in enumerate(inputs) if own & theirs)
        n.meta.pop("plain_value", None)
        if tensors:
            n.meta["tensor_meta"] = meta
        else:
            n.meta["plain_value"] = result
        return result


def record_shapes(module: fx.GraphModule, example_inputs: ExampleInputs) -> Any:
    """Run ``module`` once in evaluation mode and note every value's shape in the graph.

    Returns:
        What it gives for the example inputs, which it gets a copy of.
    """
    # Not deepcopy, which cannot copy tensors while others are made without values.
    ordered = tree_map_only(Tensor, torch.clone, ordered_inputs(module, example_inputs))
    try:
        with torch.no_grad(), training_mode(module, False):
            return _Shapes(module).run(*ordered)
    except Exception as error:
        raise TraceError(
            f"the model does not run on the example inputs ({first_line(error)}); pass inputs of "
            "the shapes and dtypes that the model expects"
        ) from error
