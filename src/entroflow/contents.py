"""JSON files, and the one reader of them all.

What can't be read is not absent: a file that is cut, holds other JSON, or bytes that are no text is
torn, and whoever reads it is told so in one line. Keys that a class does not list are let through.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from entroflow.errors import InputError

Count = Annotated[int, Field(ge=0, le=2**63)]


Number = float | None
"""What is not finite is null in JSON."""


class RunError(InputError):
    """A run folder can't be used as asked; the message says why and what to do."""


class Contents(BaseModel):
    """A JSON object; by itself one of any keys."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


TO_DO_WITHOUT = "; remove it to do without."


def read_object(
    path: Path,
    kind: type[Contents] = Contents,
    *,
    remedy: str = TO_DO_WITHOUT,
    error: type[InputError] = RunError,
) -> dict[str, Any]:
    """The JSON object that a file holds, as it stands there.

    Args:
        kind: what it must hold.
        remedy: the end of the message where it is torn.

    Raises:
        error: the file is torn, or can't be read.
    """
    text = read_text(path, remedy=remedy, error=error)
    try:
        return checked(parsed(text), kind)
    except ValueError as reason:
        raise error(f"{path} is torn ({shortened(reason)}){remedy}") from None


def read_text(
    path: Path, *, remedy: str = "; restore it from a copy.", error: type[InputError] = RunError
) -> str:
    """The text of a file.

    Raises:
        error: it is no text, or can't be read.
    """
    content = _bytes(path, error)
    try:
        return content.decode()
    except UnicodeDecodeError as reason:
        raise error(f"{path} is torn ({shortened(reason)}){remedy}") from None


def parsed(text: str) -> Any:
    """JSON.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def checked(content: Any, kind: type[Contents]) -> dict[str, Any]:
    """`content`, if it is of a kind.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    try:
        kind.model_validate(content)
    except ValidationError as error:
        raise ValueError(_first(error)) from None
    return content


def _bytes(path: Path, error: type[InputError]) -> bytes:
    try:
        return path.read_bytes()
    except OSError as reason:
        raise unreadable(path, reason, error) from None


def unreadable(path: Path, reason: OSError, error: type[InputError]) -> InputError:
    """The error about a file that can't be read."""
    if isinstance(reason, FileNotFoundError):
        return error(f"{path} is missing.")
    return error(f"{path} can't be read ({reason.strerror}).")


def is_cut(line: bytes) -> bool:
    """Whether it may be the beginning of a line of ours: some file systems end it with zeros."""
    written = line.rstrip(b"\0")
    return not written or (written.startswith(b"{") and written.isascii())


def _first(error: ValidationError) -> str:
    """What is wrong with the first wrong key, in a few words."""
    detail = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in detail["loc"])[:60]
    words = re.sub(r"^Value error, ", "", detail["msg"])
    words = words[:1].lower() + words[1:]
    return f"{place}: {words}" if place else words


def shortened(reason: object) -> str:
    """A reason in one line of at most 120 characters."""
    words = " ".join(str(reason).split())
    return words if len(words) <= 120 else f"{words[:117]}..."


def require(whole: bool, otherwise: str) -> None:
    """Refuse a file that is not whole, in a validator of its class.

    Raises:
        ValueError: with the message `otherwise`.
    """
    if not whole:
        raise ValueError(otherwise)
