"""What ``make gpu-report`` measures: our ops and their peers, on any device and in any size.

Every case first compares what its contenders compute; a difference stops the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from layer_collapse.measure.rectifiers import KINDS, Call
from layer_collapse.ops.magnitude import magnitude_shares
from layer_collapse.ops.masked_step import apply_masks_, masked_adamw_, masked_sgd_
from layer_collapse.ops.rectify import counts_of, new_ledger, rectify

RELU = KINDS["relu"]
PRUNED = (0.0, 0.9, 0.99)
OURS = "layer_collapse"


@dataclass(frozen=True)
class Sizes:
    """planes: [N, C, H, W]; tokens: [N, T, C]; weights: of a step, a multiple of 32; selection
    from `tensors` of `each` weights."""

    planes: tuple[int, ...] = (128, 256, 28, 28)
    tokens: tuple[int, ...] = (128, 197, 3072)
    weights: int = 1 << 25
    tensors: int = 8
    each: int = 1 << 22


@dataclass(frozen=True)
class Contender:
    """moves: bytes that this way of doing it must read and write at least."""

    moves: int
    call: Callable[[], object]


@dataclass(frozen=True)
class Case:
    name: str
    contenders: dict[str, Contender]


def agree(case: str, ours: Tensor, theirs: Tensor, tolerance: float = 0.0) -> None:
    """Stops unless a peer computed the same; tolerance is relative to the largest value."""
    difference = (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0
    largest = theirs.double().abs().max().item() if ours.numel() else 0.0
    if ours.shape != theirs.shape or not difference <= tolerance * largest:
        raise RuntimeError(
            f"{case}: ours must equal the peer's within {tolerance:g} of its largest value "
            f"({largest:g}), got a difference of {difference:g}; nothing was measured"
        )


def _count(x: Tensor, counts: Tensor, dims: list[int]) -> None:
    counts += torch.stack([(x > 0).sum(dims), (x < 0).sum(dims), x.isnan().sum(dims)])


def _counted_relu(x: Tensor, counts: Tensor, dims: list[int]) -> Tensor:
    _count(x, counts, dims)
    return torch.relu(x)


def rectifiers(
    device: str, sizes: Sizes, compiled: Callable[[Callable], Callable]
) -> Iterator[Case]:
    """Fused ReLU and sign counts against relu alone, compiled and hooked counting."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape, channel_dim in ((sizes.planes, 1), (sizes.tokens, 2)):
            name = f"relu + counts, {list(shape)}, {str(dtype)[6:]}"
            x = torch.randn(shape, device=device).to(dtype)
            dims = [d for d in range(x.dim()) if d != channel_dim]
            ledger = new_ledger(RELU, shape[channel_dim], device)
            counts = torch.zeros(3, shape[channel_dim], dtype=torch.int64, device=device)
            agree(name, rectify(Call(RELU, x), ledger, channel_dim), _counted_relu(x, counts, dims))
            agree(f"{name}, counts", counts_of(ledger, RELU), counts)
            hooked = nn.ReLU()
            hooked.register_forward_hook(
                lambda module, given, y, c=counts, d=dims: _count(given[0], c, d)
            )
            once = 2 * x.numel() * x.itemsize
            yield Case(
                name,
                {
                    OURS: Contender(once, partial(rectify, Call(RELU, x), ledger, channel_dim)),
                    "torch.relu (no counts)": Contender(once, partial(torch.relu, x)),
                    "torch.compile": Contender(
                        once, partial(compiled(_counted_relu), x, counts, dims)
                    ),
                    "forward hook": Contender(once, partial(hooked, x)),
                },
            )


def _mask(count: int, pruned: float, device: str) -> Tensor:
    """A mask of which `pruned` of the words are empty and the others full."""
    alive = torch.rand(count // 32) >= pruned
    return torch.where(alive, -1, 0).to(torch.int32).to(device)


def steps(device: str, sizes: Sizes) -> Iterator[Case]:
    """Masked optimiser steps against torch's fused ones, which move every weight."""
    count = sizes.weights
    for pruned in PRUNED:
        mask = _mask(count, pruned, device)
        alive = 32 * int((mask != 0).sum())
        for label, accesses in (("SGD with momentum", 5), ("AdamW", 7)):
            name = f"{label}, {count} weights, {pruned:.0%} pruned"
            weight = torch.randn(count, device=device)
            grad = torch.randn_like(weight)
            apply_masks_([weight, grad], [mask, mask])  # pruned weights then stay zero for both
            own, state = weight.clone(), [torch.zeros_like(weight) for _ in range(2)]
            weight.requires_grad_().grad = grad
            if label == "AdamW":
                peer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
                step = torch.zeros((), device=device)

                def ours(own=own, grad=grad, state=state, mask=mask, step=step) -> None:
                    step.add_(1)
                    masked_adamw_([own], [grad], state[:1], state[1:], [], [mask], [step], lr=1e-3)
            else:
                peer = torch.optim.SGD([weight], lr=1e-3, momentum=0.9, fused=True)
                ours = partial(masked_sgd_, [own], [grad], state[:1], [mask], lr=1e-3, momentum=0.9)
            for _ in range(2):
                ours()
                peer.step()
            agree(name, own, weight.detach(), 1e-6)
            yield Case(
                name,
                {
                    OURS: Contender(alive * 4 * accesses + count // 8, ours),
                    "torch fused": Contender(count * 4 * accesses, peer.step),
                },
            )


def selection(device: str, sizes: Sizes) -> Iterator[Case]:
    """The weights that global magnitude pruning takes from each tensor."""
    weights = [torch.randn(sizes.each, device=device) for _ in range(sizes.tensors)]
    none = [torch.empty(0, dtype=torch.int32, device=device) for _ in weights]
    total = sizes.tensors * sizes.each
    k = total // 10
    owners = torch.arange(sizes.tensors, device=device).repeat_interleave(sizes.each)

    def topk() -> Tensor:
        magnitudes = torch.cat([w.abs() for w in weights])
        taken = torch.topk(magnitudes, k, largest=False).indices
        return torch.bincount(owners[taken], minlength=sizes.tensors)

    name = f"the {k} smallest of {sizes.tensors} x {sizes.each} weights"
    agree(name, magnitude_shares(weights, none, k), topk())
    moves = 4 * total * 4  # three histograms and a count, each a pass
    yield Case(
        name,
        {
            OURS: Contender(moves, partial(magnitude_shares, weights, none, k)),
            "torch.topk": Contender(total * 4, topk),
        },
    )


def cases(
    device: str,
    sizes: Sizes | None = None,
    compiled: Callable[[Callable], Callable] = torch.compile,
) -> Iterator[Case]:
    """All of them, one after another: what a case holds on the device goes with it."""
    sizes = sizes or Sizes()
    yield from rectifiers(device, sizes, compiled)
    yield from steps(device, sizes)
    yield from selection(device, sizes)
