"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all.

Beside them `digests.json` holds the SHA-256 of every file, which whoever reads one compares.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from entroflow.contents import Contents, Count, Number, read_object
from entroflow.errors import InputError
from entroflow.writing import part_of, settled, to_json, writing

log = logging.getLogger(__name__)


STATE_FILE, DIGESTS = "state.json", "digests.json"


TRAINER_STATE, PROGRESS = "trainer_state.json", "progress.json"
"""Of a language model: TRL's own state, and what else it takes to go on."""


MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What an optimizer keeps in the shape of a parameter."""


class Counted(Contents):
    """The state of a ledger."""

    network_evaluations: Count = 0
    weighted_evaluations: Count = 0
    check_evaluations: Count = 0
    reward_calls: Count = 0
    decodes: Count = 0
    optimizer_steps: Count = 0
    seconds: dict[str, float] = {}


class Curve(Contents):
    """The state of `EntropyCurve`."""

    values: list[Number] | None = None


class Named(Contents):
    """What a recipe names, and a digest of what it held; see `inputs.Inputs`."""

    of: str
    digest: str


class RunState(Contents):
    """`state.json` in a checkpoint of a run. Components may remember what is not finite."""

    model_config = ConfigDict(allow_inf_nan=True)

    iteration: Count
    seconds: float
    ledger: Counted
    evaluation_ledger: Counted
    reference: str
    recipe: str | None = None
    inputs: dict[str, Named] | None = None
    code: dict[str, Named] = {}
    sentinel: dict[str, list[Number]] = {}
    monitors: dict[str, Any] = {}
    stopped: bool = False
    attention: Curve = Curve()
    components: dict[str, Any]


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
