"""Fused batch norms: the untracked model to rounding, the same counts, and no silent mistakes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from layer_collapse.graph import trace
from layer_collapse.measure.fusing import PAIR
from layer_collapse.measure.taps import TAP
from layer_collapse.measure.tracker import EntropyTracker, track
from layer_collapse.models.resnet import ResNet
from layer_collapse.ops.rectify import POSITIONS

Forward = Callable[[Any, Tensor], Tensor]


class Layers(nn.Module):
    """Convolutions and batch norms to combine in a forward: 3 -> 8 channels, 8 -> 8."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def block(self: Layers, x: Tensor) -> Tensor:
    """As torchvision's: one in-place ReLU for both, the second after the sum."""
    out = self.relu(self.bn1(self.conv1(x)))
    skip = out
    out = self.bn2(self.conv2(out))
    out += skip
    return self.relu(out)


def image(batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 6, 6, dtype=dtype)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().square().mean().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-8) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_state(model: nn.Module, plain: nn.Module) -> None:
    assert model.state_dict().keys() == plain.state_dict().keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-8, atol=1e-8)


def sequential(norm: nn.Module, act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, act).double()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm2d(8),
    "cumulative": lambda: nn.BatchNorm2d(8, momentum=None),
    "without statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "without affine": lambda: nn.BatchNorm2d(8, affine=False),
    "without bias": lambda: nn.BatchNorm2d(8, bias=False),
    "frozen": lambda: nn.BatchNorm2d(8).requires_grad_(False),
    "statistics taken away": lambda: _without_buffers(nn.BatchNorm2d(8)),
}
ACTS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "Hardswish": nn.Hardswish,
}


def _without_buffers(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.running_mean = norm.running_var = None
    return norm


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("act", ACTS)
def test_every_kind_of_pair(norm: str, act: str, training: bool) -> None:
    model = sequential(NORMS[norm](), ACTS[act]()).train(training)
    plain, dropin = copy.deepcopy(model), copy.deepcopy(model)
    tracker, counted = track(model, fuse_bn=True), track(dropin)
    assert tracker.fused == {"2": "1"}
    assert counted.fused == {}
    for seed in range(3):
        torch.manual_seed(seed)
        x = image(dtype=torch.float64)
        assert_close(step(model, x), step(plain, x))
        step(dropin, x)
        with torch.no_grad():
            assert_close([model(x)], [plain(x)])
            dropin(x)
        assert_same_state(model, plain)
    assert torch.equal(tracker.state_dict()["2"], counted.state_dict()["2"])


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(5), (6, 5)),
        (nn.BatchNorm1d(5), (6, 5, 7)),
        (nn.BatchNorm2d(5), (6, 5, 3, 2)),
        (nn.BatchNorm3d(5), (2, 5, 3, 2, 4)),
    ],
    ids=["1d", "1d of sequences", "2d", "3d"],
)
def test_dimensions(norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(norm, nn.ReLU()).double()
    plain = copy.deepcopy(model)
    tracker = track(model, torch.randn(shape, dtype=torch.float64), fuse_bn=True)
    assert tracker.fused
    x = torch.randn(shape, dtype=torch.float64)
    assert_close(step(model, x), step(plain, x))
    assert_same_state(model, plain)
    assert tracker.state_dict()["1"][POSITIONS] == x.numel() // 5


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": lambda z: F.relu(z),
    "F.relu in place": lambda z: F.relu(z, inplace=True),
    "torch.relu": lambda z: torch.relu(z),
    "x.relu()": lambda z: z.relu(),
    "x.relu_()": lambda z: z.relu_(),
    "F.relu6": lambda z: F.relu6(z),
    "F.leaky_relu": lambda z: F.leaky_relu(z, 0.3),
    "F.hardswish": lambda z: F.hardswish(z),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    function = FUNCTIONS[name]
    model = Layers(lambda self, x: function(self.bn1(self.conv1(x)))).double()
    plain = copy.deepcopy(model)
    tracker = track(model, fuse_bn=True)
    assert list(tracker.fused.values()) == ["bn1"]
    x = image(dtype=torch.float64)
    assert_close(step(model, x), step(plain, x))
    assert_same_state(model, plain)


def test_a_residual_block_fuses_what_it_can() -> None:
    model = Layers(block).double()
    plain, dropin = copy.deepcopy(model), copy.deepcopy(model)
    tracker, counted = track(model, fuse_bn=True), track(dropin)
    assert tracker.fused == {"relu": "bn1"}  # the second ReLU sees the sum
    for _ in range(3):
        x = image(dtype=torch.float64)
        assert_close(step(model, x), step(plain, x))
        step(dropin, x)
    assert_same_state(model, plain)
    for name, ledger in counted.state_dict().items():
        assert torch.equal(tracker.state_dict()[name], ledger)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_training_a_resnet(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = ResNet((3, 8, 8), 5, widths=(8, 16), blocks=1).double().to(memory_format=layout)
    plain, dropin = copy.deepcopy(model), copy.deepcopy(model)
    tracker, counted = track(model, fuse_bn=True), track(dropin)
    assert len(tracker.fused) == 3
    for each in (model, plain, dropin):
        optimizer = torch.optim.SGD(each.parameters(), 0.01, momentum=0.9)
        torch.manual_seed(1)
        for _ in range(5):
            x = torch.randn(8, 3, 8, 8, dtype=torch.float64).to(memory_format=layout)
            optimizer.zero_grad()
            F.cross_entropy(each(x), torch.arange(8) % 5).backward()
            optimizer.step()
    assert_same_state(model, plain)
    for name, ledger in counted.state_dict().items():
        assert torch.equal(tracker.state_dict()[name], ledger)
    with torch.no_grad():
        x = torch.randn(8, 3, 8, 8, dtype=torch.float64)
        assert_close([model.eval()(x)], [plain.eval()(x)])


def test_live_entropies_follow() -> None:
    model = sequential(nn.BatchNorm2d(8), nn.ReLU())
    tracker = track(model, fuse_bn=True, live=True)
    model(image(dtype=torch.float64))
    (row,) = tracker.entropy()
    assert tracker.live()["2"].entropy == pytest.approx(row.entropy, abs=1e-12)
    assert tracker.live()["2"].mixed == 8


def test_autocast() -> None:
    model = sequential(nn.BatchNorm2d(8), nn.ReLU()).float()
    plain = copy.deepcopy(model)
    tracker = track(model, fuse_bn=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = image()
        got, expected = step(model, x), step(plain, x)
    assert got[0].dtype == expected[0].dtype == torch.bfloat16
    assert_close(got, expected, 2e-2)
    assert tracker.state_dict()["2"][POSITIONS] == 4 * 36


def test_halves_throughout() -> None:
    model = sequential(nn.BatchNorm2d(8), nn.ReLU()).bfloat16()
    plain = copy.deepcopy(model)
    track(model, fuse_bn=True)
    x = image(dtype=torch.bfloat16)
    assert_close(step(model, x), step(plain, x), 3e-2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_once_and_updates_as_torch_does(use_reentrant: bool) -> None:
    def forward(self: Layers, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return self.conv2(self.relu(self.bn1(self.conv1(x)))).exp()

        y: Tensor = checkpoint(inner, x, use_reentrant=use_reentrant)
        return self.relu(self.bn2(y))

    model = Layers(block).double()
    plain = copy.deepcopy(model)
    tracker = track(model, fuse_bn=True)
    tracker.remove()
    # fx does not trace checkpoint: it is put in after tracking a model of the same calls
    straight: Forward = lambda self, x: self.relu(  # noqa: E731
        self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))).exp())
    )
    model.body = straight
    tracker = track(model, fuse_bn=True)
    assert tracker.fused == {"relu": "bn1", "relu#2": "bn2"}
    model.body = plain.body = forward
    for _ in range(2):
        x = image(dtype=torch.float64)
        assert_close(step(model, x), step(plain, x))
    assert_same_state(model, plain)
    assert plain.bn1.num_batches_tracked == 4
    for ledger in tracker.state_dict().values():
        assert ledger[POSITIONS] == 2 * 4 * 36


def test_a_checkpoint_that_ends_between_the_two_is_an_error() -> None:
    model = Layers(lambda self, x: self.relu(self.bn1(self.conv1(x))))
    track(model, fuse_bn=True)
    model.body = lambda self, x: self.relu(
        checkpoint(lambda v: self.bn1(self.conv1(v)), x, use_reentrant=True)
    )
    with pytest.raises(RuntimeError, match="'bn1' is fused with rectifier 'relu'"):
        model(image().requires_grad_())


def test_double_backward() -> None:
    model = sequential(nn.BatchNorm2d(8), nn.ReLU())
    plain = copy.deepcopy(model)
    track(model, fuse_bn=True)
    x = image(2, dtype=torch.float64)
    results = []
    for each in (model, plain):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(each(leaf).square().sum(), leaf, create_graph=True)
        grad.square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in each.parameters())])
    assert_close(results[0], results[1])


def test_forward_mode_takes_the_ordinary_way() -> None:
    model = sequential(nn.BatchNorm2d(8), nn.ReLU())
    plain = copy.deepcopy(model)
    tracker = track(model, fuse_bn=True)
    x, tangent = image(dtype=torch.float64), image(dtype=torch.float64)
    tangents = []
    for each in (model, plain):
        with forward_ad.dual_level():
            y = each(forward_ad.make_dual(x, tangent))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert_close([tangents[0]], [tangents[1]])
    assert tracker.state_dict()["2"][POSITIONS] == 4 * 36


def test_compiled_models_leave_fusing_to_the_compiler() -> None:
    torch._dynamo.reset()
    model = Layers(block).double()
    plain = copy.deepcopy(model)
    tracker = track(model, fuse_bn=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = image(dtype=torch.float64)
    assert_close(step(compiled, x), step(plain, x))
    assert_same_state(model, plain)
    assert all(ledger[POSITIONS] == 4 * 36 for ledger in tracker.state_dict().values())
    assert_close(step(model, x), step(plain, x))  # and eager again
    torch._dynamo.reset()


def test_a_copy_runs_and_counts_apart() -> None:
    model = Layers(block)
    tracker = track(model, fuse_bn=True)
    twin = copy.deepcopy(model)
    x = image()
    assert_close(step(twin, x), step(model, x))
    twin(x)
    assert tracker.state_dict()["relu"][POSITIONS] == 4 * 36
    copied = getattr(twin.bn1, PAIR).counter
    assert copied is getattr(twin.relu, TAP).counters[0]
    assert copied.ledger[POSITIONS] == 2 * 4 * 36


def test_remove_gives_the_model_back() -> None:
    model = Layers(block)
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    with track(model, fuse_bn=True):
        model(image())
        assert type(model.bn1) is not nn.BatchNorm2d
        assert isinstance(model.bn1, nn.BatchNorm2d)
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == before


def test_a_mask_takes_the_ordinary_way() -> None:
    model = sequential(nn.BatchNorm2d(8), nn.ReLU())
    tracker = track(model, fuse_bn=True)
    with tracker.valid(torch.tensor([True, False, True, False])):
        model(image(dtype=torch.float64))
    assert tracker.state_dict()["2"][POSITIONS] == 2 * 36


def test_one_value_per_channel_is_torchs_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    track(model, fuse_bn=True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, 3))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        model[1](torch.randn(2, 4, 3, 3))
    model.eval()
    assert model(torch.randn(1, 3)).shape == (1, 4)
    assert model(torch.randn(0, 3)).shape == (0, 4)


# ---- what is not fused


def _two_readers(self: Layers, x: Tensor) -> Tensor:
    z = self.bn1(self.conv1(x))
    return F.relu(z) + z


def _result_ignored(self: Layers, x: Tensor) -> Tensor:
    z = self.bn1(self.conv1(x))
    self.relu(z)
    return self.conv2(z)


def _called_twice(self: Layers, x: Tensor) -> Tensor:
    return F.relu(self.bn1(F.relu(self.bn1(self.conv1(x)))))


def _smooth(self: Layers, x: Tensor) -> Tensor:
    return F.gelu(self.bn1(self.conv1(x)))


def _something_between(self: Layers, x: Tensor) -> Tensor:
    return F.relu(self.bn1(self.conv1(x)) + 1)


def _flattened(self: Layers, x: Tensor) -> Tensor:
    return F.relu(self.bn1(self.conv1(x)).flatten(1))


@pytest.mark.parametrize(
    "body",
    [_two_readers, _result_ignored, _called_twice, _smooth, _something_between, _flattened],
    ids=lambda f: f.__name__,
)
def test_what_is_not_a_pair_is_left_alone(body: Forward) -> None:
    model = Layers(body)
    plain = copy.deepcopy(model)
    tracker = track(model, image(), fuse_bn=True)
    assert tracker.fused == {}
    x = image()
    for a, b in zip(step(model, x), step(plain, x), strict=True):
        assert torch.equal(a, b)


def test_other_norms_and_other_owners_are_left_alone() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert track(nn.Sequential(inner, nn.ReLU()), fuse_bn=True).fused == {}
    synced = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8), nn.ReLU())
    assert track(synced, fuse_bn=True).fused == {}

    scaled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    nn.utils.parametrize.register_parametrization(scaled[1], "weight", nn.Identity())
    assert track(scaled, fuse_bn=True).fused == {}


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_what_they_always_saw(index: int, when: str) -> None:
    model = sequential(nn.BatchNorm2d(8), nn.ReLU())
    plain = copy.deepcopy(model)
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.extend([args[0].detach().clone(), output.detach().clone()])

    if when == "before":
        model[index].register_forward_hook(watch)
    tracker = track(model, fuse_bn=True)
    assert bool(tracker.fused) == (when == "after")
    if when == "after":
        model[index].register_forward_hook(watch)
    plain[index].register_forward_hook(watch)
    x = image(dtype=torch.float64)
    assert_close(step(model, x), step(plain, x))
    assert_close(seen[:2], seen[2:])


def test_full_backward_hooks_take_the_ordinary_way() -> None:
    model = sequential(nn.BatchNorm2d(8), nn.ReLU())
    plain = copy.deepcopy(model)
    track(model, fuse_bn=True)
    model[2].register_full_backward_hook(lambda *_: None)
    x = image(dtype=torch.float64)
    assert_close(step(model, x), step(plain, x))


# ---- control flow that changes


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda self, x: self.bn1(self.conv1(x)) + 1, "'bn1' is fused .* but 'add' reads"),
        (lambda self, x: torch.cat([self.bn1(self.conv1(x))]), "but 'cat' reads"),
        (lambda self, x: self.conv2(self.bn1(self.conv1(x))), "but 'conv2d' reads"),
        (
            lambda self, x: self.relu(self.conv1(x)) + self.relu(self.bn1(self.conv1(x))),
            "'bn1' is fused with rectifier 'relu', but its result reached 'relu#2'",
        ),
        (lambda self, x: F.relu6(self.bn1(self.conv1(x))), "'bn1' is fused"),
    ],
    ids=["other operation", "list", "layer", "other call", "other rectifier"],
)
def test_a_value_that_is_needed_after_all_is_an_error(body: Forward, message: str) -> None:
    def traced(self: Layers, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))

    model = Layers(traced)
    tracker = track(model, fuse_bn=True)
    assert len(tracker.fused) == 2
    model.body = body
    with pytest.raises(RuntimeError, match=message):
        model(image())
    model.body = traced
    plain = copy.deepcopy(model)
    tracker.remove()
    assert torch.isfinite(plain(image())).all()  # the error leaves nothing behind


def test_shapes_may_be_asked_for_in_between() -> None:
    model = Layers(lambda self, x: self.relu(self.bn1(self.conv1(x))))
    track(model, fuse_bn=True)

    def asks(self: Layers, x: Tensor) -> Tensor:
        z = self.bn1(self.conv1(x))
        assert z.shape == (4, 8, 6, 6)
        assert z.size(1) == 8
        assert (z.dim(), z.ndim, len(z), z.dtype) == (4, 4, 4, torch.float32)
        return self.relu(z)

    model.body = asks
    assert model(image()).min() == 0


def test_the_trace_marks_ignored_results() -> None:
    graph = trace(Layers(_result_ignored))
    marked = [n.name for n in graph.graph.nodes if n.meta.get("result_ignored")]
    assert marked == ["relu"]


def test_a_failed_start_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers(block)
    before = {name: type(m) for name, m in model.named_modules()}
    monkeypatch.setattr(EntropyTracker, "resume", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        track(model, fuse_bn=True)
    assert {name: type(m) for name, m in model.named_modules()} == before
