"""One writer to a folder."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from entroflow.errors import InputError
from entroflow.writing import (
    PART,
    host_and_process,
    is_dead,
    not_written,
    remove_parts,
    this_process,
)

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Failures of file systems that have no locks, as some that are shared over a network."""


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Within, no other process is so about the same folder, which is made where it is missing.

    What a process that was killed had begun to write there is removed.

    Raises:
        InputError: another process is, or `folder` is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder} can't be made: a file is there; choose another.") from None
    except OSError as error:
        raise not_written(folder, error.errno, error.strerror) from error
    with _locked(folder):
        remove_parts(folder.glob(f".*{PART}"))
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"another process is writing into {folder}.") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise not_written(folder, error.errno, error.strerror, folder) from error
        log.warning(
            "%s is on a file system without locks (%s); the file .owner there keeps other "
            "processes out.",
            folder, str(error),
        )  # fmt: skip
        with _owned(folder):
            yield
        return
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Within, a file in the folder names this process, unless it names another that is alive."""
    owner = folder / ".owner"
    if owner.exists():
        name = owner.read_text(encoding="utf-8", errors="replace").strip()
        if not is_dead(*host_and_process(name)):
            raise InputError(
                f"another process is writing into {folder} ({name or 'it has no name'}); if that "
                f"is over, remove {owner}."
            )
        owner.unlink(missing_ok=True)
    try:
        with owner.open("x", encoding="utf-8") as file:
            file.write(this_process())
    except FileExistsError:
        raise InputError(f"another process is writing into {folder}.") from None
    except OSError as error:
        raise not_written(folder, error.errno, error.strerror, folder) from error
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
