"""A batch norm and a rectifier in one op: torch's values to rounding, exact counts, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layer_collapse.measure.rectifiers import KINDS, Call, Kind
from layer_collapse.ops.batch_norm import (
    FUSED_KINDS,
    Norm,
    bn_rectify,
    bn_rectify_backward_reference,
    bn_rectify_reference,
)
from layer_collapse.ops.entropy import live_entropy
from layer_collapse.ops.rectify import COUNT, FLAGS, LIVE, POSITIONS, counts_of, new_ledger

KIND_LIST = [KINDS[name] for name in FUSED_KINDS]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SLOPE = 0.1
#: Around every size at which the loops change: vectors, blocks of rows, groups, slices, planes.
SHAPES = [
    (2, 1),
    (33, 19),
    (600, 70),
    (2, 5, 1),
    (4, 3, 130),
    (9, 33, 16),
    (3, 40, 65),
    (8, 5, 7, 7),
    (16, 64, 8, 8),
    (1, 3, 33, 31),
    (2, 9, 1, 1),
    (2, 3, 2, 3, 4),
]
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channels_last" and x.dim() in (4, 5):
        form = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        return x.contiguous(memory_format=form)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def sample(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + mean).to(dtype)


def norm_of(channels: int, dtype: torch.dtype, training: bool, seed: int = 1) -> Norm:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def numbers(low: float) -> Tensor:
        return (torch.rand(channels, generator=generator, dtype=torch.float64) + low).to(wide)

    return Norm(numbers(-0.5), numbers(0.5), numbers(0.5), numbers(-0.5), training, 0.1, 1e-5)


def clone(norm: Norm, dtype: torch.dtype | None = None) -> Norm:
    return Norm(*(v.clone().to(dtype or v.dtype) if isinstance(v, Tensor) else v for v in norm))


def run(
    op: Any, kind: Kind, x: Tensor, norm: Norm, grad: Tensor | None = None
) -> dict[str, Tensor]:
    """All that one call gives, and with grad the gradients."""
    ledger, call = new_ledger(kind, x.shape[1]), Call(kind, x, slope=SLOPE)
    if grad is None:
        return {"y": op(call, norm, ledger), "ledger": ledger, **_running(norm)}
    leaves = [t.detach().requires_grad_() for t in (x, norm.weight, norm.bias) if t is not None]
    weights = leaves[1:] if norm.weight is not None else [None, None]
    norm = norm._replace(weight=weights[0], bias=weights[1])
    y = op(Call(kind, leaves[0], slope=SLOPE), norm, ledger)
    grads = torch.autograd.grad(y, leaves, grad)
    named = dict(zip(("dx", "dweight", "dbias"), grads, strict=False))
    return {"y": y.detach(), "ledger": ledger, **_running(norm), **named}


def _running(norm: Norm) -> dict[str, Tensor]:
    both = {"running_mean": norm.running_mean, "running_var": norm.running_var}
    return {name: value for name, value in both.items() if value is not None}


def away_from_bends(kind: Kind, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Where rounding cannot decide on which piece of the rectifier z is."""
    bends = {"relu6": (0, 6), "hardswish": (-3, 3)}.get(kind.name, (0,))
    margin = 64 * torch.finfo(dtype).eps
    away = torch.ones_like(z, dtype=torch.bool)
    for bend in bends:
        away &= (z - bend).abs() > margin * (1 + abs(bend))
    return away


def worst(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KIND_LIST, ids=lambda k: k.name)
def test_errors_are_at_most_twice_those_of_eager_code(
    kind: Kind, dtype: torch.dtype, layout: str, training: bool
) -> None:
    for shape in SHAPES:
        for mean in (0.0, 30.0):
            x, grad = lay_out(sample(shape, dtype, 0, mean), layout), sample(shape, dtype, 2)
            norm = norm_of(shape[1], dtype, training)
            exact_x = lay_out(x.double(), layout)
            exact_norm = clone(norm, torch.float64)
            before = F.batch_norm(exact_x, *clone(exact_norm)[:2], *exact_norm[2:])
            # the gradient of what lies near a bend is a matter of rounding
            grad = torch.where(away_from_bends(kind, before, dtype), grad, 0)
            exact = run(bn_rectify_reference, kind, exact_x, exact_norm, grad.double())
            ours = run(bn_rectify, kind, x, clone(norm), grad)
            eager = run(bn_rectify_reference, kind, x, clone(norm), grad)
            assert ours["y"].stride() == eager["y"].stride()
            assert set(ours) == set(eager)
            sizes = term_sizes(exact_x, exact_norm, grad)
            for name in set(ours) - {"ledger"}:
                assert ours[name].dtype == eager[name].dtype
                # units of the largest term, where eager code happens to be exact; in double
                # precision it is its own reference
                units = 8 if dtype == torch.float64 else 2
                size = max(sizes.get(name, 0.0), exact[name].abs().max().item())
                limit = 2.01 * worst(eager[name], exact[name])
                # the derivative of Hardswish is taken at z as rounded
                bent = kind.name == "hardswish" and name.startswith("d")
                size *= 1 + sizes["y"] if bent else 1
                limit += units * torch.finfo(dtype if bent else ours[name].dtype).eps * size
                assert worst(ours[name], exact[name]) <= limit, (name, shape, mean)


def term_sizes(x: Tensor, norm: Norm, grad: Tensor) -> dict[str, float]:
    """The largest terms of the sums that results are, which may cancel."""
    assert norm.running_var is not None
    assert norm.weight is not None
    dims = [d for d in range(x.dim()) if d != 1]
    var = x.var(dims, correction=0) if norm.training else norm.running_var
    factor = (norm.weight.abs() * (var + norm.eps).rsqrt()).max().item()
    spread = (x - x.mean(dims, keepdim=True)).abs().max().item() * (var + norm.eps).rsqrt()
    total = grad.double().abs().sum(dims)
    return {
        "y": x.abs().max().item() * factor,
        "running_mean": x.abs().max().item(),
        "dx": grad.abs().max().item() * factor * (1 + spread.max().item() ** 2),
        "dbias": total.max().item(),
        "dweight": (total * spread).max().item(),
    }


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KIND_LIST, ids=lambda k: k.name)
def test_counts_are_those_of_eager_code_away_from_the_bends(
    kind: Kind, dtype: torch.dtype, layout: str, training: bool
) -> None:
    for shape in SHAPES:
        x, norm = lay_out(sample(shape, dtype), layout), norm_of(shape[1], dtype, training)
        z = F.batch_norm(x, *clone(norm)[:2], *norm[2:])
        dims = [d for d in range(x.dim()) if d != 1]
        near = (~away_from_bends(kind, z.double(), dtype)).sum(dims)
        ours = run(bn_rectify, kind, x, clone(norm))["ledger"]
        eager = run(bn_rectify_reference, kind, x, clone(norm))["ledger"]
        assert ours[POSITIONS] == eager[POSITIONS] == x.numel() // x.shape[1]
        assert ((counts_of(ours, kind) - counts_of(eager, kind)).abs() <= near).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KIND_LIST, ids=lambda k: k.name)
def test_counts_and_output_agree_with_each_other(kind: Kind, dtype: torch.dtype) -> None:
    """With z on a grid nothing is near a bend by accident: counts are exact, bends included."""
    values = torch.tensor([-4.0, -3.0, -1.0, -0.0, 0.0, 0.5, 3.0, 6.0, 6.5], dtype=dtype)
    values = torch.cat([values, torch.tensor([float("nan"), float("inf"), -float("inf")])]).to(
        dtype
    )
    for shape in SHAPES:
        picks = torch.randint(len(values), shape, generator=torch.Generator().manual_seed(3))
        for layout in LAYOUTS:
            x = lay_out(values[picks], layout)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            mean, var = (torch.full((shape[1],), v, dtype=wide) for v in (0.0, 1.0))
            norm = Norm(mean, var, None, None, False, 0.1, 0.0)
            ours = run(bn_rectify, kind, x, norm)
            eager = run(bn_rectify_reference, kind, x, norm)
            assert torch.equal(ours["ledger"], eager["ledger"])
            torch.testing.assert_close(ours["y"], eager["y"], equal_nan=True)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KIND_LIST),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    layout=st.sampled_from(LAYOUTS),
    values=st.lists(
        st.floats(width=16, allow_nan=True, allow_infinity=True), min_size=1, max_size=12
    ),
    affine=st.booleans(),
    training=st.booleans(),
)
def test_any_shape_layout_and_values(
    kind: Kind,
    dtype: torch.dtype,
    shape: list[int],
    layout: str,
    values: list[float],
    affine: bool,
    training: bool,
) -> None:
    size = torch.Size(shape).numel()
    if size == shape[1]:
        training = False
    repeated = (values * (size // len(values) + 1))[:size]
    x = lay_out(torch.tensor(repeated, dtype=torch.float64).to(dtype).view(shape), layout)
    norm = norm_of(shape[1], dtype, training)
    if not affine:
        norm = norm._replace(weight=None, bias=None)
    got, expected = clone(norm), clone(norm)
    ours = run(bn_rectify, kind, x, got)
    # one traversal in double precision: torch's own variance overflows where this does not
    exact = run(bn_rectify_reference, kind, x.double(), clone(expected, torch.float64))
    assert ours["ledger"][POSITIONS] == size // shape[1]
    nans = counts_of(exact["ledger"], kind)[2]  # not of y: Hardswish makes them of -inf
    assert torch.equal(counts_of(ours["ledger"], kind)[2], nans)
    assert torch.equal(ours["y"].isnan(), exact["y"].isnan())
    scale = 1 + x.double().abs().nan_to_num(0, 0, 0).max()
    error = (ours["y"].double() - exact["y"]).nan_to_num(0, 0, 0).abs()
    finite = exact["y"].abs() <= torch.finfo(dtype).max / 2
    assert (error[finite] <= 64 * torch.finfo(dtype).eps * scale).all()


def test_a_first_value_far_from_all_others_costs_no_digits() -> None:
    for shape in ((128, 3, 16, 16), (128, 3, 4, 4), (3000, 3)):
        for layout in ("contiguous", "channels_last"):
            x = sample(shape, torch.float32)
            x[0] = 1e4
            x = lay_out(x, layout)
            norm = Norm(*(torch.zeros(3) for _ in range(2)), None, None, True, 1.0, 1e-5)
            ours = run(bn_rectify, KINDS["relu"], x, norm)
            exact = x.double().transpose(0, 1).flatten(1)
            torch.testing.assert_close(ours["running_mean"], exact.mean(1).float())
            torch.testing.assert_close(ours["running_var"], exact.var(1).float(), rtol=1e-6, atol=0)


def test_constant_channels_have_no_variance() -> None:
    x = torch.full((8, 4, 3, 3), 0.1)
    norm = Norm(
        torch.zeros(4), torch.ones(4), None, torch.tensor([0.0, 1.0, -1.0, 2.0]), True, 1.0, 0.1
    )
    ours = run(bn_rectify, KINDS["relu"], x, norm)
    assert torch.equal(ours["running_var"], torch.zeros(4))
    torch.testing.assert_close(ours["y"][0, :, 0, 0], torch.tensor([0.0, 1.0, 0.0, 2.0]))


def test_one_thread_and_two_agree_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((64, 64, 16, 16), (64, 128, 4, 4)):
            for layout in ("contiguous", "channels_last"):
                x, grad = (lay_out(sample(shape, dtype, seed), layout) for seed in (0, 1))
                results = []
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    norm = norm_of(shape[1], dtype, True)
                    results.append(run(bn_rectify, KINDS["relu"], x, norm, grad))
                for name, value in results[0].items():
                    assert torch.equal(value, results[1][name]), name


def test_without_statistics_affine_and_gradients() -> None:
    x = sample((6, 5, 4), torch.float32)
    norm = Norm(None, None, None, None, True, 0.1, 1e-5)
    ours = run(bn_rectify, KINDS["relu"], x, norm, torch.ones_like(x))
    eager = run(bn_rectify_reference, KINDS["relu"], x, norm, torch.ones_like(x))
    torch.testing.assert_close(ours, eager)
    assert not bn_rectify(Call(KINDS["relu"], x), norm, new_ledger(KINDS["relu"], 5)).requires_grad


def test_gradients_of_weights_alone() -> None:
    x, norm = sample((6, 5, 4), torch.float64), norm_of(5, torch.float64, True)
    assert norm.weight is not None
    norm.weight.requires_grad_()
    bn_rectify(Call(KINDS["relu"], x), norm, new_ledger(KINDS["relu"], 5)).sum().backward()
    assert norm.weight.grad is not None


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("kind", KIND_LIST, ids=lambda k: k.name)
def test_gradcheck_twice(kind: Kind, training: bool) -> None:
    x = sample((4, 3, 5), torch.float64)
    norm = norm_of(3, torch.float64, training)
    assert norm.running_mean is not None
    z = F.batch_norm(x, *clone(norm)[:2], *norm[2:])
    assert away_from_bends(kind, z, torch.float32).all()  # a step must not cross a bend

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own = clone(norm)._replace(weight=weight, bias=bias)
        return bn_rectify(Call(kind, x, slope=SLOPE), own, new_ledger(kind, 3))

    assert norm.weight is not None
    assert norm.bias is not None
    leaves = [t.requires_grad_() for t in (x, norm.weight, norm.bias)]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("kind", KIND_LIST, ids=lambda k: k.name)
def test_backward_is_its_plain_twin(kind: Kind, training: bool) -> None:
    x, grad = sample((7, 5, 6), torch.float64), sample((7, 5, 6), torch.float64, 4)
    norm, ledger = norm_of(5, torch.float64, training), new_ledger(kind, 5)
    ops = torch.ops.layer_collapse
    _, mean, invstd = ops.bn_rectify(
        x, norm.weight, norm.bias, *clone(norm)[:2], ledger, training, 0.1, 1e-5, kind.code, SLOPE
    )
    arguments = (grad, x, norm.weight, norm.bias, mean, invstd, training, kind.code, SLOPE)
    for ours, twin in zip(
        ops.bn_rectify_backward(*arguments), bn_rectify_backward_reference(*arguments), strict=True
    ):
        torch.testing.assert_close(ours, twin)


def test_counting_can_pause_and_live_words_follow() -> None:
    x, kind = sample((6, 5, 4), torch.float32), KINDS["relu"]
    ledger = new_ledger(kind, 5)
    ledger[FLAGS] = 0
    bn_rectify(Call(kind, x), norm_of(5, x.dtype, True), ledger)
    assert not ledger.any()
    ledger[FLAGS] = COUNT | LIVE
    bn_rectify(Call(kind, x), norm_of(5, x.dtype, True), ledger)
    assert 0 < live_entropy(ledger).entropy <= 1
    assert live_entropy(ledger).mixed == 5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 5), (4, 3, 6), (4, 3, 5, 6), (2, 3, 2, 3, 4)])
def test_opcheck(shape: tuple[int, ...], layout: str) -> None:
    kind, x = KINDS["relu"], lay_out(sample(shape, torch.float32), layout)
    norm, ledger = norm_of(shape[1], torch.float32, True), new_ledger(KINDS["relu"], shape[1])
    rest = (True, 0.1, 1e-5, kind.code, 0.0)
    running = (norm.running_mean, norm.running_var)
    ops = torch.ops.layer_collapse
    arguments = (x, norm.weight, norm.bias, *running, ledger, *rest)
    torch.library.opcheck(ops.bn_rectify.default, arguments)
    _, mean, invstd = ops.bn_rectify(*arguments)
    arguments = (x.clone(), x, norm.weight, norm.bias, mean, invstd, True, kind.code, 0.0)
    torch.library.opcheck(ops.bn_rectify_backward.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, "x must be float32"),
        ({"x": torch.zeros(4)}, "x must have elements and a channel dim 1"),
        ({"x": torch.zeros(0, 3)}, "x must have elements"),
        ({"x": torch.zeros(1, 3)}, "more than one value per channel"),
        ({"weight": torch.ones(4)}, "weight must be a contiguous floating point CPU tensor of 3"),
        ({"bias": torch.ones(6)[::2]}, "bias must be a contiguous"),
        ({"kind": KINDS["gelu"].code}, r"kind must be that of ReLU, .* \(got 4\)"),
        ({"ledger": torch.zeros(3, dtype=torch.int64)}, "ledger must be a contiguous int64 CPU"),
        ({"training": False, "running_mean": None}, "must be given when not training"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(4, 3),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "ledger": new_ledger(KINDS["relu"], 3),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
        "kind": 0,
        "slope": 0.0,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.layer_collapse.bn_rectify(*(arguments | change).values())


def test_a_gradient_of_another_shape_is_named() -> None:
    x, ones = torch.zeros(4, 3), torch.ones(3)
    with pytest.raises(RuntimeError, match="grad must have x's shape and dtype"):
        torch.ops.layer_collapse.bn_rectify_backward(
            torch.zeros(4, 2), x, None, None, ones, ones, True, 0, 0.0
        )


@pytest.mark.parametrize("training", [False, True])
def test_equals_the_twin_on_every_device(training: bool, device: torch.device) -> None:
    call = Call(KINDS["relu"], torch.randn(6, 5, 4, 3, device=device))
    norms = [clone_to(norm_of(5, torch.float32, training), device) for _ in range(2)]
    ledgers = [new_ledger(KINDS["relu"], 5, device) for _ in range(2)]
    y = bn_rectify(call, norms[0], ledgers[0])
    torch.testing.assert_close(y, bn_rectify_reference(call, norms[1], ledgers[1]))
    assert torch.equal(*ledgers)
    torch.testing.assert_close(norms[0].running_var, norms[1].running_var)


def clone_to(norm: Norm, device: torch.device) -> Norm:
    return Norm(*(v.to(device) if isinstance(v, Tensor) else v for v in norm))


def test_elsewhere_it_is_torchs_batch_norm_and_the_fused_rectifier() -> None:
    """Meta tensors stand for those of any device that is not the CPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    meta = torch.device("meta")
    norm = clone_to(norm_of(5, torch.float32, True), meta)
    with Record():
        y = bn_rectify(
            Call(KINDS["relu"], torch.empty(6, 5, 4, device=meta)),
            norm,
            new_ledger(KINDS["relu"], 5, meta),
        )
    assert y.shape == (6, 5, 4)
    assert "layer_collapse::rectify" in called
    assert "layer_collapse::bn_rectify" not in called
    assert any("batch_norm" in name for name in called)
