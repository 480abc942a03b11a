"""Files as an accident or a forger would leave them, each from one number."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

_NUMBERS = [0, 1, -1, 2, 3, 7, 255, 10**9, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, -(2**63)]
_NUMBERS += [0.5, -0.0, 1e308]
_TEXTS = ["", "x", "a.b", "forward", "__class__", "os.system", "a b", "1;import os", "\u00e9", "\n"]
_TEXTS += ["call_function", "call_method", "call_module", "get_attr", "placeholder", "output"]
_TEXTS += ["getattr", "self", "None", "torch.full", "operator.matmul", "float64", "F64", "cuda:99"]
_TEXTS += ["\ud800", "a" * 5000, ".".join("a" * 3000), "../../x", "weight", "0", "BOOL", "C64"]


def _deep(draw: random.Random) -> Any:
    depth, kind = draw.choice([50, 150, 300, 900, 5000]), draw.choice(["list", "tuple", "dict"])
    value: Any = 1
    for _ in range(depth):
        value = {kind: {"a": value} if kind == "dict" else [value]}
    return value


def _value(draw: random.Random) -> Any:
    return draw.choice(
        [
            lambda: draw.choice(_NUMBERS),
            lambda: draw.choice(_NUMBERS),
            lambda: draw.choice(_TEXTS),
            lambda: draw.choice([None, True, False, [], {}, [[]], {"a": {}}]),
            lambda: [draw.choice(_NUMBERS) for _ in range(draw.choice([1, 2, 3, 4, 1000]))],
            lambda: {"tuple": [draw.choice(_NUMBERS) for _ in range(draw.randint(0, 5))]},
            lambda: {draw.choice(["node", "dtype", "float", "device", "tensor"]): _text(draw)},
            lambda: {"slice": [draw.choice(_NUMBERS) for _ in range(draw.randint(2, 4))]},
            lambda: _deep(draw),
        ]
    )()


def _text(draw: random.Random) -> str:
    return draw.choice(_TEXTS)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every holder and key inside a JSON value; without recursion, for it may be deep."""
    found, left = [], [value]
    while left:
        holder = left.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                left.append(holder[key])
    return found


def change_json(draw: random.Random, value: Any) -> Any:
    """1 to 4 edits at random places."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        places = _places(value)
        if not places:
            break
        holder, key = draw.choice(places)
        way = draw.randrange(7)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, dict):
            name = draw.choice([_text(draw), draw.choice(list(holder))])
            holder[name] = holder.pop(key)
        elif way == 2:
            other, other_key = draw.choice(places)  # two places swapped, maybe one in the other
            if other_key in (other if isinstance(other, dict) else range(len(other))):
                held = copy.deepcopy(holder[key]), copy.deepcopy(other[other_key])
                other[other_key], holder[key] = held
        elif way == 3 and isinstance(holder, list):
            holder.extend([copy.deepcopy(holder[key])] * draw.choice([1, 2, 500]))
        elif way == 4 and type(holder[key]) is int:
            holder[key] += draw.choice([-1, 1, 8])
        else:
            holder[key] = _value(draw)
    return value


def _dumped(value: Any) -> str:
    return json.dumps(value)


def _split(data: bytes) -> tuple[Any, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(header: Any, body: bytes) -> bytes:
    text = _dumped(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _flip(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8, 100])):
        end = draw.choice([16, 600, len(data)])
        changed[draw.randrange(min(end, len(data)))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(draw: random.Random, data: bytes) -> bytes:
    more = draw.randbytes(draw.choice([1, 8, 1000]))
    return draw.choice(
        [data[: draw.randrange(len(data))], data + more, more, data[8:], b"", data + data]
    )


def _length(draw: random.Random, data: bytes) -> bytes:
    lie = draw.choice([0, 1, 2, len(data), len(data) - 8, 10**8, 2**32, 2**63, 2**64 - 1])
    return struct.pack("<Q", lie) + data[8:]


def _header(draw: random.Random, data: bytes) -> bytes:
    """Names, shapes, dtypes and offsets."""
    header, body = _split(data)
    return _join(change_json(draw, header), body)


def _spread(draw: random.Random, data: bytes) -> bytes:
    """A consistent header over other bytes: shapes that claim much, or nothing in many dims."""
    header, body = _split(data)
    name = draw.choice([n for n in header if n != "__metadata__"])
    shape = header[name]["shape"]
    header[name]["shape"] = draw.choice(
        [
            shape[::-1],
            [1] * draw.choice([1, 30, 70]) + shape,
            [0, 2**61],
            [2**31, 2**31, 0],
            [0],
            [s * 2**33 for s in shape],
        ]
    )
    if 0 in header[name]["shape"]:
        header[name]["data_offsets"] = [0, 0]
    if draw.random() < 0.7:
        body = body[: max(v["data_offsets"][1] for n, v in header.items() if n != "__metadata__")]
    return _join(header, body)


def _inner(draw: random.Random, data: bytes) -> bytes:
    """The JSON inside the header: a recipe, with the right checksum; or a checkpoint's."""
    header, body = _split(data)
    meta = header["__metadata__"]
    key = draw.choice([k for k in meta if meta[k][:1] in "{["])
    text = _dumped(change_json(draw, json.loads(meta[key])))
    if draw.random() < 0.05:
        text = draw.choice(["[" * 10**5, '{"a":' * 10**4, "[" + "[]," * 10**5 + "[]]", "null", ""])
    meta[key] = text
    if "crc32" in meta and draw.random() < 0.95:
        meta["crc32"] = str(zlib.crc32(text.encode(errors="surrogatepass")))
    return _join(header, body)


WAYS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(_flip, _cut, _length, _header, _spread),
    *(_inner, _inner, _inner, _inner, _inner, _inner),
)


def mutated(draw: random.Random, data: bytes) -> bytes:
    """A safetensors file with JSON in its metadata, changed in one way."""
    ways = WAYS if b"__metadata__" in data and b'{\\"' in data else WAYS[:5]
    return draw.choice(ways)(draw, data)
