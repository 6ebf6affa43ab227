"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all.

Beside them `digests.json` holds the SHA-256 of every file, which whoever reads one compares.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from entroflow.errors import InputError
from entroflow.run_files import Contents, Progress, RunState, TRLState, read_object

log = logging.getLogger(__name__)

STATE_FILE, DIGESTS = "state.json", "digests.json"
TRAINER_STATE, PROGRESS = "trainer_state.json", "progress.json"
"""Of a language model: TRL's own state, and what else it takes to go on."""
PART = ".part"
"""Ending of what is being written."""
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What an optimizer keeps in the shape of a parameter."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Failures of file systems that have no locks, as some that are shared over a network."""


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
        raise _not_written(path, error.number, error.reason) from error
    except OSError as error:
        # Of a file that is open already, as when the disk is full, an error has no name.
        nameless = error.filename is None and error.errno in (*FULL, *OF_DISKS)
        if not nameless and not _is_of(error.filename, path):
            raise
        raise _not_written(path, error.errno, error.strerror) from error
    except SafetensorError as error:
        if "deserializing" in str(error):
            raise
        # It says in words which failure of the system it was, if it was one.
        match = re.search(r"\(os error (\d+)\)", str(error))
        number = int(match[1]) if match else None
        reason = os.strerror(number) if number else str(error)
        raise _not_written(path, number, reason) from error


def _is_of(name: Any, path: Path) -> bool:
    """Whether a name in a failure is that of `path`, its hidden one, or one within or around."""
    if not isinstance(name, str | bytes | Path):
        return False
    place, whole = (Path(os.path.abspath(os.fsdecode(each))) for each in (name, path))
    return place in whole.parents or any(map(place.is_relative_to, (whole, part_of(whole))))


def _not_written(
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


# --- one writer -----------------------------------------------------------------------------------


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
        raise _not_written(folder, error.errno, error.strerror) from error
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
            raise _not_written(folder, error.errno, error.strerror, folder) from error
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
        if not _is_dead(*_host_and_process(name)):
            raise InputError(
                f"another process is writing into {folder} ({name or 'it has no name'}); if that "
                f"is over, remove {owner}."
            )
        owner.unlink(missing_ok=True)
    try:
        with owner.open("x", encoding="utf-8") as file:
            file.write(_this_process())
    except FileExistsError:
        raise InputError(f"another process is writing into {folder}.") from None
    except OSError as error:
        raise _not_written(folder, error.errno, error.strerror, folder) from error
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "-", socket.gethostname())


def _this_process() -> str:
    return f"{_host()}-{os.getpid()}"


def _host_and_process(name: str) -> tuple[str, int]:
    """Inverse of `_this_process`; ("", 0) for another name."""
    host, _, number = name.rpartition("-")
    return (host, int(number)) if re.fullmatch(r"[0-9]{1,9}", number) else ("", 0)


def _is_dead(host: str, process: int) -> bool:
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


# --- files that appear whole or not at all --------------------------------------------------------


def part_of(path: Path) -> Path:
    """Where this process writes what is to become `path`."""
    return path.with_name(f".{path.name}.{_this_process()}{PART}")


def remove_parts(parts: Iterable[Path]) -> None:
    """Remove what is unfinished in a folder that the caller holds, but for that of the living."""
    for part in parts:
        host, process = _writer_of(part)
        # A report is written by who does not hold the folder.
        living = host == _host() and not _is_dead(host, process)
        if not living:
            _remove(part)


def _writer_of(part: Path) -> tuple[str, int]:
    return _host_and_process(part.name.removesuffix(PART).rpartition(".")[2])


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
        if process != os.getpid() and _is_dead(host, process):
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


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    """Write `folder` atomically: one safetensors file per entry of `tensors`, and `state.json`.

    A folder that already exists is replaced.

    Raises:
        WriteError: it can't be written.
    """
    part = part_of(folder)
    shutil.rmtree(part, ignore_errors=True)
    with writing(folder):
        part.mkdir(parents=True)
        for name, entries in tensors.items():
            plain = {key: value.detach().contiguous() for key, value in entries.items()}
            save_file(plain, part / f"{name}.safetensors")
        # Not `to_json`: a component must get back the NaN or infinity that it remembered.
        (part / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        write_digests(part)
        settled(part)
        outdated = folder.with_name(f".{folder.name}.old")
        if folder.exists():
            shutil.rmtree(outdated, ignore_errors=True)
            folder.replace(outdated)
        part.replace(folder)
    shutil.rmtree(outdated, ignore_errors=True)


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


# --- digests --------------------------------------------------------------------------------------


class Digests(Contents):
    """`digests.json`: by name of a file, the SHA-256 of its bytes."""

    sha256: dict[str, str]


def write_digests(folder: Path) -> None:
    """Write the digests of all files of a folder into it."""
    (folder / DIGESTS).unlink(missing_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    text = to_json({"sha256": digests}, indent=1) + "\n"
    (folder / DIGESTS).write_text(text, encoding="utf-8")


def check_digests(folder: Path) -> None:
    """Compare all files of a checkpoint with their digests.

    Of one without digests, which is warned of, the tensors are read.

    Raises:
        CheckpointError: one is missing, or not what was written.
    """
    digests = _digests(folder)
    for name in digests or ():
        _check_digest(folder / name, folder)
    if digests is None:
        _warn_of_none(folder)
        for path in sorted(folder.glob("*.safetensors")):
            read_tensors(path)


def _warn_of_none(folder: Path) -> None:
    log.warning(
        "%s has no %s, as those of older versions: what is damaged there may go unnoticed.",
        folder, DIGESTS,
    )  # fmt: skip


def _digests(folder: Path) -> dict[str, str] | None:
    """By name of a file; None in a folder without, as older versions wrote it, or others."""
    path = folder / DIGESTS
    if not path.exists():
        return None
    read = read_object(path, Digests, remedy=_remedy(folder), error=CheckpointError)
    digests: dict[str, str] = read["sha256"]
    return digests


def _check_digest(path: Path, folder: Path) -> None:
    digests = _digests(folder)
    if digests is None:
        return
    if not path.exists():
        raise CheckpointError(f"{path} is missing{_remedy(folder)}")
    try:
        digest = _digest(path)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}).") from None
    if digests.get(path.relative_to(folder).as_posix()) != digest:
        raise CheckpointError(
            f"{path} is torn (it is not what was written, by {DIGESTS}){_remedy(folder)}"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading --------------------------------------------------------------------------------------


def checkpoint_exists(folder: Path) -> bool:
    """Whether there is a checkpoint; one that a crash left half replaced is put back first."""
    outdated = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and outdated.exists():
        outdated.replace(folder)
    return folder.exists()


def read_state(folder: Path, kind: type[Contents] = Contents) -> dict[str, Any]:
    """The JSON state of a checkpoint.

    Args:
        kind: what it must hold.

    Raises:
        CheckpointError: missing or torn.
    """
    path = folder / STATE_FILE
    checkpoint_exists(folder)
    if not path.exists():
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {STATE_FILE}{_remedy(folder)}"
        )
    state = read_object(path, kind, remedy=_remedy(folder), error=CheckpointError)
    _check_digest(path, folder)
    return state


def read_run_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint of a run.

    Raises:
        CheckpointError: missing, torn, or in the place of another iteration's.
    """
    state = read_state(folder, RunState)
    if _digests(folder) is None:
        _warn_of_none(folder)
    if state["iteration"] != int(folder.name):
        raise CheckpointError(
            f"{folder} is of another iteration: {STATE_FILE} says {state['iteration']}"
            f"{_remedy(folder)}"
        )
    return state


OTHERWISE = "; restore it from a copy, or start a new run from the model."


def read_progress(folder: Path) -> dict[str, Any]:
    """`progress.json` of a checkpoint of a language model.

    Raises:
        CheckpointError: missing or torn.
    """
    return read_object(folder / PROGRESS, Progress, remedy=OTHERWISE, error=CheckpointError)


def trl_state(folder: Path) -> dict[str, Any]:
    """`trainer_state.json` of a checkpoint of a language model.

    Raises:
        CheckpointError: missing or torn.
    """
    return read_object(folder / TRAINER_STATE, TRLState, remedy=OTHERWISE, error=CheckpointError)


def logged_at(folder: Path) -> dict[str, Any]:
    """What the line of metrics of a language model's checkpoint must hold.

    Raises:
        CheckpointError: see `trl_state`.
    """
    (*_, last) = trl_state(folder)["log_history"] or [{}]
    kept = {key: last.get(key) for key in ("loss", "reward", "learning_rate")}
    return {key: value for key, value in finite(kept).items() if value is not None}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: missing or torn, or not what was written.
    """
    remedy = _remedy(path.parent) if (path.parent / STATE_FILE).exists() else "."
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing{remedy}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is torn, or of another format ({error}){remedy}") from None
    _check_digest(path, path.parent)
    return tensors


def check_reference(state: Mapping[str, Any], digest: str, checkpoint: Path) -> None:
    """Compare the base weights that a checkpoint was trained from with those there are now.

    Raises:
        CheckpointError: they differ.
    """
    if state["reference"] != digest:
        raise CheckpointError(
            f"{checkpoint} was trained from other base weights than the policy has now."
        )


class CheckpointError(InputError):
    """A checkpoint can't be read; the message says which file and what to do."""


def _remedy(folder: Path) -> str:
    """The end of a message about a checkpoint that can't be read: how to go on."""
    if not folder.name.isdecimal():
        return "; restore it from a copy, or remove its folder to begin anew."
    others = checkpoints_of(folder.parent)
    older = [int(each.name) for each in others if int(each.name) < int(folder.name)]
    if any(int(each.name) > int(folder.name) for each in others):
        return f"; remove {folder} to do without."
    if older:
        return f"; remove {folder} to go on from iteration {max(older)}."
    return "; restore it from a copy, or start a new run: there is no checkpoint before it."


def checkpoints_of(folder: Path) -> list[Path]:
    """Every checkpoint of a run, oldest first. What a user has put beside them is none."""
    named = (each for each in folder.glob("[0-9]*") if re.fullmatch(r"[0-9]{8,}", each.name))
    return sorted((each for each in named if each.is_dir()), key=lambda each: int(each.name))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state tensors of an optimizer, keyed `parameter index.name`."""
    return {
        f"{index}.{name}": value
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; settings such as the learning rate stay.

    Raises:
        CheckpointError: they are of other parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if not (name and index.isdecimal() and int(index) < len(parameters)):
            raise CheckpointError(f"the moments are of another optimizer: {key!r} is unknown.")
        if name in MOMENTS and value.shape != parameters[int(index)].shape:
            raise CheckpointError(f"the moments are of another model: {key!r} differs in shape.")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
