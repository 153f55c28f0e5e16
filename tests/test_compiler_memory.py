"""What compiling leaves of memory is handed back, after long compilations alone and while it is asked for."""

from __future__ import annotations

import types

import jax
import pytest

from mmrm_jax.train import compiling
from mmrm_jax.train.compiling import COMPILED, LONG, compilations_heard, compiler_memory_released


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The arguments of every call of glibc's `malloc_trim`, which is not made."""
    calls: list[int] = []
    monkeypatch.setattr(compiling.sys, "platform", "linux")
    monkeypatch.setattr(compiling.ctypes, "CDLL", lambda _: types.SimpleNamespace(malloc_trim=calls.append))
    return calls


def test_long_compilations_are_followed_by_one_trim_each(trims: list[int]) -> None:
    with compiler_memory_released():
        jax.monitoring.record_event_duration_secs(COMPILED, LONG / 2)
        jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 2 * LONG)
        assert trims == []
        jax.monitoring.record_event_duration_secs(COMPILED, 2 * LONG, fun_name="step")
        assert trims == [0]
    jax.monitoring.record_event_duration_secs(COMPILED, 2 * LONG)
    assert trims == [0]


def test_an_error_ends_it_too(trims: list[int]) -> None:
    with pytest.raises(RuntimeError, match="out of data"), compiler_memory_released():
        raise RuntimeError("out of data")
    jax.monitoring.record_event_duration_secs(COMPILED, 2 * LONG)
    assert trims == []


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.ctypes, "CDLL", lambda _: types.SimpleNamespace())
    with compiler_memory_released():
        jax.monitoring.record_event_duration_secs(COMPILED, 2 * LONG)


def test_what_is_watched_is_what_jax_reports() -> None:
    """The event's name is JAX's own, which may change with its version."""
    seconds: list[float] = []
    with compilations_heard(seconds.append):
        jax.jit(lambda x: x * 2 + 17).lower(1.0).compile()
    assert len(seconds) == 1
    assert seconds[0] > 0
