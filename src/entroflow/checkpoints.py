"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from entroflow.errors import InputError

STATE_FILE = "state.json"


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Within, no other process is so about the same folder, which is made where it is missing.

    Raises:
        InputError: another process is, or `folder` is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{folder} can't be made: a file is there; choose another.") from None
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"another process is writing into {folder}.") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill; it appears under `out` when all is in it, or not at all.

    Raises:
        InputError: `out` is in use.
    """
    refuse_used(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as place:
        made = Path(place) / out.name
        made.mkdir()
        yield made
        if out.exists():
            out.rmdir()
        shutil.move(made, out)


def refuse_used(out: Path) -> None:
    """Refuse a place where something is.

    Raises:
        InputError: a file, or a folder that is not empty, is there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already; choose another folder.")


def write_text(path: Path, content: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, entries in tensors.items():
        plain = {key: value.detach().contiguous() for key, value in entries.items()}
        try:
            save_file(plain, temporary / f"{name}.safetensors")
        except SafetensorError as error:
            raise CheckpointError(f"{temporary} can't be written ({error}).") from error
    # Not `to_json`: a component must get back the NaN or infinity that it remembered.
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    settled(temporary)
    outdated = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(outdated, ignore_errors=True)
        folder.replace(outdated)
    temporary.replace(folder)
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


def checkpoint_exists(folder: Path) -> bool:
    """Whether there is a checkpoint; one that a crash left half replaced is put back first."""
    outdated = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and outdated.exists():
        outdated.replace(folder)
    return folder.exists()


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint.

    Raises:
        CheckpointError: missing or torn.
    """
    path = folder / STATE_FILE
    checkpoint_exists(folder)
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return state
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {STATE_FILE}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _torn(path, error) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: missing or torn.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (SafetensorError, OSError) as error:
        raise _torn(path, error) from None


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


def _torn(path: Path, error: Exception) -> CheckpointError:
    if (path.parent / STATE_FILE).exists():
        remedy = f"; remove {path.parent} to go on from what was saved before."
    else:
        remedy = "."
    return CheckpointError(f"{path} is torn, or of another format ({error}){remedy}")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state tensors of an optimizer, keyed `parameter index.name`."""
    return {
        f"{index}.{name}": value
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; settings such as the learning rate stay."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
