"""The wheel holds the whole package, its data files and its licence, and nothing else."""

from __future__ import annotations

import configparser
import email.message
import email.parser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mmrm_jax

REPOSITORY = Path(__file__).resolve().parents[1]
METADATA = f"mmrm_jax-{mmrm_jax.__version__}.dist-info"
MAX_MEGABYTES = 20  # the tiny pretrained model is a few


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The build back end itself, for the usual front ends fetch it from the network first.
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def read_metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.parser.BytesParser().parsebytes(archive.read(f"{METADATA}/METADATA"))


def test_wheel_holds_every_file_of_the_package(names: set[str]) -> None:
    package = REPOSITORY / "mmrm_jax"
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected = {path.relative_to(REPOSITORY).as_posix() for path in files}
    assert {name for name in names if name.startswith("mmrm_jax/")} == expected


def test_wheel_holds_nothing_beside_the_package(wheel: Path, names: set[str]) -> None:
    assert {name.split("/")[0] for name in names} == {"mmrm_jax", METADATA}
    assert wheel.stat().st_size < MAX_MEGABYTES * 1024**2


def test_wheel_holds_the_tiny_model(names: set[str]) -> None:
    model = {f"mmrm_jax/tiny/model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert model <= names


def test_wheel_names_its_licence_version_and_command(wheel: Path, names: set[str]) -> None:
    metadata = read_metadata(wheel)
    assert metadata["Name"] == "mmrm-jax"
    assert metadata["Version"] == mmrm_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{METADATA}/licenses/LICENSE" in names
    scripts = configparser.ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        scripts.read_string(archive.read(f"{METADATA}/entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"mmrm": "mmrm_jax.start:main"}


def test_every_dependency_has_a_lower_and_an_upper_bound(wheel: Path) -> None:
    requirements = read_metadata(wheel).get_all("Requires-Dist", [])
    assert len(requirements) > 10
    unbounded = [r for r in requirements if not (">=" in r.split(";")[0] and "<" in r.split(";")[0])]
    assert not unbounded
