"""What the console script does before the command: ask for huge pages, once, where that changes anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmrm_jax import __version__, start

ASKED = "glibc.malloc.hugetlb=1"


def has(tmp_path: Path, text: str) -> Path:
    (tmp_path / "enabled").write_text(text)
    return tmp_path / "enabled"


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        ("always [madvise] never\n", {"A": "1"}, {"A": "1", start.TUNABLES: ASKED}),
        ("always [madvise] never\n", {start.TUNABLES: ""}, None),
        ("[always] madvise never\n", {}, None),
        ("always madvise [never]\n", {}, None),
    ],
)
def test_huge_pages_are_asked_for_where_they_come_on_request(
    monkeypatch, tmp_path: Path, setting: str, environment: dict, expected: dict | None
) -> None:
    monkeypatch.setattr(start, "HUGE_PAGES", has(tmp_path, setting))
    assert start.with_huge_pages(environment) == expected
    monkeypatch.setattr(start, "HUGE_PAGES", tmp_path / "not Linux")
    assert start.with_huge_pages(environment) is None


def test_a_command_begins_again_once_with_all_its_arguments(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib, mmrm_jax.start as s\n"
        f"s.HUGE_PAGES = pathlib.Path({str(has(tmp_path, '[madvise]'))!r})\n"
        "print(os.getpid(), os.environ.get(s.TUNABLES), sys.argv[1:], 'jax' in sys.modules, flush=True)\n"
        "s.main()"
    )
    environment = {k: v for k, v in os.environ.items() if k != start.TUNABLES}
    command = subprocess.Popen(
        [sys.executable, "-c", program, "--version"], env=environment, stdout=subprocess.PIPE, text=True
    )
    printed = command.communicate()[0].splitlines()
    assert printed[:2] == [f"{command.pid} {asked} ['--version'] False" for asked in (None, ASKED)]
    assert len(printed) == 3 and __version__ in printed[2] and command.returncode == 0
