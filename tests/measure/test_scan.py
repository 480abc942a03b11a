"""The certificate: what it covers, what voids it, and that the model is left as it was."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from layer_collapse.measure.scan import fingerprint, scan


class Net(nn.Module):
    """Conv, batch norm, dropout and a functional rectifier, with every sort of buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4 * 16, 6)
        self.head = nn.Linear(6, 3)
        self.register_buffer("offset", torch.zeros(3))
        self.register_buffer("unsaved", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.bn(self.conv(x))).flatten(1))
        return self.head(torch.relu(self.fc(x))) + self.offset + self.unsaved


def images(n: int = 12) -> Tensor:
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(5))


def test_is_certified_and_counts_everything() -> None:
    model, x = Net(), images(13)
    report = scan(model, list(x.split(4)), x[:2])
    assert report.certified
    assert report.samples == 13
    assert report.fingerprint == fingerprint(model)
    assert not report.cut
    assert report.cut_by == ""
    assert [(row.name, row.positions) for row in report] == [("act", 13 * 16), (":relu", 13)]
    model.eval()
    with torch.no_grad():
        z = model.bn(model.conv(x))
        off, on = (~(z > 0)).all(0).all(1).all(1), (~(z < 0)).all(0).all(1).all(1)
    assert report["act"].off == int(off.sum())
    assert report["act"].on == int((on & ~off).sum())
    p = (z > 0).double().mean((0, 2, 3)).clamp(1e-300, 1)
    entropy = -(p * p.log2() + (1 - p) * (1 - p).clamp(1e-300).log2())
    assert report["act"].entropy == pytest.approx(float(entropy.mean()), rel=1e-9)
    # The batch size changes nothing, and neither does a second scan.
    again = scan(model, [(x, torch.zeros(13))], x[:2])
    assert again.rows == report.rows


def every_tensor(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("name", [*every_tensor(Net())])
def test_the_fingerprint_sees_every_bit(name: str) -> None:
    model = Net()
    assert fingerprint(Net()) == fingerprint(model)
    before = fingerprint(model)
    tensor = every_tensor(model)[name].detach()
    flat = tensor.reshape(-1)
    words = flat.view(torch.int32 if flat.dtype == torch.float32 else torch.int64)
    words[-1] ^= 1  # one ulp, or -0.0-like noise: the last bit of the last value
    assert fingerprint(model) != before
    words[-1] ^= 1
    assert fingerprint(model) == before
    if name == "fc.bias":
        tensor.zero_()
        zero = fingerprint(model)
        tensor.neg_()  # -0.0 is another weight
        assert fingerprint(model) != zero


def test_the_fingerprint_sees_names_shapes_and_dtypes() -> None:
    def of(**tensors: Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return fingerprint(module)

    x = torch.arange(6, dtype=torch.float32)
    variants = [of(a=x), of(b=x), of(a=x.view(2, 3)), of(a=x.view(torch.int32)), of(a=x, b=x)]
    variants += [of(), of(a=x[:0]), of(a=x.double()), of(a=x.bfloat16()), of(a=x[1:])]
    assert len(set(variants)) == len(variants)
    assert of(a=x.view(2, 3).t().contiguous().t()) == of(a=x.view(2, 3))  # memory format is no bit


def snapshot(model: nn.Module) -> list[object]:
    return [
        (name, type(m), id(m), m.training, sorted(m.__dict__), *(len(h) for h in hooks(m)))
        for name, m in model.named_modules()
    ]


def hooks(module: nn.Module) -> list[dict]:
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks]


class Breaks(Exception):
    pass


@pytest.mark.parametrize("failure", [None, "loader", "model", "empty"])
def test_leaves_the_model_exactly_as_it_was(failure: str | None) -> None:
    model = Net()
    model.train()
    model.bn.eval()  # a frozen batch norm in a training model
    model.drop.p = 0.25
    seen: list[int] = []
    model.fc.register_forward_hook(lambda *_: seen.append(1))
    before, numbers = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.requires_grad for p in model.parameters()]

    def batches():
        if failure != "empty":
            yield images(4)
        if failure == "loader":
            raise Breaks
        if failure == "model":
            yield torch.zeros(2, 3)

    if failure is None:
        scan(model, batches(), images(2))
        assert seen
    else:
        with pytest.raises((Breaks, RuntimeError, ValueError)):
            scan(model, batches(), images(2))
    assert snapshot(model) == before
    assert all(torch.equal(v, numbers[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    scan(model, [images(3)], images(2))  # it is not tracked any more


def test_leaves_no_hook_on_shared_rectifiers_and_masked_models() -> None:
    class Shared(Tokens):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            values = self.act(self.fc(self.embed(input_ids)))
            return super().forward(input_ids, attention_mask) + self.act(self.head(values)).sum(1)

    model, ids = Shared(), torch.ones(2, 4, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones(2, 4)}
    before = snapshot(model)
    assert len(scan(model, [batch], batch)) == 3
    assert snapshot(model) == before


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 1, 6, 6)]])
def test_refuses_no_sample(batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="hold no sample; pass at least one batch"):
        scan(Net(), batches, images(2))


def test_an_empty_batch_among_others_counts_nothing() -> None:
    x = images(5)
    report = scan(Net(), [x[:0], x, x[:0]], x)
    assert report.samples == 5
    assert report.rows == scan(Net(), [x], x).rows


def test_one_sample_certifies_but_shows_no_cut() -> None:
    report = scan(Net(), [images(1)], images(1))
    assert (report.certified, report.samples, report.cut) == (True, 1, False)
    assert report[":relu"].mixed == 0  # one sample has one sign


def test_changing_weights_are_refused() -> None:
    model, x = Net(), images(8)

    def batches():
        yield x
        with torch.no_grad():
            model.fc.bias[0] += 1e-3
        yield x

    with pytest.raises(RuntimeError, match="the weights or buffers changed during the scan"):
        scan(model, batches(), x)

    class Drifts(Net):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.unsaved.add_(1)
            return out

    with pytest.raises(RuntimeError, match="the weights or buffers changed during the scan"):
        scan(Drifts(), [x], x)


class Tokens(nn.Module):
    """Token-major values [B, T, C] with a mask of the valid ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc, self.act = nn.Embedding(9, 5), nn.Linear(5, 7), nn.GELU()
        self.head = nn.Linear(7, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        values = self.head(self.act(self.fc(self.embed(input_ids))))
        return (values * attention_mask.unsqueeze(-1)).sum(1)


def test_batches_of_arguments_and_their_padding() -> None:
    ids = torch.randint(1, 9, (6, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]] * 2)
    batches = [
        {"input_ids": i, "attention_mask": m, "labels": torch.zeros(3)}
        for i, m in zip(ids.split(3), mask.split(3), strict=True)
    ]
    example = {"input_ids": ids[:2], "attention_mask": mask[:2]}
    model = Tokens()
    report = scan(model, batches, example)
    assert report.samples == 6
    assert report["act"].positions == 14  # of 24: padding does not count
    with torch.no_grad():
        z = model.fc(model.embed(ids))[mask.bool()]
    p = (z > 0).double().mean(0).clamp(1e-300, 1 - 1e-16)
    expected = float(-(p * p.log2() + (1 - p) * (1 - p).log2()).mean())
    assert report["act"].entropy == pytest.approx(expected, rel=1e-6)
    changed = [{**b, "input_ids": b["input_ids"] * b["attention_mask"]} for b in batches]
    assert scan(model, changed, example).rows == report.rows  # whatever the padding holds


@dataclass
class Output:
    loss: None
    logits: Tensor


class Wrapped(Net):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor):
        y = super().forward(x)
        return {
            "tuple": lambda: (y, y.abs()),
            "list": lambda: [y],
            "dict": lambda: {"logits": y, "other": y.abs()},
            "mapping": lambda: {"scores": y},
            "object": lambda: Output(None, y),
            "string": lambda: "logits",
            "nothing": lambda: (),
        }[self.form]()


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "mapping"])
def test_output_types(form: str) -> None:
    x = images(6)
    assert scan(Wrapped(form), [x], x).rows == scan(Net(), [x], x).rows
    cut = Wrapped(form)
    nn.init.zeros_(cut.head.weight)
    assert scan(cut, [x], x).cut


def test_an_object_with_logits_and_ones_own_forward() -> None:
    x = images(6)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model, seen = Calls(), []

    def forward(m: nn.Module, batch: tuple[Tensor, str]) -> Output:
        assert not m.training
        assert not torch.is_grad_enabled()
        seen.append(batch[1])
        return Output(None, m(batch[0]))

    report = scan(model, [(x, "a"), (x, "b")], x, forward=forward)
    assert seen == ["a", "b"]
    assert report.samples == 12
    with pytest.raises(
        TypeError, match=r"something with \.logits \(got str\); wrap it in a module"
    ):
        scan(model, [x], x, forward=lambda m, b: "logits")
    with pytest.raises(TypeError, match=r"got tuple"):
        scan(model, [x], x, forward=lambda m, b: ())


def test_a_network_cut_on_purpose_is_seen_by_its_logits() -> None:
    x = images(10)
    model = Net()
    nn.init.zeros_(model.head.weight)
    report = scan(model, [x[:4], x[4:]], x)
    assert report.cut
    assert report.cut_by == "all 10 samples get equal logits"
    assert not any(row.constant for row in report)  # no rectifier says so
    assert report.zero_entropy == []
    # A single sample that differs, in the last batch, is enough for not being cut.
    model = Net()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[0, 0] = 1e-3
    assert not scan(model, [x[:4], x[4:]], x).cut


def test_a_constant_rectifier_with_no_way_around_is_named() -> None:
    model, x = Net(), images(10)
    with torch.no_grad():
        model.fc.weight.zero_()
    report = scan(model, [x], x)
    assert report.cut
    assert report.cut_by == "':relu' is constant and nothing leads around it"
    assert report[":relu"].state == "empty"


def test_one_output_per_sample_and_outputs_of_differing_length() -> None:
    x = images(6)
    assert not scan(Net(), [x], x, forward=lambda m, b: m(b)[:, 0]).cut
    assert scan(Net(), [x], x, forward=lambda m, b: m(b)[:, 0] * 0).cut
    lengths = iter([2, 3])
    assert not scan(Net(), [x, x], x, forward=lambda m, b: (m(b) * 0)[:, : next(lengths)]).cut


def test_progress_wraps_the_batches() -> None:
    x, seen = images(6), []

    def progress(batches):
        for batch in batches:
            seen.append(len(batch))
            yield batch

    assert scan(Net(), [x[:2], x[2:]], x, progress=progress).samples == 6
    assert seen == [2, 4]
