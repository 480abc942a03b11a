"""One file in, the same model out; anything else in, a ValueError."""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from layer_collapse.reduce import registry, saving
from layer_collapse.reduce.fold import fold
from layer_collapse.reduce.gate import AffineGate, ConstantBias, FixedSize
from layer_collapse.reduce.recipe import check_path
from layer_collapse.reduce.ring import RingConv
from layer_collapse.reduce.saving import load_folded, save_folded

from . import models


def folded(name: str = "vit", kinds=("off", "six", "gelu"), dtype=torch.float32) -> fx.GraphModule:  # type: ignore[no-untyped-def]
    model = models.make(name, kinds, 15).to(dtype)
    return fold(model, models.inputs(model, dtype)).model


@pytest.mark.parametrize("name", sorted(models.MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_is_bit_identical(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    module = folded(name, ("on", "six", "gelu"), dtype)
    save_folded(module, tmp_path / "m.safetensors", {"accuracy": 0.5})
    loaded = load_folded(tmp_path / "m.safetensors")
    x = torch.randn(models.MODELS[name].example).to(dtype)
    assert torch.equal(loaded(x), module(x))
    ours, theirs = loaded.state_dict(), module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
    assert loaded.meta["extra"] == {"accuracy": 0.5}
    assert not any(m.training for m in loaded.modules())
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_fresh_process_needs_no_class(tmp_path: Path) -> None:
    module = folded()
    x = torch.randn(2, 3, 6, 6)
    save_folded(module, tmp_path / "m.safetensors")
    torch.save((x, module(x)), tmp_path / "expected.pt")
    program = """
        import sys, torch
        torch.set_num_threads(1)
        from layer_collapse.reduce.saving import load_folded
        x, expected = torch.load(sys.argv[1] + "/expected.pt", weights_only=True)
        model = load_folded(sys.argv[1] + "/m.safetensors")
        assert torch.equal(model(x), expected)
        assert not any("models" in name.split(".") for name in sys.modules)
    """
    root = str(Path(saving.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)


class Everything(nn.Module):
    """Ties, buffers of both sorts, strides, and many argument types."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding="same", bias=False)
        self.up = nn.ConvTranspose1d(8, 8, 2, stride=2, output_padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.gate = AffineGate(torch.tensor([0.0, 1, 0, 1, 1, 1, 1, 2]), torch.arange(8.0), 2)
        self.bias = ConstantBias(torch.randn(8))
        self.register_buffer("positions", torch.arange(5), persistent=False)
        self.register_buffer("scale", torch.randn(8).double())
        self.strided = nn.Parameter(torch.randn(8, 8).t())
        self.empty = nn.Parameter(torch.zeros(0, 8))

    def forward(self, tokens: Tensor) -> dict[str, object]:
        x = self.embed(tokens) + self.embed.weight[self.positions] @ self.strided
        x = self.bias(self.gate(x)) + self.attention(x, x, x)[0]
        y = self.norm(self.conv(x.transpose(1, 2)))
        y = F.pad(self.up(y), (1, 0), value=float("-inf")).clamp(min=-1.0)[..., : tokens.shape[1]]
        x = torch.cat([self.frozen(y.mT), x, self.empty.expand(2, 0, 8)], dim=1)
        return {"logits": self.out(x), "pair": (x.to(torch.float64) * self.scale, None, 3)}


def test_every_sort_of_value_survives(tmp_path: Path) -> None:
    model = Everything().eval()
    tokens = torch.randint(0, 11, (2, 5))
    module = fold(model, tokens).model
    save_folded(module, tmp_path / "m.safetensors")
    loaded = load_folded(tmp_path / "m.safetensors")
    ours, theirs = loaded(tokens), module(tokens)
    assert torch.equal(ours["logits"], theirs["logits"])
    assert torch.equal(ours["pair"][0], theirs["pair"][0])
    assert ours["pair"][1:] == (None, 3)
    assert loaded.out.weight is loaded.embed.weight
    assert "positions" not in loaded.state_dict()
    assert loaded.strided.stride() == model.strided.stride()
    assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == {
        "frozen.weight",
        "frozen.bias",
    }
    assert loaded.embed.padding_idx == 0


def test_channels_last_survives(tmp_path: Path) -> None:
    model = models.make("resnet", ["mixed"], 1).to(memory_format=torch.channels_last)
    module = fold(model, models.inputs(model)).model
    save_folded(module, tmp_path / "m.safetensors")
    loaded = load_folded(tmp_path / "m.safetensors")
    for name, parameter in module.named_parameters():
        assert loaded.get_parameter(name).stride() == parameter.stride(), name


@pytest.mark.parametrize("name", sorted(registry.MODULES))
def test_every_registered_module_can_be_rebuilt(tmp_path: Path, name: str) -> None:
    special = {
        "AffineGate": lambda: AffineGate(torch.ones(4), torch.zeros(4)),
        "FixedSize": lambda: FixedSize((4, 6, 6), 2),
        "ConstantBias": lambda: ConstantBias(torch.ones(4, 1, 1)),
        "RingConv": lambda: RingConv(*(nn.Conv2d(4, 4, 3, padding="same") for _ in range(3))),
        "Unflatten": lambda: nn.Unflatten(1, (2, 2)),
        "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
        "Upsample": lambda: nn.Upsample(scale_factor=2.0),
        "GRU": lambda: nn.GRU(4, 4, 2, bias=False, batch_first=True),
        "RNN": lambda: nn.RNN(4, 4, nonlinearity="tanh"),
        "LSTM": lambda: nn.LSTM(4, 4, 2, dropout=0.1, bidirectional=True, proj_size=2),
        "UpsamplingBilinear2d": lambda: nn.UpsamplingBilinear2d((4, 6)),
        "UpsamplingNearest2d": lambda: nn.UpsamplingNearest2d(scale_factor=2),
        "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2, kdim=6, bias=False),
    }
    kind, fields = registry.MODULES[name]
    sizes = [v for v in fields if registry.FIELD_KINDS[v][0] in ("int", "sizes")]
    required = {"kernel_size": 2, "normalized_shape": 4, "output_size": 2, "num_groups": 2}
    defaults = ("groups", "dilation", "output_padding", "start_dim", "end_dim", "num_parameters")
    given = {v: required.get(v, 4) for v in sizes if v not in defaults}
    given |= {v: 2 for v in ("kernel_size", "output_size") if v in fields}
    if name == "ChannelShuffle" or "Pad" in name:
        given = {fields[0]: 2, **({"value": 0.5} if "value" in fields else {})}
    if name == "PReLU":
        given = {"num_parameters": 4}
    module = special[name]() if name in special else kind(**given)
    nested = fx.Graph()
    x = nested.placeholder("x")
    nested.output(nested.call_module("inner.module", (x,)))
    holder = fx.GraphModule({"inner.module": module}, nested)
    save_folded(holder, tmp_path / "m.safetensors")
    loaded = load_folded(tmp_path / "m.safetensors").get_submodule("inner.module")
    assert type(loaded) is kind
    assert repr(loaded) == repr(module.eval())
    assert loaded.state_dict().keys() == module.state_dict().keys()
    for field in fields:
        if field not in registry.DERIVED:
            assert getattr(loaded, field) == getattr(module, field), field


class Named(nn.Module):
    """Paths that are no Python names, around modules whose results are several values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = nn.Sequential()
        block.add_module("block1-0", nn.Linear(4, 6))
        block.add_module("1 to-two", nn.LSTM(6, 4, batch_first=True))
        self.blocks, self.pad = block, nn.ConstantPad1d(1, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = getattr(self.blocks, "1 to-two")(getattr(self.blocks, "block1-0")(x))[0]
        return self.pad(y)


def test_paths_that_are_no_names_and_recurrent_modules_survive(tmp_path: Path) -> None:
    model, x = Named().eval(), torch.randn(2, 3, 4)
    save_folded(fold(model, x).model, tmp_path / "m.safetensors")
    loaded = load_folded(tmp_path / "m.safetensors")
    assert torch.equal(loaded(x), model(x))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    loaded(x).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


@pytest.mark.parametrize(
    "path",
    [
        *('a"b', "a'b", "a\\b", "a\nb", "a b\n", "-a", " a", "a ", "a(b)", "a..b", "", "\u00e4"),
        *("b.__class__", "b.__private", "b.forward", "b.graph"),
    ],
)
def test_paths_that_reach_further_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        check_path(path)


# Refused when saving


class Custom(nn.Linear):
    pass


Custom.__module__ = "torch.nn.custom"


def _hooked() -> nn.Module:
    linear = nn.Linear(3, 3)
    linear.register_forward_hook(lambda *_: None)
    return nn.Sequential(linear)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(Custom(3, 3)), "'0' is a Custom, which is not registered"),
        (nn.Sequential(nn.LSTMCell(3, 3)), "'0' is a LSTMCell, which is not registered"),
        (_hooked(), "'0' has hooks"),
        (nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)), "complex64"),
    ],
)
def test_unregistered_modules_are_refused_by_name(tmp_path: Path, model, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        save_folded(fx.symbolic_trace(model), tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []


def test_unregistered_calls_are_refused_by_name(tmp_path: Path) -> None:
    for forward, message in (
        (lambda x: torch.fft.fft(x), "function 'fft_fft' is not registered"),
        (lambda x: x.backward(), "method 'backward' is not registered"),
        (lambda x: x.to(torch.complex64), "'to': an argument of type dtype cannot be saved"),
    ):
        with pytest.raises(ValueError, match=message):
            save_folded(fx.symbolic_trace(_Calls(forward)), tmp_path / "m.safetensors")
    with pytest.raises(TypeError, match="fold it first"):
        save_folded(nn.Linear(2, 2), tmp_path / "m.safetensors")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing was written"):
        save_folded(folded(), tmp_path / "m.safetensors", {"x": object()})
    assert os.listdir(tmp_path) == []


def test_a_module_that_is_not_as_its_fields_say_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"0.weight does not fit a Linear; nothing was written"):
        save_folded(fx.symbolic_trace(model), tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []


class _Calls(nn.Module):
    def __init__(self, way) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> object:
        return self.way(x)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "m.safetensors"
    save_folded(folded(), path)
    old = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_folded(folded("chain", ("on",)), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["m.safetensors"]


# Hostile files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "m.safetensors"
    save_folded(folded("residual", ("on", "six")), path, {"a": 1})
    return path.read_bytes()


def _split(content: bytes) -> tuple[dict[str, object], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _join(header: dict[str, object], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _recipe(content: bytes) -> dict[str, object]:
    return json.loads(_split(content)[0]["__metadata__"]["recipe"])  # type: ignore[index]


def _with_recipe(content: bytes, recipe: object) -> bytes:
    """A file with another recipe and the right checksum for it: a forger, not an accident."""
    header, body = _split(content)
    text = json.dumps(recipe)
    header["__metadata__"] |= {"recipe": text, "crc32": str(zlib.crc32(text.encode()))}  # type: ignore[operator]
    return _join(header, body)


def _load(content: bytes, folder: Path) -> fx.GraphModule:
    path = folder / "mutated.safetensors"
    path.write_bytes(content)
    return load_folded(path)


_quick = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@_quick
@given(st.data())
def test_any_changed_byte_is_noticed(saved: bytes, tmp_path: Path, data) -> None:  # type: ignore[no-untyped-def]
    length = 8 + struct.unpack("<Q", saved[:8])[0]
    end = st.one_of(st.integers(0, length - 1), st.integers(length, len(saved) - 1))
    place, value = data.draw(end), data.draw(st.integers(0, 255))
    changed = bytearray(saved)
    changed[place] = value
    if saved[place] in (value, 32):  # the header is padded with spaces
        return
    with pytest.raises(ValueError, match="cannot be loaded"):
        _load(bytes(changed), tmp_path)


@_quick
@given(st.data())
def test_truncated_and_random_files(saved: bytes, tmp_path: Path, data) -> None:  # type: ignore[no-untyped-def]
    content = data.draw(
        st.one_of(
            st.integers(0, len(saved) - 1).map(lambda n: saved[:n]),
            st.binary(max_size=200),
            st.binary(min_size=1, max_size=20).map(lambda more: saved + more),
        )
    )
    with pytest.raises(ValueError, match="cannot be loaded"):
        _load(content, tmp_path)


def _places(value: object, at: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    items: list[tuple[object, object]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [at] + [place for key, item in items for place in _places(item, (*at, key))]


_values = st.one_of(
    st.sampled_from([None, True, 0, 1, -1, 2**40, 2**70, 1.5, "", "x", [], {}, [1, 2], "weight"]),
    st.sampled_from(
        ["eval", "__class__", "os.system", "a b", "forward", "1;import os", "é", "a.b"]
    ),
    st.sampled_from([{"node": "x"}, {"tuple": []}, {"dtype": "q"}, {"float": "inf"}, {"list": 3}]),
    st.sampled_from(
        ["call_function", "call_module", "get_attr", "output", "placeholder", "getattr"]
    ),
)


@settings(parent=_quick, max_examples=600)
@given(st.data())
def test_forged_recipes_load_or_are_refused(saved: bytes, tmp_path: Path, data) -> None:  # type: ignore[no-untyped-def]
    recipe = _recipe(saved)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(_places(recipe)[1:]))
        holder = recipe
        for key in place[:-1]:
            holder = holder[key]  # type: ignore[index, call-overload]
        change = data.draw(st.sampled_from(["set", "delete", "rename", "copy"]))
        if change == "set":
            holder[place[-1]] = data.draw(_values)  # type: ignore[index]
        elif change == "delete":
            del holder[place[-1]]  # type: ignore[attr-defined]
        elif change == "rename" and isinstance(holder, dict):
            holder[data.draw(st.sampled_from(["x", "forward", "a.b", "", "stem"]))] = holder.pop(
                place[-1]
            )
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[place[-1]]))  # type: ignore[call-overload]
    sentence = ""
    try:
        module = _load(_with_recipe(saved, recipe), tmp_path)
        assert isinstance(module, fx.GraphModule)
    except ValueError as error:
        sentence = str(error)
    assert "\n" not in sentence


RECURRENT = {
    "input_size": 4,
    "hidden_size": 4,
    "bias": True,
    "batch_first": True,
    "dropout": 0.0,
    "bidirectional": False,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["nodes"][1].update(op="call_function", target="os.system"), "not registered"),
        (lambda r: r["nodes"][0].update(target="x=__import__('os')"), "bad name"),
        (lambda r: r["nodes"][1].update(name="x\ny"), "bad name"),
        (lambda r: r.update(version=2), "its version is 2, expected 1"),
        (lambda r: r.update({"class": "A\nB"}), "bad name"),
        (lambda r: r["modules"]["stem"].update(type="Module"), "unknown"),
        (lambda r: r["modules"]["stem"]["fields"].update(in_features=2**50), "does not fit|built"),
        (lambda r: r["modules"]["stem"]["fields"].update(in_features=6), "does not fit"),
        (lambda r: r["modules"]["stem"]["fields"].update(bias="no"), "has bias = 'no'"),
        (
            lambda r: r["modules"].update(
                stem={"type": "GRU", "fields": {**RECURRENT, "num_layers": 10**9}}
            ),
            "has num_layers = 1000000000",
        ),
        (lambda r: r["modules"].update({"a.forward": r["modules"]["stem"]}), "part of nn.Module"),
        (lambda r: r["modules"].update({"stem.a": r["modules"]["stem"]}), "inside a module"),
        (lambda r: r["tensors"]["stem.bias"].update(shape=[2**50]), "another shape"),
        (lambda r: r["tensors"]["stem.weight"].update(strides=[0, 0]), "strides"),
        (lambda r: r["tensors"]["stem.weight"].update(stored="stem.bias"), "another shape"),
        (lambda r: r["tensors"].update({"free": r["tensors"]["stem.bias"]}), "never used"),
        (lambda r: r["tensors"].pop("stem.bias"), "not those of its recipe"),
        (lambda r: r["checksums"].update({"stem.bias": 1}), "'stem.bias' is damaged"),
        (lambda r: r["modules"].update(free={"type": "Tanh", "fields": {}}), "never called"),
        (lambda r: r["nodes"].pop(), "one output"),
        (lambda r: r["nodes"].pop(1), "unknown node"),
    ],
)
def test_each_lie_has_its_sentence(saved: bytes, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    recipe = _recipe(saved)
    change(recipe)
    with pytest.raises(ValueError, match=message):
        _load(_with_recipe(saved, recipe), tmp_path)


def test_attribute_access_cannot_leave_the_tensor(saved: bytes, tmp_path: Path) -> None:
    recipe = _recipe(saved)
    recipe["nodes"][1] |= {  # type: ignore[index]
        "op": "call_function",
        "target": "getattr",
        "args": {"tuple": [{"node": "x"}, "__class__"]},
    }
    with pytest.raises(ValueError, match=r"attribute .*__class__.* is not registered"):
        _load(_with_recipe(saved, recipe), tmp_path)


def test_nothing_is_allocated_for_a_lie(saved: bytes, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    recipe = _recipe(saved)
    recipe["nodes"][-1]["args"] = {"tuple": []}  # type: ignore[index]
    monkeypatch.setattr(saving, "_crc32", lambda _: pytest.fail("tensors were read"))
    with pytest.raises(ValueError, match="output is malformed"):
        _load(_with_recipe(saved, recipe), tmp_path)


def test_deeply_nested_recipe(saved: bytes, tmp_path: Path) -> None:
    header, body = _split(saved)
    text = "[" * 100_000
    header["__metadata__"] |= {"recipe": text, "crc32": str(zlib.crc32(text.encode()))}  # type: ignore[operator]
    with pytest.raises(ValueError, match="cannot be loaded"):
        _load(_join(header, body), tmp_path)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_folded(tmp_path / "none")
    from safetensors.torch import save

    with pytest.raises(ValueError, match="its format is not"):
        _load(save({"a": torch.zeros(2)}), tmp_path)
