"""Who reads memory that a node of a graph writes in place, otherwise than as that node's result."""

from __future__ import annotations

from torch import fx, nn

from ..graph import carries_data, submodule

#: Calls whose result may lie in the memory of their first input, where no run has told.
_VIEWS = """alias chunk contiguous detach diagonal dropout dropout1d dropout2d dropout3d expand
    expand_as flatten float getitem mT movedim narrow permute ravel real reshape reshape_as select
    split squeeze swapaxes swapdims t T tensor_split to transpose type_as unbind unflatten unfold
    unsqueeze view view_as"""
_VIEW_MODULES = (
    *(nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
)


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


def shares(module: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Inputs of a node in whose memory its value lies: as the recorded run found, else by name."""
    sources = list(node.all_input_nodes)
    recorded = node.meta.get("shares_memory")
    if recorded is not None:
        return [source for number, source in enumerate(sources) if number in recorded]
    called = submodule(module, node)
    attribute = node.args[1] if node.target is getattr else node.target
    name = str(getattr(attribute, "__name__", attribute))
    view = isinstance(called, _VIEW_MODULES) if called is not None else name in _VIEWS.split()
    first = sources[:1]
    return first if view or any(writes_into(module, node, source) for source in first) else []


def later_reader(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The first node that reads, after ``node``, memory that ``node`` wrote, but not its result.

    Args:
        node: one that writes in place into its first input.

    Returns:
        None where all that follows reads the result of ``node``: then it may as well write
        somewhere else.
    """
    position = {one: number for number, one in enumerate(module.graph.nodes)}
    stack, same = list(node.all_input_nodes[:1]), set[fx.Node]()
    while stack:
        value = stack.pop()
        if value is node or value in same:
            continue
        same.add(value)
        stack += shares(module, value)
        stack += [user for user in value.users if value in shares(module, user)]
    readers = {
        user
        for value in same
        for user in value.users
        if position[user] > position[node] and carries_data(user)
    }
    return min(readers, key=position.__getitem__, default=None)
