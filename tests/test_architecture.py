"""Rules about the source itself: which layer imports which, what runs on a bare accelerator box, file sizes."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "mmrm_jax"
MAX_LINES = 450

# A layer may import the layers below it and itself. Those on one line do not know each other, except in the first,
# the foundation. The package's own __init__ belongs to the foundation: importing anything runs it.
LAYERS = (
    ("__init__", "types", "config", "model_config", "sharding", "distributed", "signals", "files"),
    ("data", "models", "objectives"),
    ("train",),
    ("tiny", "plan"),
    ("eval",),
    ("serve", "audit", "ablate", "bench"),
    ("cli_args",),
    ("cli",),
    ("start",),
)
RANK = {layer: rank for rank, layers in enumerate(LAYERS) for layer in layers}

# What must import on a machine that has nothing but these, with everything it imports in turn.
PORTABLE_ROOTS = ("models", "objectives", "train/step.py")
PORTABLE_LAYERS = frozenset(LAYERS[0]) | {"models", "objectives", "train"}
PORTABLE_LIBRARIES = frozenset({"jax", "flax", "optax", "numpy", "jaxtyping"})
PORTABLE_EXTRA = {"models/hf": frozenset({"safetensors"}), "models/lora.py": frozenset({"qwix"})}

UNSAFE_MODULES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib"})
UNSAFE_ARGUMENTS = frozenset({"trust_remote_code", "allow_pickle"})

Imports = list[tuple[int, str]]  # (line, absolute dotted name)


def read_imports(path: Path, package: Path) -> Imports:
    """Every import of a file, inside functions too, as absolute names; `from m import n` gives m.n."""
    found: Imports = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = path.relative_to(package.parent).parts[: -node.level]
                base = ".".join([*parents, *([base] if base else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def project_files(name: str, package: Path) -> list[Path]:
    """The package's files that importing `name` runs: the module and the __init__ of each package above it."""
    parts = name.split(".")
    if parts[0] != package.name:
        return []
    files, folder = [package / "__init__.py"], package
    for part in parts[1:]:
        if (folder / f"{part}.py").is_file():
            return [*files, folder / f"{part}.py"]
        folder /= part
        files.append(folder / "__init__.py")
    return [file for file in files if file.is_file()]


def layer_of(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def direction_violations(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        layer = layer_of(path, package)
        if layer not in RANK:
            yield f"{path}:1: '{layer}' has no layer; give it a place in LAYERS"
            continue
        for line, name in read_imports(path, package):
            files = project_files(name, package)
            if not files:
                continue
            other = layer_of(files[-1], package)
            allowed = other == layer or other == "__init__" or RANK.get(other, len(LAYERS)) < RANK[layer]
            if not allowed and not RANK.get(other) == RANK[layer] == 0:
                yield f"{path}:{line}: '{layer}' must not import '{other}' ({name})"


def portable_violations(package: Path) -> Iterator[str]:
    roots = [package / root for root in PORTABLE_ROOTS]
    waiting = [file for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("*.py")))]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        relative = path.relative_to(package).as_posix()
        if layer_of(path, package) not in PORTABLE_LAYERS:
            continue  # reported where it is imported
        extra = frozenset().union(*(libs for prefix, libs in PORTABLE_EXTRA.items() if relative.startswith(prefix)))
        for line, name in read_imports(path, package):
            library = name.split(".")[0]
            files = project_files(name, package)
            if files and layer_of(files[-1], package) not in PORTABLE_LAYERS:
                yield f"{path}:{line}: accelerator code reaches {name}, which needs more than an accelerator has"
            elif not files and library not in PORTABLE_LIBRARIES | extra | sys.stdlib_module_names:
                yield f"{path}:{line}: accelerator code must not import '{library}'"
            waiting += [file for file in files if file not in seen]
            seen.update(files)


def safety_violations(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        for line, name in read_imports(path, package):
            if name.split(".")[0] in UNSAFE_MODULES:
                yield f"{path}:{line}: '{name}' can run code that data brings"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.keyword) and node.arg in UNSAFE_ARGUMENTS):
                continue
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield f"{path}:{node.value.lineno}: {node.arg} must stay False"


def size_violations(folders: list[Path]) -> Iterator[str]:
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            yield f"{path}:{lines}: {lines} lines, {MAX_LINES} at most; split it by what changes together"


def test_imports_point_down() -> None:
    violations = list(direction_violations(PACKAGE))
    assert not violations, "\n".join(violations)


def test_models_objectives_and_step_need_only_accelerator_libraries() -> None:
    violations = sorted(set(portable_violations(PACKAGE)))
    assert not violations, "\n".join(violations)


def test_nothing_unpickles_or_runs_remote_code() -> None:
    violations = list(safety_violations(PACKAGE))
    assert not violations, "\n".join(violations)


def test_files_stay_small() -> None:
    folders = [REPOSITORY / name for name in ("mmrm_jax", "configs", "launch", "benchmarks", "tests")]
    violations = list(size_violations(folders))
    assert not violations, "\n".join(violations)


# The rules themselves, on a planted package: each entry is one file and the one violation it should give.

GOOD = {
    "__init__.py": '__version__ = "0"',
    "types.py": "import jax",
    "config.py": "from mmrm_jax.types import Batch",
    "data/__init__.py": "",
    "data/pipeline.py": "import grain\nfrom mmrm_jax import types\nfrom . import __name__",
    "models/__init__.py": "from .reward import score",
    "models/reward.py": "import flax.nnx\nfrom ..types import Batch\nfrom mmrm_jax import __version__",
    "models/hf/__init__.py": "import safetensors.numpy",
    "objectives/__init__.py": "",
    "train/__init__.py": "",
    "train/state.py": "import optax",
    "train/step.py": "from mmrm_jax.train.state import State\nfrom mmrm_jax.models import reward",
    "train/loop.py": "import rich\nimport mmrm_jax.data.pipeline\nfrom mmrm_jax.train import step",
    "tiny/recipe.py": "from mmrm_jax.train import loop",
    "cli.py": "def main():\n    import mmrm_jax.tiny.recipe",
}


def plant(folder: Path, changes: dict[str, str]) -> Path:
    package = folder / "mmrm_jax"
    for name, text in (GOOD | changes).items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    return package


def test_a_planted_package_that_keeps_the_rules_passes(tmp_path: Path) -> None:
    package = plant(tmp_path, {})
    assert not [*direction_violations(package), *portable_violations(package), *safety_violations(package)]


@pytest.mark.parametrize(
    ("file", "text", "line", "message"),
    [
        ("types.py", "import jax\nfrom mmrm_jax.train import step", 2, "'types' must not import 'train'"),
        ("models/reward.py", "import mmrm_jax.data.pipeline", 1, "'models' must not import 'data'"),
        ("data/pipeline.py", "def f():\n    from mmrm_jax import models", 2, "'data' must not import 'models'"),
        ("data/pipeline.py", "from ..objectives import loss", 1, "'data' must not import 'objectives'"),
        ("train/loop.py", "from mmrm_jax.tiny import recipe", 1, "'train' must not import 'tiny'"),
        ("tiny/recipe.py", "from .. import cli", 1, "'tiny' must not import 'cli'"),
        ("extras.py", "", 1, "'extras' has no layer"),
    ],
)
def test_import_direction_is_checked(tmp_path: Path, file: str, text: str, line: int, message: str) -> None:
    package = plant(tmp_path, {file: text})
    (violation,) = direction_violations(package)
    assert violation.startswith(f"{package / file}:{line}: {message}")


@pytest.mark.parametrize(
    ("file", "text", "line", "message"),
    [
        ("models/reward.py", "import os\nimport rich.table", 2, "accelerator code must not import 'rich'"),
        ("models/reward.py", "import safetensors", 1, "accelerator code must not import 'safetensors'"),
        ("config.py", "import tyro", 1, "accelerator code must not import 'tyro'"),
        ("train/__init__.py", "import orbax.checkpoint", 1, "accelerator code must not import 'orbax'"),
        ("train/state.py", "def f():\n    import mmrm_jax.data", 2, "accelerator code reaches mmrm_jax.data"),
        ("train/step.py", "from mmrm_jax.train import loop", 1, "accelerator code must not import 'rich'"),
    ],
)
def test_accelerator_libraries_are_checked(tmp_path: Path, file: str, text: str, line: int, message: str) -> None:
    # config is reached through models: an import that only models' dependencies make must count too.
    package = plant(tmp_path, {"models/__init__.py": "import mmrm_jax.config", file: text})
    violations = list(portable_violations(package))
    reported_in = "train/loop.py" if file == "train/step.py" else file
    assert any(v.startswith(f"{package / reported_in}:{line}: {message}") for v in violations), violations


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import pickle", "'pickle' can run code"),
        ("from joblib import load", "'joblib.load' can run code"),
        ("load(path, trust_remote_code=True)", "trust_remote_code must stay False"),
        ("load(path, allow_pickle=flag)", "allow_pickle must stay False"),
    ],
)
def test_unsafe_loading_is_checked(tmp_path: Path, text: str, message: str) -> None:
    package = plant(tmp_path, {"cli.py": f"\n{text}"})
    (violation,) = safety_violations(package)
    assert violation.startswith(f"{package / 'cli.py'}:2: {message}")


@pytest.mark.parametrize(("lines", "count"), [(MAX_LINES, 0), (MAX_LINES + 1, 1)])
def test_file_size_is_checked(tmp_path: Path, lines: int, count: int) -> None:
    (tmp_path / "long.py").write_text("x = 1\n" * lines, encoding="utf-8")
    assert len(list(size_violations([tmp_path]))) == count
