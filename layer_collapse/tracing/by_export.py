"""Tracing by torch.export, for forwards that torch.fx cannot follow.

The exported graph consists of aten operators on placeholders for parameters. Here the calls of
torch's own modules become such calls again, and the others Python calls, so that paths, rectifiers
and fold rules are those of the model. The graph is that of evaluation; where torch.export allows,
the first dim of every input stays free, all other sizes are those of the example.
"""

from __future__ import annotations

import inspect
import operator
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils._pytree import tree_map

from .by_fx import chain_inplace_rectifiers
from .inputs import training_mode, without_cache
from .lifting import lift_layers, liftable
from .plain import is_check, operator_name, plain_call


def _program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def first_free(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: torch.export.Dim.AUTO} if value.ndim and value.shape[0] > 1 else {}
        return None

    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = {name: tree_map(first_free, value) for name, value in given.items()}
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception:
        return torch.export.export(model, args, kwargs, strict=False)


#: Modules of torch's own that give several values, of which a program may use one.
_SEVERAL = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)
_NEW = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")


def _constants(program: Any) -> dict[fx.Node, Any]:
    """Values of all nodes that depend on no input and no parameter (masks made of sizes).

    What is written into them in place is done, so that no graph has to keep it in order.
    """
    values: dict[fx.Node, Any] = {}
    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(inputs, program.graph_signature.input_specs, strict=True):
        if spec.kind == InputKind.CONSTANT_TENSOR:
            values[node] = program.constants[spec.target].detach().clone()
    for node in program.graph.nodes:
        if node.op != "call_function" or is_check(node):
            continue
        sources = list(node.all_input_nodes)
        if operator_name(node) in _NEW:
            sources = sources[1:]  # of the first, only dtype and device matter
        if "rand" in operator_name(node) or not all(source in values for source in sources):
            continue
        example = {
            source: torch.empty(0, dtype=source.meta["val"].dtype, device=source.meta["val"].device)
            for source in node.all_input_nodes
            if source not in values
        }
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), {**values, **example}.__getitem__)
        values[node] = node.target(*args, **kwargs)
    return values


def _writes(program: Any, leaves: Collection[fx.Node], constants: Collection[fx.Node]) -> bool:
    """Whether anything outside of torch's own modules is written in place."""
    return any(
        getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        for node in program.graph.nodes
        if node.op == "call_function" and node not in leaves and node not in constants
    )


class _Rebuilt:
    """The model's graph, rebuilt node by node from an exported program."""

    def __init__(self, program: Any, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.constants = _constants(program)
        leaves = {n for n in program.graph.nodes if self._leaf_of(n)}
        if _writes(program, leaves, self.constants):
            program = program.run_decompositions({})  # the same without writing in place
            self.constants = _constants(program)
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.root: dict[str, Any] = {}
        self.paths: dict[fx.Node, str] = {}  # placeholders of parameters, buffers, constants
        self.members: dict[str, set[fx.Node]] = defaultdict(set)
        self.leaf: dict[fx.Node, tuple[str, str]] = {}
        for node in program.graph.nodes:
            if node.op == "call_function" and (leaf := self._leaf_of(node)):
                self.leaf[node] = leaf
                self.members[leaf[0]].add(node)
        inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
        for node, spec in zip(inputs, program.graph_signature.input_specs, strict=True):
            self._placeholder(node, spec)
        for made in list(self.graph.nodes):
            self._check_constant(made)
        for node in program.graph.nodes:
            if node in self.constants:
                self._constant(node)
            elif node.op == "call_function" and not is_check(node):
                self._call(node)
        (output,) = (n for n in program.graph.nodes if n.op == "output")
        # What forward writes into its inputs and buffers is an output of the program, too.
        specs = program.graph_signature.output_specs
        returned = [spec.kind == OutputKind.USER_OUTPUT for spec in specs]
        outputs = [self._value(v) for v, r in zip(output.args[0], returned, strict=True) if r]
        self.graph.output(_structure(program.call_spec.out_spec, outputs))

    def _placeholder(self, node: fx.Node, spec: Any) -> None:
        if spec.kind == InputKind.USER_INPUT:
            value = getattr(spec.arg, "value", inspect.Parameter.empty)
            made = self.graph.placeholder(node.name, default_value=value)
            size = next(iter(getattr(node.meta.get("val"), "shape", ())), None)
            if size is not None and is_concrete_int(size):  # forward counts its samples
                made.meta["fixed_batch"] = int(size)
            self.values[node] = made
            return
        path = str(spec.target)
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            owner, _, name = path.rpartition(".")
            self.root[path] = getattr(self.modules[owner], name)
            self.paths[node] = path

    def _check_constant(self, made: fx.Node) -> None:
        """Let the graph refuse another value than the example's where it knows that one only."""
        if not made.args:
            return
        same = self.graph.call_function(operator.eq, (made, made.args[0]))
        told = f"expected {made.target} = {made.args[0]!r}, for which this graph was traced; "
        told += "trace or fold again with an example of the other value"
        self.graph.call_function(torch._assert, (same, told))

    def _constant(self, node: fx.Node) -> None:
        value = self.constants[node]
        if all(user in self.constants for user in node.users):
            return
        if not isinstance(value, Tensor):
            self.values[node] = value
            return
        self.paths[node] = f"constant_{len(self.root)}"
        self.root[self.paths[node]] = value.clone()

    def _leaf_of(self, node: fx.Node) -> tuple[str, str] | None:
        """Key of the call and path of the outermost of torch's own modules that made a node."""
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            module = self.modules.get(path)  # not every entry is a path of the model
            own = type(module).__module__.startswith(("torch.nn.", "layer_collapse.reduce."))
            if own and not isinstance(module, nn.Sequential):
                return key, path
        return None

    def _module_call(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Input and output of the module call that a node is part of: one tensor each, or None."""
        key, path = self.leaf[node]
        if isinstance(self.modules[path], _SEVERAL):
            return None
        parameters = inspect.signature(self.modules[path].forward).parameters.values()
        if sum(p.default is p.empty for p in parameters) != 1:
            return None
        members = self.members[key]
        given = {
            source
            for member in members
            for source in member.all_input_nodes
            if source not in members
            and source not in self.paths
            and source not in self.constants
            and isinstance(source.meta.get("val"), Tensor)
        }
        taken = [n for n in members if any(user not in members for user in n.users)]
        return (given.pop(), taken[0]) if len(given) == len(taken) == 1 else None

    def _call(self, node: fx.Node) -> None:
        if node in self.leaf and (call := self._module_call(node)) is not None:
            if node is call[1]:
                path = self.leaf[node][1]
                self.root[path] = self.modules[path]
                made = self.graph.call_module(path, (self._value(call[0]),))
                made.meta["nn_module_stack"] = node.meta["nn_module_stack"]
                self.values[node] = made
            return
        op, target, args, kwargs = plain_call(node)
        args, kwargs = fx.node.map_arg((args, kwargs), self._value)
        made = self.graph.create_node(op, target, args, kwargs)
        made.meta["nn_module_stack"] = node.meta.get("nn_module_stack") or {}
        self.values[node] = made

    def _value(self, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if value not in self.values:
            self.values[value] = self.graph.get_attr(self.paths[value])
        return self.values[value]


def _structure(spec: Any, outputs: list[Any]) -> Any:
    """Flat outputs as the model returns them; an output class that is a mapping as a dict."""
    if spec.is_leaf():
        return outputs.pop(0)
    children = [_structure(child, outputs) for child in spec.children()]
    if spec.type is list:
        return children
    if spec.type is tuple:
        return tuple(children)
    names = spec.context if isinstance(spec.context, list) else None
    if names is None or len(names) != len(children):
        return tuple(children)
    return dict(zip(names, children, strict=True))


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """The graph of a model's evaluation mode, by torch.export.

    A language model whose config says ``use_cache`` is traced without: its graph does not return
    past keys and values, unless the example itself says ``use_cache=True``. Arguments that are no
    tensors must be those of the example: with any other value the graph raises an AssertionError.

    Raises:
        Exception: whatever torch.export says about a forward that it cannot follow.
    """
    if any(isinstance(value, list | tuple | Mapping) for value in (*args, *kwargs.values())):
        raise ValueError("its inputs hold a list or a mapping; pass tensors one by one")
    with training_mode(model, False), without_cache(model), torch.no_grad():
        rebuilt = _Rebuilt(_program(model, args, kwargs), model)
    used = {str(n.target) for n in rebuilt.graph.nodes if n.op in ("get_attr", "call_module")}
    root = {path: value for path, value in rebuilt.root.items() if path in used}
    module = fx.GraphModule(root, rebuilt.graph, type(model).__name__)
    kept = set(model.state_dict())
    for path, value in root.items():
        if type(value) is Tensor and path not in kept:  # no part of the model's state_dict
            owner, _, name = path.rpartition(".")
            module.get_submodule(owner)._non_persistent_buffers_set.add(name)
    chain_inplace_rectifiers(module, module.graph)
    lift_layers(module, model, liftable(module, model))
    module.graph.eliminate_dead_code()
    return module
