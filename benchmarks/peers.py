"""What people use today, written here to do what the public tools do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune


class SignHook:
    """Forward hook of a rectifier: sums z > 0 per neuron over all batches."""

    def __init__(self, channel_dim: int) -> None:
        self.channel_dim = channel_dim
        self.positive: Tensor | int = 0
        self.positions = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        z = inputs[0].detach()
        self.positive = self.positive + (z > 0).sum(other_dims(z, self.channel_dim))
        self.positions += z.numel() // z.shape[self.channel_dim]


class EntropyHook:
    """What the authors' hooks share: an entropy per batch, averaged over the batches."""

    def __init__(self, channel_dim: int) -> None:
        self.channel_dim = channel_dim
        self.total: Tensor | float = 0.0  # bits per neuron, summed over the batches
        self.batches = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.total = self.total + self.batch_entropy(inputs[0].detach())
        self.batches += 1

    def batch_entropy(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def entropy(self) -> float:
        """Mean over batches and neurons, in bits."""
        return float(torch.as_tensor(self.total).mean()) / self.batches


class EGPHook(EntropyHook):
    """Entropy-guided pruning (arXiv 2308.06619): H of the mean of heaviside(z)."""

    def batch_entropy(self, z: Tensor) -> Tensor:
        fired = torch.heaviside(z, torch.zeros((), dtype=z.dtype))
        return two_sided(fired.mean(other_dims(z, self.channel_dim)))


class EasierHook(EntropyHook):
    """EASIER (arXiv 2404.18949): H of the shares of sign(z) = 1 and sign(z) = -1."""

    def batch_entropy(self, z: Tensor) -> Tensor:
        sign, dims = torch.sign(z), other_dims(z, self.channel_dim)
        shares = [(sign == side).to(z.dtype).mean(dims) for side in (1, -1)]
        return sum((surprise(share) for share in shares), torch.zeros(()))


def other_dims(z: Tensor, channel_dim: int) -> list[int]:
    return [dim for dim in range(z.dim()) if dim != channel_dim % z.dim()]


def surprise(p: Tensor) -> Tensor:
    """-p log2 p, 0 at 0."""
    return -torch.xlogy(p, p) / torch.log(torch.tensor(2.0))


def two_sided(p: Tensor) -> Tensor:
    return surprise(p) + surprise(1 - p)


def hook_rectifiers(
    model: nn.Module, hook: type[SignHook | EntropyHook], channel_dims: dict[str, int]
) -> dict[str, Any]:
    """Give the rectifiers of these names a hook each; returns the hooks."""
    hooks = {name: hook(dim) for name, dim in channel_dims.items()}
    for name, counting in hooks.items():
        model.get_submodule(name).register_forward_hook(counting)
    return hooks


def compiled_relu_and_sum(channel_dim: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """relu and (z > 0).sum, fused by torch.compile for the shapes that come."""

    def relu_and_sum(z: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(z), (z > 0).sum(other_dims(z, channel_dim))

    # The number of threads is compiled in: forget what was compiled for another.
    torch.compiler.reset()
    return torch.compile(relu_and_sum, fullgraph=True, dynamic=False)


def step_and_multiply(
    optimizer: torch.optim.Optimizer, masks: Sequence[Tensor]
) -> Callable[[], None]:
    """A torch step, then every weight times its mask."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        for parameter, mask in zip(parameters, masks, strict=True):
            parameter.mul_(mask)

    return step


class Reparametrised:
    """torch.nn.utils.prune: ``weight = weight_orig * mask``, rebuilt by a hook in every forward."""

    def __init__(self, weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        self.modules = []
        for weight, mask in zip(weights, masks, strict=True):
            module = nn.Module()
            module.register_parameter("weight", nn.Parameter(weight.detach().clone()))
            prune.custom_from_mask(module, "weight", mask)
            self.modules.append(module)

    @property
    def parameters(self) -> list[Tensor]:
        return [module.weight_orig for module in self.modules]

    @property
    def weights(self) -> list[Tensor]:
        return [module.weight for module in self.modules]

    def step(self, optimizer: torch.optim.Optimizer, grads: Sequence[Tensor]) -> Callable[[], None]:
        """What pruning adds to a training step: gradients through the product, the new product."""

        def step() -> None:
            optimizer.zero_grad()
            for module, grad in zip(self.modules, grads, strict=True):
                module.weight.backward(grad)
            optimizer.step()
            for module in self.modules:
                for hook in module._forward_pre_hooks.values():
                    hook(module, ())

        return step


def magnitudes(weights: Sequence[Tensor]) -> Tensor:
    """|w| of all tensors, concatenated: what kthvalue, topk and sort need."""
    return torch.cat([weight.detach().abs().flatten() for weight in weights])
