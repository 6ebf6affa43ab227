"""Files and folders that appear whole or not at all, and what is said where they can't."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from entroflow.errors import InputError

PART = ".part"
"""Ending of what is being written."""


DENIED, FULL, OF_DISKS = (
    (errno.EACCES, errno.EPERM), (errno.ENOSPC, errno.EDQUOT),
    (errno.EFBIG, errno.EIO, errno.EROFS),
)  # fmt: skip
"""Failures of writing: it is not allowed, nothing more fits, and others."""


class WriteError(InputError):
    """A file or folder can't be written; the message says which, why, and what to do."""

    path: Path
    number: int | None = None
    reason: str = ""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, `path` is written, for a while under a hidden name: failures name `path` alone.

    Raises:
        WriteError: it can't be written.
    """
    try:
        yield
    except WriteError as error:
        if not _is_of(error.path, path):
            raise
        raise not_written(path, error.number, error.reason) from error
    except OSError as error:
        # Of a file that is open already, as when the disk is full, an error has no name.
        nameless = error.filename is None and error.errno in (*FULL, *OF_DISKS)
        if not nameless and not _is_of(error.filename, path):
            raise
        raise not_written(path, error.errno, error.strerror) from error
    except SafetensorError as error:
        if "deserializing" in str(error):
            raise
        # It says in words which failure of the system it was, if it was one.
        match = re.search(r"\(os error (\d+)\)", str(error))
        number = int(match[1]) if match else None
        reason = os.strerror(number) if number else str(error)
        raise not_written(path, number, reason) from error


def _is_of(name: Any, path: Path) -> bool:
    """Whether a name in a failure is that of `path`, its hidden one, or one within or around."""
    if not isinstance(name, str | bytes | Path):
        return False
    place, whole = (Path(os.path.abspath(os.fsdecode(each))) for each in (name, path))
    return place in whole.parents or any(map(place.is_relative_to, (whole, part_of(whole))))


def not_written(
    path: Path, number: int | None, reason: str | None, into: Path | None = None
) -> WriteError:
    """The error about `path`, which was to be written into its parent or `into` another folder."""
    folder = into or path.parent
    if folder == Path() or not os.path.isdir(folder):
        folder = next(each for each in path.absolute().parents if os.path.isdir(each))
    if number in DENIED:
        way_out = f"allow writing into {folder}, or choose a folder where you may write"
    elif number == errno.EROFS:
        way_out = "its file system is read-only; choose another folder"
    elif number in FULL:
        way_out = "free some space on the disk, or choose a folder on another one"
    elif number in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY):
        way_out = "something else is in its place; move that, or choose another folder"
    else:
        way_out = "choose another folder"
    error = WriteError(f"{path} can't be written ({reason}); {way_out}.")
    error.path, error.number, error.reason = path, number, reason or ""
    return error


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "-", socket.gethostname())


def this_process() -> str:
    """Name of this process among those of all machines."""
    return f"{_host()}-{os.getpid()}"


def host_and_process(name: str) -> tuple[str, int]:
    """Inverse of `this_process`; ("", 0) for another name."""
    host, _, number = name.rpartition("-")
    return (host, int(number)) if re.fullmatch(r"[0-9]{1,9}", number) else ("", 0)


def is_dead(host: str, process: int) -> bool:
    """Whether a process of this machine is over; of others that is not known."""
    if host != _host() or os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return process == os.getpid()


def part_of(path: Path) -> Path:
    """Where this process writes what is to become `path`."""
    return path.with_name(f".{path.name}.{this_process()}{PART}")


def remove_parts(parts: Iterable[Path]) -> None:
    """Remove what is unfinished in a folder that the caller holds, but for that of the living."""
    for part in parts:
        host, process = _writer_of(part)
        # A report is written by who does not hold the folder.
        living = host == _host() and not is_dead(host, process)
        if not living:
            _remove(part)


def _writer_of(part: Path) -> tuple[str, int]:
    return host_and_process(part.name.removesuffix(PART).rpartition(".")[2])


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
        return
    # Whoever may not remove it hears what matters when it is to be written anew.
    with suppress(OSError):
        part.unlink()


_CLEARED: set[Path] = set()
"""Folders that this process has written into."""


def _clear_once(folder: Path) -> None:
    """Remove what killed processes of this machine left unfinished in a folder of anybody's."""
    if folder in _CLEARED:
        return
    _CLEARED.add(folder)
    for part in folder.glob(f".*{PART}"):
        host, process = _writer_of(part)
        # What bears our number may be what another thread is writing.
        if process != os.getpid() and is_dead(host, process):
            _remove(part)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill; it appears under `out` when all is in it, or not at all.

    Raises:
        InputError: `out` is in use, or can't be written.
    """
    refuse_used(out)
    out = out.absolute()
    _clear_once(out.parent)
    made = part_of(out)
    shutil.rmtree(made, ignore_errors=True)
    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            made.mkdir()
            yield made
            settled(made)
            if out.exists():
                out.rmdir()
            made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def refuse_used(out: Path) -> None:
    """Refuse a place where something is.

    Raises:
        InputError: a file, or a folder that is not empty, is there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already; choose another folder.")


def write_text(path: Path, content: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part.

    Raises:
        WriteError: it can't be written.
    """
    write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for bytes."""
    _clear_once(path.parent)
    part = part_of(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink()


def to_json(content: Any, indent: int | None = None) -> str:
    """`content` as JSON, which knows neither NaN nor infinity: they become null."""
    return json.dumps(finite(content), indent=indent, allow_nan=False)


def finite(content: Any) -> Any:
    """`content` with None for every number that is not finite."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def settled(folder: Path) -> None:
    """Bring the files of a folder to disk, and let all read them who may read what is new there.

    safetensors lets nobody but the owner read what it writes.
    """
    usual = folder / ".usual"
    usual.touch()
    for file in (path for path in folder.rglob("*") if path.is_file()):
        shutil.copymode(usual, file)
        with file.open("rb") as written:
            os.fsync(written.fileno())
    usual.unlink()
