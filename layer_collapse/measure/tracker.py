"""Counting in a live model: every rectifier counts signs as it activates, until ``remove()``."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..graph import ExampleInputs, TraceError, rectifier_nodes, trace
from ..ops.entropy import LiveEntropy, live_entropy
from ..ops.rectify import COUNT, FLAGS, LIVE, POSITIONS
from ..ranks import Group
from ..sharding import plain_view
from .fusing import PAIR, Pair, find_pairs, paired_class
from .ranks import summed_ledgers
from .rectifiers import module_kind
from .report import EntropyReport, measured
from .sites import calls_per_forward, empty_feeding, find_sites, scope_of, source_of
from .taps import TAP, Counter, Shared, Tap, tracked_class, untracked_class

if TYPE_CHECKING:
    from ..prune.masks import Masks


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


class EntropyTracker:
    """Counts the signs of every rectifier's input while the model is used; see :func:`track`."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        ignore: tuple[str, ...],
        live: bool = False,
        fuse_bn: bool = False,
    ) -> None:
        self.model = unwrapped(model)
        if any(hasattr(module, TAP) for module in self.model.modules()):
            raise RuntimeError("the model is tracked already; call remove() on its tracker first")
        with plain_view(self.model):
            graph = trace(self.model, example_inputs)
            self.sites = find_sites(graph, ignore)
        if not self.sites:
            raise ValueError(
                f"{type(self.model).__name__} has no rectifier to track; expected at least one of "
                "ReLU, ReLU6, LeakyReLU, PReLU, GELU, SiLU, Hardswish"
            )
        #: Fused pairs: name of the rectifier -> path of its batch norm.
        self.fused: dict[str, str] = {}
        self._flags = COUNT | LIVE if live else COUNT
        self._shared = Shared()
        self._classes: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []
        self._hooks: list[Any] = []
        try:
            pairs = find_pairs(graph, self.sites, self.model) if fuse_bn else {}
            self._counters = self._install(graph, ignore)
            for name, (path, modules) in pairs.items():
                self._pair(path, Pair(path, self._counters[name], self._shared, modules))
                self.fused[name] = path
            self._watch_attention_mask()
            self.resume()
        except BaseException:
            self.remove()
            raise

    def _install(self, graph: fx.GraphModule, ignore: tuple[str, ...]) -> dict[str, Counter]:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        counters = {site.name: Counter(site, device) for site in self.sites}
        nodes: dict[tuple[str, bool], list[fx.Node]] = defaultdict(list)
        for node in rectifier_nodes(graph):
            nodes[source_of(node)].append(node)
        for path, module in self.model.named_modules():
            kind = module_kind(module)
            if kind is not None and (path, False) not in nodes:
                nodes[path, False] = []  # never called in the graph: a call will be an error
        for (source, functional), calls in nodes.items():
            module = self.model.get_submodule(source)
            own = [s for s in self.sites if (s.source, s.functional) == (source, functional)]
            name = ", ".join(site.name for site in own) if functional and own else source
            if "forward" in vars(module):
                raise TraceError(
                    f"rectifier {name!r} cannot be counted: the forward of {source!r} was replaced "
                    "on the instance; define it in a class"
                )
            kind = None if functional else module_kind(module)
            tap = Tap(name, kind, len(calls) or int(source in ignore), self._shared)
            tap.counters = {site.index: counters[site.name] for site in own}
            if functional:
                tap.per_forward = calls_per_forward(calls)
            if len(calls) > 1:
                scope = self.model.get_submodule(scope_of(graph, calls))
                self._hooks.append(scope.register_forward_pre_hook(tap.restart))
            self._exchange_class(module, tracked_class(type(module), functional))
            module.__dict__[TAP] = tap
        return counters

    def _exchange_class(self, module: nn.Module, ours: type[nn.Module]) -> None:
        self._classes.append((module, ours, type(module)))
        module.__class__ = ours

    def _pair(self, path: str, pair: Pair) -> None:
        norm = self.model.get_submodule(path)
        self._exchange_class(norm, paired_class(type(norm)))
        norm.__dict__[PAIR] = pair

    def _watch_attention_mask(self) -> None:
        """Take the mask of valid tokens from the model's own `attention_mask` argument."""
        names = list(inspect.signature(self.model.forward).parameters)
        if "attention_mask" not in names:
            return
        position = names.index("attention_mask")
        shared = self._shared

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask = kwargs.get("attention_mask")
            if mask is None and len(args) > position:
                mask = args[position]
            if not shared.explicit:
                shared.valid = mask

        def drop(*_: Any) -> None:
            if not shared.explicit:
                shared.valid = None

        self._hooks.append(self.model.register_forward_pre_hook(take, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(drop))

    @contextmanager
    def valid(self, mask: Tensor) -> Iterator[None]:
        """Count only the positions where ``mask`` is true (or non-zero) inside the ``with``.

        Args:
            mask: bool or 0/1, e.g. [B, T] for token-major values [B, T, C]; broadcast over further
                dims of positions. It goes before the model's own ``attention_mask``.

        Raises:
            RuntimeError: at the forward pass, when the mask does not fit a rectifier's positions.
        """
        before = (self._shared.valid, self._shared.explicit)
        self._shared.valid, self._shared.explicit = mask, True
        try:
            yield
        finally:
            self._shared.valid, self._shared.explicit = before

    def pause(self) -> None:
        """Stop counting. The op reads a flag, so a compiled model is not compiled again."""
        self._each_ledger(lambda ledger: ledger[FLAGS].fill_(0))

    def resume(self) -> None:
        """Count again after :meth:`pause`."""
        self._each_ledger(lambda ledger: ledger[FLAGS].fill_(self._flags))

    def reset(self) -> None:
        """Set every count to zero; a pause stays a pause."""
        self._each_ledger(lambda ledger: ledger[POSITIONS:].zero_())

    def _each_ledger(self, change: Callable[[Tensor], Any]) -> None:
        for counter in self._counters.values():
            change(counter.ledger)

    def entropy(self, group: Group = None) -> EntropyReport:
        """What was counted since the start or the last :meth:`reset`.

        Counts taken while weights move steer the pruning; only :func:`layer_collapse.scan`
        certifies zero entropy.

        Args:
            group: add up the counts of these processes, e.g. ``torch.distributed.group.WORLD``: one
                all-reduce, and the same report on all of them. None: the counts of this process.
        """
        ledgers = [self._counters[site.name].ledger for site in self.sites]
        rows = measured(
            self.sites,
            ledgers if group is None else summed_ledgers(ledgers, group),
            empty_feeding(self.model, self.sites),
        )
        blocked = [row for row in rows if not row.way_around and row.constant]
        cut_by = "; ".join(
            f"{row.name!r} is constant and nothing leads around it" for row in blocked
        )
        return EntropyReport(tuple(rows), cut=bool(blocked), cut_by=cut_by)

    def scalars(self, group: Group = None, masks: Masks | None = None) -> dict[str, float]:
        """Numbers for any logger, by name: ``entropy/<rectifier>`` and ``entropy/mean`` in bits.

        A rectifier without counts is left out. With ``masks`` also ``sparsity/<parameter>`` and
        ``sparsity/all``. ``group``: see :meth:`entropy`.
        """
        rows = self.entropy(group).rows
        known = {f"entropy/{r.name}": r.entropy for r in rows if math.isfinite(r.entropy)}
        if known:
            known["entropy/mean"] = sum(known.values()) / len(known)
        if masks is not None:
            known |= {f"sparsity/{name}": masks.sparsity([name]) for name in masks.names}
            known["sparsity/all"] = masks.sparsity()
        return known

    def live(self) -> dict[str, LiveEntropy]:
        """What the last forward made of the counts so far, by rectifier: reads three words each.

        Raises:
            RuntimeError: the model was not tracked with ``live=True``.
        """
        if not self._flags & LIVE:
            raise RuntimeError("live entropies need track(model, live=True)")
        return {name: live_entropy(counter.ledger) for name, counter in self._counters.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The ledgers by rectifier name: [6 + rows * C] int64, on the CPU."""
        return {
            name: counter.ledger.detach().cpu().clone() for name, counter in self._counters.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on counting from a :meth:`state_dict`.

        Raises:
            ValueError: other rectifiers or sizes than this model's; nothing is changed then.
        """
        if set(state) != set(self._counters):
            odd = ", ".join(sorted(set(state) ^ set(self._counters)))
            raise ValueError(f"the counts belong to another model: rectifiers differ ({odd})")
        for name, counter in self._counters.items():
            if state[name].shape != counter.ledger.shape or state[name].dtype != torch.int64:
                raise ValueError(
                    f"counts of {name!r}: expected int64 of {counter.ledger.numel()} words (got "
                    f"{state[name].dtype} of shape {tuple(state[name].shape)})"
                )
        for name, counter in self._counters.items():
            counter.ledger.copy_(state[name])

    def remove(self) -> None:
        """Give the model back as it was; the counts stay readable.

        What else has changed the model's classes since (``fully_shard``) stays.
        """
        for module, ours, original in self._classes:
            module.__class__ = untracked_class(type(module), ours, original)
            module.__dict__.pop(TAP, None)
            module.__dict__.pop(PAIR, None)
        for hook in self._hooks:
            hook.remove()
        self._classes, self._hooks = [], []

    def __enter__(self) -> EntropyTracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"EntropyTracker({type(self.model).__name__}, {len(self.sites)} rectifiers)"


def track(
    model: nn.Module,
    example_inputs: ExampleInputs = None,
    *,
    ignore: tuple[str, ...] | list[str] = (),
    live: bool = False,
    fuse_bn: bool = False,
) -> EntropyTracker:
    """Count, from now on, how every rectifier of ``model`` uses its non-linearity.

    Outputs, gradients, parameter names and ``state_dict`` stay as they are. Works in eager mode and
    under ``torch.compile(fullgraph=True)``, with autocast, channels_last and activation
    checkpointing (a replayed forward is not counted again).

    Args:
        model: any model that torch.fx can trace; its rectifiers may be modules, shared modules,
            in-place modules or functional calls of ReLU, ReLU6, LeakyReLU, PReLU, GELU, SiLU and
            Hardswish.
        example_inputs: a tensor, a sequence of positional or a mapping of keyword arguments. Only
            needed where the dim of a rectifier's neurons depends on shapes (after view, flatten,
            transpose).
        ignore: names of rectifiers to leave alone.
        live: also let every forward reduce its counters to the layer's entropy as its last step,
            to be read by :meth:`EntropyTracker.live` at any time. On CUDA a module must then run
            on one stream at a time; counts alone are exact on several.
        fuse_bn: on the CPU, let every ReLU, ReLU6, LeakyReLU and Hardswish that is the only reader
            of a batch norm do the normalisation too, in one pass instead of two.
            Outputs, gradients and running statistics then agree with the untracked model's to
            rounding and no longer bit for bit; counts are those of the values as rounded here.
            ``tracker.fused`` lists the pairs. A value between the two that is needed after all
            (changed control flow) is an error that names them.

    Returns:
        The tracker; as a context manager it ends with :meth:`EntropyTracker.remove`.

    Raises:
        TraceError: the model cannot be traced, or a rectifier cannot be instrumented; named.
        ValueError: there is no rectifier.
    """
    return EntropyTracker(model, example_inputs, tuple(ignore), live, fuse_bn)
