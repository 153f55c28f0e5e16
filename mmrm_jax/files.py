"""Files that several commands may meet: written whole or not at all, and locks on what one command is to have alone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mmrm_jax.distributed import any_process, is_main

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of a file system that has none, as Lustre may be mounted


class InUse(RuntimeError):
    """Another command is at work in a folder."""


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that whoever is killed meanwhile leaves the old one or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@contextlib.contextmanager
def alone(folder: Path, name: str, work: str) -> Iterator[None]:
    """No second command in `folder`, which is made, meanwhile: the main process locks the file `name` in it.

    The lock ends with the process, however that ends; a folder in which nothing came of it is gone. Raises InUse in
    every process where another command holds it; `work` is what that is doing.
    """
    new = is_main() and not folder.exists()
    lock = _locked(folder, name) if is_main() else None
    with lock or contextlib.nullcontext(), _removed_if_unused(folder, name) if new else contextlib.nullcontext():
        if any_process(is_main() and lock is None):
            raise InUse(
                f"{folder} is in use: another command {work}; wait until it has ended, or give --out another name"
            )
        yield


@contextlib.contextmanager
def _removed_if_unused(folder: Path, name: str) -> Iterator[None]:
    """Remove the folder afterwards where it holds nothing but its lock."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if [path.name for path in folder.iterdir()] == [name]:
                (folder / name).unlink()
                folder.rmdir()


def _locked(folder: Path, name: str) -> TextIO | None:
    """The lock, held until it is closed; None where another command holds it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened, contextlib.suppress(FileNotFoundError):
            lock = opened.enter_context((folder / name).open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            # The other command may have ended just now, and its folder with it: then this is the lock of nothing.
            if os.path.samestat(os.fstat(lock.fileno()), (folder / name).stat()):
                opened.pop_all()
                return lock
