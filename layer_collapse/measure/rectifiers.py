"""The seven rectifiers: how each is recognised in a model and what the native op needs to know.

A new rectifier is one entry in :data:`KINDS`, and what CONTRIBUTING.md names under ``csrc``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


@dataclass(frozen=True)
class Kind:
    """One sort of rectifier.

    ``code`` is the ``Kind`` of ``csrc/core/rectifier.h``; ``rows`` the counters per neuron;
    ``piecewise_linear`` tells whether a neuron whose signs never change is exactly linear.
    """

    name: str
    code: int
    module: type[nn.Module]
    rows: int = 3
    piecewise_linear: bool = True


@dataclass(frozen=True)
class Call:
    """One call of a rectifier: its kind, its input and the arguments that shape it."""

    kind: Kind
    x: Tensor
    slope: float = 0.0
    weight: Tensor | None = None
    inplace: bool = False


RELU = Kind("relu", 0, nn.ReLU)
RELU6 = Kind("relu6", 1, nn.ReLU6, rows=4)
LEAKY_RELU = Kind("leaky_relu", 2, nn.LeakyReLU)
PRELU = Kind("prelu", 3, nn.PReLU)
GELU = Kind("gelu", 4, nn.GELU, piecewise_linear=False)
GELU_TANH = Kind("gelu_tanh", 5, nn.GELU, piecewise_linear=False)
SILU = Kind("silu", 6, nn.SiLU, piecewise_linear=False)
HARDSWISH = Kind("hardswish", 7, nn.Hardswish, rows=4)

KINDS: Mapping[str, Kind] = {
    kind.name: kind for kind in (RELU, RELU6, LEAKY_RELU, PRELU, GELU, GELU_TANH, SILU, HARDSWISH)
}


def gelu_kind(approximate: str) -> Kind:
    """The GELU that ``approximate`` ("none" or "tanh") names."""
    return GELU_TANH if approximate == "tanh" else GELU


def _simple(kind: Kind, inplace: bool = False) -> Callable[..., Call]:
    def parse(x: Tensor, inplace: bool = inplace) -> Call:
        return Call(kind, x, inplace=inplace)

    return parse


def _leaky(inplace: bool = False) -> Callable[..., Call]:
    def parse(x: Tensor, negative_slope: float = 0.01, inplace: bool = inplace) -> Call:
        return Call(LEAKY_RELU, x, slope=negative_slope, inplace=inplace)

    return parse


def _prelu(x: Tensor, weight: Tensor) -> Call:
    return Call(PRELU, x, weight=weight)


def _gelu(x: Tensor, *, approximate: str = "none") -> Call:
    return Call(gelu_kind(approximate), x)


#: Every function that is a rectifier, with a parser that turns its arguments into a :class:`Call`.
FUNCTIONS: Mapping[Any, Callable[..., Call]] = {
    F.relu: _simple(RELU),
    F.relu_: _simple(RELU, inplace=True),
    torch.relu: _simple(RELU),
    torch.relu_: _simple(RELU, inplace=True),
    Tensor.relu: _simple(RELU),
    Tensor.relu_: _simple(RELU, inplace=True),
    F.relu6: _simple(RELU6),
    F.leaky_relu: _leaky(),
    F.leaky_relu_: _leaky(inplace=True),
    F.prelu: _prelu,
    torch.prelu: _prelu,
    Tensor.prelu: _prelu,
    F.gelu: _gelu,
    F.silu: _simple(SILU),
    F.hardswish: _simple(HARDSWISH),
}
#: The same by the name that torch.fx gives to a method call.
METHODS: Mapping[str, Any] = {
    "relu": Tensor.relu,
    "relu_": Tensor.relu_,
    "prelu": Tensor.prelu,
}
#: Modules that rectify inside a fused kernel, where nothing can be counted.
_OPAQUE = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def parse_function(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """The :class:`Call` that ``function(*args, **kwargs)`` makes, or None for another function."""
    if function not in FUNCTIONS:
        return None
    renamed = {"x" if name in ("input", "self") else name: value for name, value in kwargs.items()}
    return FUNCTIONS[function](*args, **renamed)


def rectifier_function(node: fx.Node) -> Any | None:
    """The function that a functional rectifier node calls, or None for any other node."""
    if node.op == "call_function" and node.target in FUNCTIONS:
        return node.target
    if node.op == "call_method" and node.target in METHODS:
        return METHODS[str(node.target)]
    return None


def module_kind(module: nn.Module) -> Kind | None:
    """The kind of a rectifier module, or None.

    Only torch's own classes count: a subclass may do anything in its forward, so it is looked into.
    """
    if type(module) is nn.GELU:
        return gelu_kind(module.approximate)
    for kind in KINDS.values():
        if type(module) is kind.module:
            return kind
    return None


def module_call(module: nn.Module, kind: Kind, x: Tensor) -> Call:
    """The :class:`Call` that ``module(x)`` makes."""
    return Call(
        kind,
        x,
        slope=float(getattr(module, "negative_slope", 0.0)),
        weight=module.weight if isinstance(module, nn.PReLU) else None,
        inplace=bool(getattr(module, "inplace", False)),
    )


def hides_rectifier(module: nn.Module) -> str | None:
    """Why a torch module holds a rectifier that cannot be seen from outside, or None."""
    if isinstance(module, _OPAQUE):
        return "computes its activation inside a fused kernel in evaluation mode"
    if isinstance(module, nn.RNN | nn.RNNCell) and module.nonlinearity == "relu":
        return "computes its ReLU inside the recurrent kernel"
    return None
