"""The harness itself sees bugs, and the kernels have no races."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import harness_build as build
import pytest

#: bug -> (how it is compiled, what the process says before it fails)
BUGS = {
    "missing_barrier": ("address", "wrong results with schedule"),
    "divergent_barrier": ("address", "a barrier reached at two places"),
    "early_return": ("address", "while others wait for it"),
    "wrong_shuffle_mask": ("address", "lanes that disagree on a warp collective"),
    "misaligned_access": ("address", "misaligned address"),
    "out_of_bounds": ("address", "heap-buffer-overflow"),
    "shared_out_of_bounds": ("address", "out of bounds for type"),
    "lost_atomic": ("thread", "data race"),
    "missing_barrier, by race": ("thread", "data race"),
}
FLAGS = {"address": build.ADDRESS, "thread": build.THREAD}


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # setarch: ThreadSanitizer needs the addresses that it knows
    return subprocess.run(
        ["setarch", "-R", str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "LD_PRELOAD": "", "TSAN_OPTIONS": "halt_on_error=1"},
    )


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str) -> None:
    how, sentence = BUGS[bug]
    program = build.program(build.HERE / "planted.cpp", *FLAGS[how])
    # A race is seen when it happens; on a busy machine threads may follow one another by chance.
    for _ in range(10 if how == "thread" else 1):
        result = run(program, bug.split(",")[0])
        if result.returncode != 0:
            break
    assert result.returncode != 0
    assert sentence in result.stderr + result.stdout


@pytest.mark.parametrize("how", FLAGS)
def test_nothing_is_caught_where_nothing_is_planted(how: str) -> None:
    result = run(build.program(build.HERE / "planted.cpp", *FLAGS[how]), "none")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.fixture(scope="session")
def large() -> Path:
    return build.program(build.HERE / "large.cpp", *build.ADDRESS, *build.SHARED)


@pytest.fixture(scope="session")
def races() -> Path:
    return build.program(build.HERE / "races.cpp", *build.THREAD)


def test_places_beyond_32_bits_and_places_that_are_nobodys(large: Path) -> None:
    result = run(large)
    assert (result.returncode, result.stderr) == (0, "")


def test_no_kernel_has_a_race(races: Path) -> None:
    result = run(races)
    assert (result.returncode, result.stderr) == (0, "")
