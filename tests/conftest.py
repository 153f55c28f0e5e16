"""The test session: eight fake CPU devices, run-time shape checks, one compilation cache for all workers."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest
from jaxtyping import install_import_hook

# JAX reads its environment once, when it is imported; the commands that tests start inherit it.
assert "jax" not in sys.modules, "jax was imported before tests/conftest.py could choose its devices"
DEVICES = 8
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
# Tiny models spend their time in the compiler, and results must not depend on what it optimises.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
QUICK_COMPILER = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def accepted(flags: str) -> bool:
    """Whether this XLA knows the flags: it aborts at one that it does not."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return not subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True).returncode


if "PYTEST_XDIST_WORKER" not in os.environ and accepted(QUICK_COMPILER):  # workers inherit it
    os.environ["XLA_FLAGS"] += " " + QUICK_COMPILER

# Shapes and dtypes in annotations are checked at every call, in tests only.
install_import_hook(["mmrm_jax.models", "mmrm_jax.objectives"], "beartype.beartype")

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def pytest_configure(config: pytest.Config) -> None:
    """Let the workers of one session, and the commands they start, share what they compile."""
    # Flax's State, checked at run time, is generic over the typing.Hashable that beartype calls deprecated.
    config.addinivalue_line("filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")
    if hasattr(config, "workerinput"):  # an xdist worker inherits the environment of the session that started it
        return
    cache = tempfile.mkdtemp(prefix="mmrm-test-cache-")
    os.environ[CACHE_VARIABLE] = cache
    # JAX locks the cache only where it has a maximum size; without the lock a worker can read a half-written entry.
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(4 * 1024**3)
    # Most of what tests compile takes less than the second from which on JAX would keep it.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what was imported to itself: tracing makes many objects, and searches for garbage would go through it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """One device for a file's commands, as on a laptop: what is compiled for eight takes longer to compile and to run.

    For files that say nothing of devices; processes that they start see one, too.
    """
    with first_device_alone():
        yield


@pytest.fixture
def its_own_device() -> Iterator[None]:
    """The same for one test of a file whose others need several."""
    with first_device_alone():
        yield


@contextlib.contextmanager
def first_device_alone() -> Iterator[None]:
    import jax

    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: first)
        patch.setattr(jax, "local_devices", lambda *_: first)
        patch.setattr(jax, "device_count", lambda *_: 1)
        patch.setattr(jax, "local_device_count", lambda *_: 1)
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace(f"device_count={DEVICES}", "device_count=1"))
        yield


@pytest.fixture
def strict_numerics() -> Iterator[None]:
    """Raise where dtypes or ranks are promoted implicitly: our own code must not, libraries may."""
    import jax

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("strict"))
        stack.enter_context(jax.numpy_rank_promotion("raise"))
        yield
