"""From a model to its graph: by torch.fx, else torch.export, else around what neither follows."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from torch import fx, nn

from ..measure.rectifiers import module_kind
from .by_export import exported
from .by_fx import Untraceable, symbolic
from .hooks import LOST, agrees, hooked, is_patched, refusal, without_hooks
from .inputs import ExampleInputs, TraceError, bind, check_traceable, first_line, record_shapes
from .unrecognised import unrecognised


def trace(
    model: nn.Module,
    example_inputs: ExampleInputs = None,
    *,
    by: Literal["fx", "export"] | None = None,
) -> fx.GraphModule:
    """Trace a model into a graph whose modules and parameters are the model's own.

    ``meta["traced_by"]`` of the result says how: "fx", or "export" where torch.fx cannot follow the
    forward or training and evaluation differ in more than dropout; such a graph is that of
    evaluation, for inputs of the example's size (but for the batch). Where torch.export fails too,
    modules with forwards that torch.fx does not follow are called as a whole; a warning names them
    and ``meta["hidden"]`` holds the reasons by path: rectifiers in them are not seen. Activations
    that are rectifiers by what they compute but not by name (``clamp(min=0)``, GELUs written out)
    are named there as well, and so are modules with forward hooks that the graph does not call as a
    whole: only what such a hook changes in the values is part of the graph.

    Args:
        model: any traceable module, in any mode; it is left as it is.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments. With
            them, the shape of every value is known (``node.meta["tensor_meta"]``); torch.export
            needs them.
        by: this way or none.

    Raises:
        TraceError: nothing can follow the model's own forward, or what hooks (or a forward that was
            replaced on the object) do to its output.
    """
    check_traceable(model)
    args, kwargs = bind(example_inputs)
    hooks = hooked(model)
    suspect = example_inputs is not None and (bool(hooks) or is_patched(model))
    # Only a comparison tells hooks that watch, and are not called, from those that compute.
    with without_hooks([*hooks.values()] if suspect else []):
        module = _followed(model, args, kwargs, by)
        result = _completed(module, model, example_inputs)
    if suspect and not agrees(model, args, kwargs, result):
        try:
            module = _followed(model, args, kwargs, by)
            result = _completed(module, model, example_inputs)
        except TraceError as error:
            raise refusal(model, hooks) from error
        if not agrees(model, args, kwargs, result):
            raise refusal(model, hooks)
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    for path in hooks.keys() - called:
        place = path or type(model).__name__
        module.meta["hidden"].setdefault(place, f"{place!r} {LOST}")
    for path in called:
        if isinstance(module.get_submodule(path), nn.DataParallel):
            told = f"{path!r} (DataParallel) is called as a whole; put its .module there"
            module.meta["hidden"].setdefault(path, told)
    return module


def _followed(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    by: Literal["fx", "export"] | None,
) -> fx.GraphModule:
    """The graph by the first way that can follow the model; how, and what it hides, in its meta."""
    hidden: dict[str, str] = {}
    module, how = None, "fx"
    try:
        if by != "export":
            module = symbolic(model, args, kwargs)
    except Untraceable as failure:
        if by == "fx" or not (args or kwargs):
            raise
        refused = failure
    if module is None:
        try:
            module, how = exported(model, args, kwargs), "export"
        except Exception as error:
            if by == "export":
                raise TraceError(
                    f"cannot trace {type(model).__name__} by torch.export ({first_line(error)})"
                ) from error
            both = f"{refused}; torch.export does not either ({first_line(error)})"
            module, hidden = _around(model, args, kwargs, Untraceable(both, refused.path))
    for path, reason in unrecognised(module).items():
        hidden.setdefault(path, reason)
        warnings.warn(reason, stacklevel=3)
    module.meta["traced_by"], module.meta["hidden"] = how, hidden
    return module


def _completed(module: fx.GraphModule, model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Compile the graph, record shapes, copy the modes; what it gives for the example inputs."""
    module.graph.lint()
    module.recompile()
    result = None if example_inputs is None else record_shapes(module, example_inputs)
    flags = {path: own.training for path, own in model.named_modules()}
    for path, submodule in module.named_modules():  # GraphModule.train() reaches what is its own
        submodule.training = flags.get(path, model.training)
    return result


def _around(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], failure: Untraceable
) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph with modules that cannot be followed as single calls, and why, by path."""
    opaque: dict[str, str] = {}
    while True:
        if failure.path == "" or failure.path in opaque:
            raise failure
        inside = model.get_submodule(failure.path)
        names = [path for path, m in inside.named_modules(prefix=failure.path) if module_kind(m)]
        opaque[failure.path] = (
            f"neither torch.fx nor torch.export can follow the forward of {failure.path!r} "
            f"({type(inside).__name__}), so rectifiers in it "
            f"({', '.join(map(repr, names)) or 'functional ones'}) are not seen"
        )
        try:
            module = symbolic(model, args, kwargs, opaque)
        except Untraceable as another:
            failure = another
            continue
        for reason in opaque.values():
            warnings.warn(reason, stacklevel=5)
        return module, opaque
