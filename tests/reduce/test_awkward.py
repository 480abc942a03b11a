"""Models that folding must get right, or leave with a sentence: what forwards in the wild do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Switch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from layer_collapse import fold, linearize, load_folded, save_folded, scan
from layer_collapse.graph import TraceError
from layer_collapse.reduce.fold import FoldError
from layer_collapse.reduce.gate import AffineGate

C, L, Inputs = nn.Conv2d, nn.Linear, tuple[Any, ...]


class Way(nn.Module):
    """A forward over some parts."""

    def __init__(self, way: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.way = way
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Any, *more: Any) -> Any:
        return self.way(self, x, *more)


def gate(count: int, kind: str = "mixed", dim: int = 1) -> AffineGate:
    scale = torch.rand(count) * (torch.arange(count) % 3 > 0)
    scale = scale if kind == "mixed" else torch.zeros(count)
    offset = torch.rand(count) if kind == "constant" else torch.zeros(count)
    return AffineGate(scale, offset, dim)


def norm(count: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(count)
    with torch.no_grad():
        made.running_mean.normal_()  # type: ignore[union-attr]
        made.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        made.weight.normal_()
        made.bias.normal_()
    return made


def mlp(way: Callable[..., Any], kind: str = "mixed", **more: Any) -> Way:
    return Way(way, a=L(4, 6), g=gate(6, kind), b=L(6, 4), **more)


def vectors(*counts: int) -> list[Inputs]:
    return [(torch.randn(count, 4),) for count in counts]


def images(*shapes: tuple[int, ...]) -> list[Inputs]:
    return [(torch.randn(shape),) for shape in shapes]


CASES: dict[str, Callable[[], tuple[nn.Module, list[Inputs]]]] = {}
Case = Callable[[], tuple[nn.Module, list[Inputs]]]


def case(make: Case) -> Case:
    CASES[make.__name__.replace("_", " ")] = make
    return make


# Several inputs and outputs, values read more than once


@case
def two_inputs_and_a_dict() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"sum": s.b(s.g(s.a(x))) + y, "parts": [s.a(x).sum(), x.shape[1]]}

    return mlp(way), [(torch.randn(n, 4), torch.randn(n, 4)) for n in (3, 7)]


@case
def a_value_with_three_readers() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor) -> Tensor:
        h = s.g(s.a(x))
        return s.b(h) + s.c(h) + h.sum()

    return mlp(way, c=L(6, 4)), vectors(3, 5)


@case
def a_mask() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor, mask: Tensor) -> Tensor:
        return s.b(s.g(s.a(x)).masked_fill(mask, 0.0))

    return mlp(way), [(torch.randn(n, 4), torch.rand(n, 6) > 0.5) for n in (3, 5)]


# Written in place


@case
def written_in_place_behind_the_gate() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        y = s.g(h)
        h.relu_()
        return s.b(y) + s.c(h)

    return mlp(way, c=L(6, 4)), vectors(3, 5)


@case
def a_view_is_written() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor) -> Tensor:
        h = s.g(s.a(x))
        h[:, :3].mul_(0.5)
        return s.b(h)

    return mlp(way), vectors(3, 5)


@case
def a_slice_is_assigned() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor) -> Tensor:
        h = s.a(x).clone()
        h[:, 0] = 3.0
        return s.b(s.g(h))

    return mlp(way), vectors(3, 5)


@case
def forward_writes_into_its_input() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor) -> Tensor:
        y = s.b(s.g(s.a(x)))
        x[:, 0] = 1.0
        x += 1
        return y + x

    return mlp(way), vectors(3, 5)


@case
def an_out_argument() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        torch.add(h, 1, out=h)
        return s.b(s.g(h))

    return mlp(way), vectors(3, 5)


# Calls in other clothes


@case
def functional_layers_in_training() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor) -> Tensor:
        h = F.conv2d(x, s.c.weight, s.c.bias, padding=1)
        n = s.n
        h = F.batch_norm(h, n.running_mean, n.running_var, n.weight, n.bias, s.training, 0.1, n.eps)
        h = F.conv2d(s.g(h), s.d.weight, None, stride=2)
        return F.linear(F.adaptive_avg_pool2d(F.relu(h), 1).flatten(1), s.l.weight, s.l.bias)

    model = Way(way, c=C(3, 6, 3), n=norm(6), g=gate(6), d=C(6, 5, 1, bias=False), l=L(5, 2))
    return model.train(), images((2, 3, 8, 8), (3, 3, 8, 8))


@case
def recomputed_in_backward() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor) -> Tensor:
        inner = checkpoint(lambda y: s.g(s.a(y)), x, use_reentrant=False)
        out: Tensor = s.b(inner)
        return out

    return mlp(way), vectors(3, 5)


@case
def a_recurrent_layer_in_front() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor) -> Tensor:
        given, _ = s.r(x)
        out: Tensor = s.b(s.g(s.a(given)))
        return out

    model = Way(way, r=nn.LSTM(4, 5, batch_first=True), a=L(5, 6), g=gate(6, dim=-1), b=L(6, 4))
    return model, [(torch.randn(n, 7, 4),) for n in (3, 2)]


@case
def weights_that_hooks_compute() -> tuple[nn.Module, list[Inputs]]:
    model = nn.Sequential(L(4, 6), gate(6), L(6, 3), nn.ReLU(), L(3, 6), gate(6), L(6, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(model[0])
    prune.random_unstructured(model[2], "weight", 0.5)
    return model, vectors(3, 5)


@case
def a_parametrisation_with_buffers() -> tuple[nn.Module, list[Inputs]]:
    model = nn.Sequential(L(4, 6), gate(6), L(6, 3), nn.ReLU(), L(3, 6), gate(6), L(6, 2))
    parametrizations.spectral_norm(model[0])
    return model, vectors(3, 5)


# Weights, shapes and dtypes


@case
def weights_with_strides() -> tuple[nn.Module, list[Inputs]]:
    model = nn.Sequential(L(4, 6), gate(6), L(6, 4), nn.ReLU(), L(4, 3))
    model[0].weight = nn.Parameter(torch.randn(4, 6).t())
    model[2].weight = nn.Parameter(torch.randn(4, 12)[:, ::2])
    model[4].weight = nn.Parameter(torch.randn(1, 4).expand(3, 4))
    return model, vectors(3, 5)


@case
def two_weights_in_one_storage() -> tuple[nn.Module, list[Inputs]]:
    both = torch.randn(8, 4)
    model = nn.Sequential(L(4, 4), gate(4), L(4, 4))
    model[0].weight, model[2].weight = nn.Parameter(both[:4]), nn.Parameter(both[4:])
    return model, vectors(3, 5)


@case
def an_image_without_batch() -> tuple[nn.Module, list[Inputs]]:
    return nn.Sequential(C(3, 6, 3), gate(6, dim=0), C(6, 4, 1)), images((3, 8, 8), (3, 9, 9))


@case
def a_single_vector() -> tuple[nn.Module, list[Inputs]]:
    return nn.Sequential(L(4, 6), gate(6, dim=0), L(6, 4)), [(torch.randn(4),)] * 2


@case
def an_empty_batch_as_example() -> tuple[nn.Module, list[Inputs]]:
    return nn.Sequential(L(4, 6), gate(6), L(6, 3)), vectors(0, 5)


@case
def a_layer_of_no_width() -> tuple[nn.Module, list[Inputs]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch's initialisation
        inner = nn.Sequential(L(4, 0), L(0, 4))
    return mlp(lambda s, x: s.b(s.g(s.a(x))) + s.inner(x), inner=inner), vectors(3, 5)


@case
def an_inner_cast() -> tuple[nn.Module, list[Inputs]]:
    return mlp(lambda s, x: s.b(s.g(s.a(x)).double().softmax(-1).to(x.dtype))), vectors(3, 5)


@case
def tokens_that_are_mixed_along_both_dims() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor) -> Tensor:
        y = s.t2(s.gt(s.t1(x.transpose(1, 2)))).transpose(1, 2) + x
        out: Tensor = y + s.c2(s.gc(s.c1(y)))
        return out

    model = Way(
        way, t1=L(5, 7), gt=gate(7, dim=-1), t2=L(7, 5), c1=L(4, 8), gc=gate(8, dim=-1), c2=L(8, 4)
    )
    return model, [(torch.randn(n, 5, 4),) for n in (3, 2)]


@case
def a_unet() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor) -> Tensor:
        down = s.g1(s.c1(x))
        inner = s.g2(s.c2(F.max_pool2d(down, 2)))
        up = F.interpolate(inner, scale_factor=2.0)
        out: Tensor = s.c3(torch.cat([down, up], 1))
        return out

    model = Way(
        way, c1=C(3, 6, 3, padding=1), g1=gate(6), c2=C(6, 8, 3, padding=1), g2=gate(8),
        c3=C(14, 2, 1),
    )  # fmt: skip
    return model, images((2, 3, 8, 8))


# Constants in odd places


@case
def a_constant_times_a_parameter() -> tuple[nn.Module, list[Inputs]]:
    model = mlp(
        lambda s, x: x + s.gamma * s.b(s.g(s.a(x))), "constant", gamma=nn.Parameter(torch.randn(4))
    )
    return model, vectors(3, 5)


@case
def constants_that_are_subtracted_or_scaled() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor) -> Tensor:
        return torch.add(x, s.b(s.g(s.a(x))), alpha=2) + (1 - s.b2(s.g2(s.a2(x))))

    model = mlp(way, "constant", a2=L(4, 6), g2=gate(6, "off"), b2=L(6, 4))
    return model, vectors(3, 5)


@case
def constants_side_by_side() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor) -> Tensor:
        off, constant = s.g(s.a(x)), s.g2(s.a2(x))
        stacked = torch.stack([off, constant], 1).sum(1)
        out: Tensor = s.b(torch.cat([off, x, constant], 1)) + s.c(stacked)
        return out

    model = Way(
        way, a=L(4, 6), g=gate(6, "off"), a2=L(4, 6), g2=gate(6, "constant"), b=L(16, 4), c=L(6, 4)
    )
    return model, vectors(3, 5)


@case
def channels_are_sorted_summed_and_normalised() -> tuple[nn.Module, list[Inputs]]:
    def way(s: Any, x: Tensor) -> Tensor:
        h = s.g(s.a(x))
        mixed = [h.sort(1).values, h.cumsum(1), F.normalize(h, dim=1), h.softmax(1)]
        out: Tensor = sum(s.b(m) for m in mixed) + h.topk(4, 1).values + h.amax(1, True)
        return out

    return mlp(way), vectors(3, 5)


@pytest.mark.parametrize("name", CASES)
def test_equal_at_every_batch_and_size(name: str) -> None:
    torch.manual_seed(len(name))
    model, given = CASES[name]()
    modes = [m.training for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    kept = copy.deepcopy(given)
    result = fold(model, given[0] if len(given[0]) > 1 else given[0][0])
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for inputs, untouched in zip(given, kept, strict=True):
        assert all(map(torch.equal, inputs, untouched))
        with torch.no_grad():
            expected = tree_leaves(model.eval()(*copy.deepcopy(inputs)))
            got = tree_leaves(result.model(*copy.deepcopy(inputs)))
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# What is left, and named


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("weights that hooks compute", "'0' has hooks"),
        ("a parametrisation with buffers", "'0' has a parametrisation"),
        ("two weights in one storage", "the weight of '0' is tied"),
        ("a value with three readers", "the value of 'a' is used elsewhere"),
    ],
)
def test_obstacles_are_named(name: str, reason: str) -> None:
    model, given = CASES[name]()
    report = fold(model, given[0][0]).report
    assert any(reason in refusal.reason for refusal in report.refusals)


def test_models_with_computed_weights_are_scanned_and_linearised() -> None:
    model, given = CASES["weights that hooks compute"]()
    report = scan(model, [given[1][0]])
    linear = linearize(model, report).model
    torch.testing.assert_close(linear(given[1][0]), model.eval()(given[1][0]))


def test_quantised_modules_are_named_and_the_rest_folds() -> None:
    quantised = pytest.importorskip("torch.ao.quantization")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no quantised kernels")
    model = nn.Sequential(L(4, 6), nn.ReLU(), L(6, 8), gate(8), L(8, 3), gate(3), nn.Tanh())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantised.quantize_dynamic(model.eval(), {"4"}, torch.qint8)
        result = fold(model, x := torch.randn(3, 4))
    (reason,) = (r.reason for r in result.report.refusals if r.name == "5")
    assert reason == "'4' is quantised (Linear)"
    assert [f.rule for f in result.report.folds if f.name == "3"] == ["gate"]
    torch.testing.assert_close(result.model(x), model(x))


def test_hidden_rectifiers_are_in_the_report_and_the_rest_folds() -> None:
    model = nn.Sequential(L(4, 4), Switch(), L(4, 6), gate(6), L(6, 2))
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="are not seen"):
        result = fold(model, x)
    (refusal,) = (r for r in result.report.refusals if r.rule == "trace")
    assert refusal.name == "1"
    assert "'1.act'" in refusal.reason
    assert {f.rule for f in result.report.folds} == {"gate", "neurons", "linear"}
    for sample in (x, -x):
        torch.testing.assert_close(result.model(sample), model(sample))


def test_layer_norm_stays_outside() -> None:
    model = nn.Sequential(nn.LayerNorm(4), L(4, 6), gate(6), L(6, 4), nn.LayerNorm(4), L(4, 3))
    result = fold(model, x := torch.randn(3, 4))
    left = {str(n.target) for n in result.model.graph.nodes if n.op == "call_module"}
    assert left == {"0", "3", "4", "5"}
    for path in ("0", "4"):
        ours, own = result.model.get_submodule(path), model.get_submodule(path)
        assert type(ours) is nn.LayerNorm
        assert all(map(torch.equal, ours.parameters(), own.parameters()))
    torch.testing.assert_close(result.model(x), model(x))


# Graphs of torch.export hold the example's sizes


def test_the_fallback_is_named_and_other_sizes_are_refused(tmp_path: Path) -> None:
    """Silently wrong otherwise: the number of tokens is in the graph as a number."""

    def way(s: Any, x: Tensor) -> Tensor:
        for _ in range(x.shape[1]):  # torch.fx cannot follow this
            x = x + x.mean(1, keepdim=True) / x.shape[1]
        return x + s.b(s.g(s.a(x)))  # type: ignore[no-any-return]

    model = Way(way, a=L(4, 6), g=gate(6, dim=-1), b=L(6, 4))
    result = fold(model, x := torch.randn(2, 5, 4))
    assert result.report.traced_by == "export"
    assert "traced by torch.export" in str(result.report)
    assert result.report.only_sizes == [[5, 4]]
    assert "linear" in {f.rule for f in result.report.folds}
    save_folded(result.model, tmp_path / "folded.safetensors")
    for folded in (result.model, load_folded(tmp_path / "folded.safetensors")):
        for given in (x, torch.randn(3, 5, 4)):
            torch.testing.assert_close(folded(given), model(given), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=r"shape \[N, 5, 4\] only \(got \[2, 7, 4\]\)"):
            folded(torch.randn(2, 7, 4))


def test_forwards_that_count_their_samples_take_as_many_only(tmp_path: Path) -> None:
    def way(s: Any, x: Tensor) -> Tensor:
        for _ in range(x.shape[0]):
            x = x * 1.5
        return x + s.b(s.g(s.a(x)))  # type: ignore[no-any-return]

    model = mlp(way)
    result = fold(model, x := torch.randn(2, 4))
    save_folded(result.model, tmp_path / "folded.safetensors")
    for folded in (result.model, load_folded(tmp_path / "folded.safetensors")):
        torch.testing.assert_close(folded(x), model(x))
        with pytest.raises(ValueError, match=r"of shape \[2, 4\] only \(got \[3, 4\]\)"):
            folded(torch.randn(3, 4))


# One sentence each


def test_nested_inputs_are_refused() -> None:
    model = mlp(lambda s, xs: s.b(s.g(s.a(xs[0]))) + (xs[1] if xs[1].sum() > 0 else 0))
    with pytest.raises(TraceError, match="inputs hold a list or a mapping; pass tensors one by"):
        fold(model, [vectors(3, 3)[0] + vectors(3)[0]])


def test_values_that_are_not_finite_and_scripted_modules() -> None:
    model = nn.Sequential(L(4, 6), gate(6), L(6, 3))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(FoldError, match="gives NaN on the example inputs"):
        fold(model, torch.randn(3, 4))
    scripted = torch.jit.script(nn.Sequential(L(4, 6), nn.ReLU()))
    with pytest.raises(TraceError, match="pass the module that was scripted"):
        fold(scripted, torch.randn(3, 4))


class Factories(nn.Module):
    """Floating-point tensors that forward makes from sizes and integers alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)
        self.rnn = nn.GRU(2, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        n, length = x.size(0), x.size(1)
        y = torch.bmm(torch.ones(n, 7, 7).tril(), self.b(self.a(x)))
        y = torch.bmm(torch.full((n, 7, 7), 0.5), y) + torch.eye(7)[:, :2]
        y = torch.bmm((torch.arange(7) / length).expand(n, 7, 7), y)
        return self.rnn(y, torch.zeros(1, n, 3))[0]


def test_tensors_that_forward_makes_are_float64_in_the_proof() -> None:
    model, x = Factories().eval(), torch.randn(2, 7, 5)
    result = fold(model, x)
    assert len(result.report.folds) == 1
    torch.testing.assert_close(result.model(x), model(x))
