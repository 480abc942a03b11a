"""Packed masks: numpy in, numpy out."""

from __future__ import annotations

import numpy as np
import pytest
import torch  # noqa: F401 - loads the libraries that the native module needs
from hypothesis import given
from hypothesis import strategies as st

from layer_collapse import _C


@given(st.lists(st.booleans(), max_size=100))
def test_round_trip(bits):
    alive = np.array(bits, dtype=bool)
    words = _C.pack_mask(alive)
    assert words.dtype == np.int32
    assert words.shape == (-(-len(bits) // 32),)
    np.testing.assert_array_equal(_C.unpack_mask(words, len(bits)), alive)
    assert _C.count_alive(words) == alive.sum()


def test_bit_order():
    alive = np.zeros(70, dtype=bool)
    alive[[0, 33, 69]] = True
    assert _C.pack_mask(alive).tolist() == [1, 2, 1 << 5]


@pytest.mark.parametrize("count", [31, 32, 33])
def test_bits_beyond_n_are_zero(count):
    words = _C.pack_mask(np.ones(count, dtype=bool)).view(np.uint32)
    assert sum(int(word).bit_count() for word in words) == count


def test_strided_input():
    alive = np.array([True, False, False, False] * 20)
    np.testing.assert_array_equal(_C.pack_mask(alive[::2]), _C.pack_mask(alive[::2].copy()))


@pytest.mark.parametrize("wrong", [np.zeros(3), np.zeros((2, 2), dtype=bool)])
def test_pack_refuses(wrong):
    with pytest.raises(RuntimeError, match=r"pack_mask: alive must be a one-dimensional bool"):
        _C.pack_mask(wrong)


@pytest.mark.parametrize(
    ("words", "count"), [([1], 33), ([1, 0], 32), ([1], 0), ([], 1), ([1], -1)]
)
def test_unpack_refuses_sizes(words, count):
    with pytest.raises(RuntimeError, match=r"unpack_mask: words must number ceil\(n / 32\)"):
        _C.unpack_mask(np.array(words, dtype=np.int32), count)


def test_unpack_refuses_stray_bits():
    with pytest.raises(RuntimeError, match=r"unpack_mask: words must have no bit set beyond the 3"):
        _C.unpack_mask(np.array([8], dtype=np.int32), 3)


@pytest.mark.parametrize(
    "wrong", [np.zeros(2), np.zeros((1, 2), dtype=np.int32), np.zeros(4, dtype=np.int32)[::2]]
)
def test_words_refused(wrong):
    with pytest.raises(RuntimeError, match=r"count_alive: words must be a contiguous"):
        _C.count_alive(wrong)
