"""The console script: where memory comes in huge pages only on request, the command begins by requesting them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLES = "GLIBC_TUNABLES"  # read by glibc when a process starts, and not again


def main() -> None:
    """`mmrm COMMAND ...`: see `cli.main`, which nothing is imported for before this is settled."""
    if (environment := with_huge_pages(os.environ)) is not None:
        os.execve(sys.executable, sys.orig_argv, environment)
    from mmrm_jax.cli import main as command

    command()


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment that asks glibc for transparent huge pages, or None where that changes nothing.

    XLA's CPU client asks for a step's buffers anew in every step, and page by page the system takes as long to give
    them out as a fifth of a small model's step. None too where the variable is set: then someone has chosen.
    """
    if TUNABLES in environment or not sys.orig_argv:
        return None
    try:
        on_request = "[madvise]" in HUGE_PAGES.read_text()
    except OSError:
        return None
    return {**environment, TUNABLES: "glibc.malloc.hugetlb=1"} if on_request else None
