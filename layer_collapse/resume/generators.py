"""The states of the generators that a training loop draws from: torch's, Python's, numpy's."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["random_state", "random_state_setter"]

_WORDS = 624  # of a Mersenne twister


def random_state() -> dict[str, Tensor]:
    """Of this process: CPU, the current CUDA device if any, ``random``, ``numpy.random``."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    _, words, spare = random.getstate()
    state["python"] = torch.tensor(words, dtype=torch.int64)
    state["python_spare"] = _optional(spare is not None, spare or 0.0)
    twister = np.random.get_state(legacy=False)
    words = twister["state"]["key"].astype(np.int64)  # type: ignore[call-overload,index]
    state["numpy"] = torch.tensor([*words, twister["state"]["pos"]])  # type: ignore[call-overload,index]
    state["numpy_spare"] = _optional(bool(twister["has_gauss"]), twister["gauss"])  # type: ignore[call-overload]
    return state


def random_state_setter(state: Mapping[str, Tensor]) -> Callable[[], None]:
    """What sets every generator to ``state``; nothing is set before all of it was checked.

    Raises:
        ValueError: it is no :func:`random_state`.
    """
    expected = {name: (t.shape, t.dtype) for name, t in random_state().items()}
    given = {name: (t.shape, t.dtype) for name, t in state.items()}
    if "cuda" in given and "cuda" not in expected:
        given.pop("cuda")
    if given != expected:
        raise ValueError("the states of the random generators are not those of this machine")
    for name in ("python", "numpy"):
        words = state[name]
        if not (((words >= 0) & (words < 2**32)).all() and words[-1] <= _WORDS):
            raise ValueError(f"the state of the random generator {name!r} is malformed")
    trial = torch.Generator()
    try:
        trial.set_state(state["torch"])
    except RuntimeError as error:
        raise ValueError("the state of torch's random generator is malformed") from error

    def set_all() -> None:
        torch.set_rng_state(state["torch"])
        if "cuda" in expected:
            torch.cuda.set_rng_state(state["cuda"])
        has, spare = state["python_spare"].tolist()
        random.setstate((3, tuple(state["python"].tolist()), spare if has else None))
        words = state["numpy"].numpy()
        has, spare = state["numpy_spare"].tolist()
        np.random.set_state(
            ("MT19937", words[:-1].astype(np.uint32), int(words[-1]), int(has), spare)
        )

    return set_all


def _optional(has: bool, value: float) -> Tensor:
    return torch.tensor([float(has), value], dtype=torch.float64)
