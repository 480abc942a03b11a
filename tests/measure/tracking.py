"""Small models to track, and what counting them must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from torch import Tensor, nn

from layer_collapse import models
from layer_collapse.measure.rectifiers import Call, Kind
from layer_collapse.measure.tracker import EntropyTracker, track
from layer_collapse.ops.rectify import new_ledger, rectify_reference

Forward = Callable[..., Tensor]


class Layers(nn.Module):
    """Layers to combine in a forward: 4 -> 6 features, 6 -> 6."""

    def __init__(self, forward: Forward, act: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.act = act if act is not None else nn.ReLU()
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def module(kind: Kind, inplace: bool = False) -> nn.Module:
    """The module of a kind, with arguments that are not the defaults."""
    arguments: dict[str, Any] = {"inplace": True} if inplace else {}
    if kind.name == "leaky_relu":
        arguments["negative_slope"] = 0.3
    if kind.name == "gelu_tanh":
        arguments["approximate"] = "tanh"
    if kind.name == "prelu":
        arguments = {"num_parameters": 6, "init": 0.1}
    return kind.module(**arguments)


def reference_counts(kind: Kind, x: Tensor, dim: int, valid: Tensor | None = None) -> Tensor:
    """The ledger that seeing x once gives."""
    ledger = new_ledger(kind, x.shape[dim])
    weight = torch.ones(1, dtype=x.dtype) if kind.name == "prelu" else None
    rectify_reference(Call(kind, x.clone(), weight=weight), ledger, dim, valid)
    return ledger


def train_step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input and of every parameter."""
    x = x.clone().requires_grad_(x.is_floating_point())
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), *(g.clone() for g in grads), *([x.grad] if x.grad is not None else [])]


def assert_same_step(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


def tracked_mlp(**options: Any) -> tuple[nn.Module, EntropyTracker]:
    model = models.build(options.pop("name", "mlp"), (1, 4, 4), 3, **options)
    return model, track(model)


FUNCTIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "F.relu": ("relu", lambda x: F.relu(x)),
    "F.relu in place": ("relu", lambda x: F.relu(x, inplace=True)),
    "F.relu in place, positional": ("relu", lambda x: F.relu(x, True)),
    "F.relu_": ("relu", lambda x: F.relu_(x)),
    "F.relu by keyword": ("relu", lambda x: F.relu(input=x)),
    "torch.relu": ("relu", lambda x: torch.relu(x)),
    "torch.relu_": ("relu", lambda x: torch.relu_(x)),
    "x.relu()": ("relu", lambda x: x.relu()),
    "x.relu_()": ("relu", lambda x: x.relu_()),
    "F.relu6": ("relu6", lambda x: F.relu6(x)),
    "F.relu6 in place": ("relu6", lambda x: F.relu6(x, inplace=True)),
    "F.leaky_relu": ("leaky_relu", lambda x: F.leaky_relu(x)),
    "F.leaky_relu, slope": ("leaky_relu", lambda x: F.leaky_relu(x, 0.3)),
    "F.leaky_relu in place": ("leaky_relu", lambda x: F.leaky_relu(x, 0.3, True)),
    "F.leaky_relu_": ("leaky_relu", lambda x: F.leaky_relu_(x, negative_slope=0.3)),
    "F.prelu": ("prelu", lambda x: F.prelu(x, torch.tensor([0.3]))),
    "torch.prelu": ("prelu", lambda x: torch.prelu(x, weight=torch.linspace(-1, 1, 6))),
    "x.prelu()": ("prelu", lambda x: x.prelu(torch.tensor([0.3]))),
    "F.gelu": ("gelu", lambda x: F.gelu(x)),
    "F.gelu tanh": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "F.silu": ("silu", lambda x: F.silu(x)),
    "F.silu in place": ("silu", lambda x: F.silu(x, inplace=True)),
    "F.hardswish": ("hardswish", lambda x: F.hardswish(x)),
    "F.hardswish in place": ("hardswish", lambda x: F.hardswish(x, True)),
}


def snapshot(model: nn.Module) -> list[tuple[Any, ...]]:
    """What of every module may not change: class and every attribute, hooks included."""
    return [
        (
            name,
            type(m),
            {k: dict(v) if isinstance(v, dict) else v for k, v in m.__dict__.items()},
        )
        for name, m in model.named_modules()
    ]


class Masked(Layers):
    def __init__(self) -> None:
        super().__init__(lambda m, x: x)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.act(self.first(x))
        return F.relu(self.act(self.second(hidden)))
