"""Where what a recipe names lies: paths are made absolute when the recipe is read.

So a run goes on from any folder, and a name that stands for two things is never mixed up later.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from entroflow.errors import InputError
from entroflow.records import STRUCTURED, TEXT


@dataclass(frozen=True)
class PathOrName:
    """Marks a text that is a path, or else a name that a library looks up.

    Attributes:
        words: names that are never paths, whatever lies there.
        in_folders: whether `a/b` is a path where there is a folder `a`, though it has no `b`.
    """

    words: tuple[str, ...] = ()
    in_folders: bool = False


@dataclass(frozen=True)
class Places:
    """Where the paths of a recipe are looked for: beside it, then in the current folder.

    Values of overrides are looked for in the current folder first, as a shell does.

    Attributes:
        folder: of the recipe, if it has one.
        overridden: which values are those of overrides: all, or by key; see `with_override`.
    """

    folder: Path | None = None
    overridden: bool | Mapping[str, Any] = False

    def within(self, key: str) -> Places:
        """The same for the value of a key."""
        if isinstance(self.overridden, bool):
            return self
        return replace(self, overridden=self.overridden.get(key, False))

    def path(self, path: Path) -> Path:
        """Its absolute form; in the current folder where it is in neither. `~` is the home."""
        return Path(next(filter(os.path.exists, self._candidates(path)), self._absent(path)))

    def path_or_name(self, text: str, of: PathOrName) -> str:
        """The absolute path where there is one, or where the text can be nothing else."""
        if text in of.words or "://" in text:
            return text
        candidates = self._candidates(text)
        first = Path(text).parts[:1]
        if (
            any(map(os.path.exists, candidates))
            or text.startswith(("~", "/", "."))
            or text.count("/") > 1
            or Path(text).suffix.lower() in {*TEXT, *STRUCTURED} - {""}
            or (of.in_folders and "/" in text and any(map(os.path.isdir, self._candidates(*first))))
        ):
            return str(self.path(Path(text)))
        return text

    def pattern(self, text: str) -> str:
        """As `path`, for a file or a pattern of files such as `*.json`; a url stays."""
        if "://" in text:
            return text
        return next(filter(glob.glob, self._candidates(text)), self._absent(text))

    def _candidates(self, path: Path | str) -> list[str]:
        folders = [self.folder, Path.cwd()]
        if self.overridden is True:
            folders.reverse()
        return [_absolute(folder, path) for folder in folders if folder is not None]

    def _absent(self, path: Path | str) -> str:
        return _absolute(Path.cwd(), path)


def _absolute(folder: Path, path: Path | str) -> str:
    """An absolute path without `.` and `..`; symbolic links stay."""
    # Not `Path.expanduser`: it raises where there is no such user.
    spelt = os.path.join(folder, os.path.expanduser(path))
    plain = os.path.normpath(spelt)
    # `..` behind a symbolic link leads out of the folder that the link leads to.
    if os.path.exists(spelt) and not (os.path.exists(plain) and os.path.samefile(spelt, plain)):
        return spelt
    return plain


def with_override(overridden: bool | Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Which values are those of overrides, after one of the value at nested keys.

    Returns:
        True: all are; else a mapping of key to the same for its value.
    """
    if overridden is True or not keys:
        return True
    by_key = overridden or {}
    return {**by_key, keys[0]: with_override(by_key.get(keys[0], False), keys[1:])}


def paths_in(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """The absolute paths in a plain mapping, each with the key that holds it."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from paths_in(each, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from paths_in(each, where)
    elif isinstance(value, str) and os.path.isabs(value):
        yield where, value


def without_folders(value: Any, package: Path) -> Any:
    """A plain value in which absolute paths are names of files: the same wherever they lie.

    Args:
        package: folder of files of the package, which keep their path within it.
    """
    if isinstance(value, Mapping):
        return {key: without_folders(each, package) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(each, package) for each in value]
    if isinstance(value, str) and os.path.isabs(value):
        if Path(value).is_relative_to(package):
            return value.removeprefix(str(package))
        return os.path.basename(value)
    return value


def holds_path(value: Any) -> bool:
    """Whether a value of a setting is a path, or a list or mapping with one in it."""
    if isinstance(value, dict):
        return any(map(holds_path, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(holds_path, value))
    return isinstance(value, Path)


def with_places(value: Any, places: Places) -> Any:
    """A value of a setting with the paths in it made absolute."""
    if isinstance(value, dict):
        return {key: with_places(each, places.within(key)) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        kind = next(k for k in (list, tuple, set, frozenset) if isinstance(value, k))
        return kind(with_places(each, places) for each in value)
    return places.path(value) if isinstance(value, Path) else value


def is_path(part: Any, keys: Sequence[str]) -> bool:
    """Whether the setting at nested keys of a component is a path, or may be one."""
    for key in keys:
        if isinstance(part, Mapping):
            part = part.get(key)
            continue
        field = type(part).model_fields.get(key) if isinstance(part, BaseModel) else None
        if field is None:
            return False
        part = getattr(part, key)
        if any(isinstance(mark, PathOrName) for mark in field.metadata):
            return bool(part)
        if holds_path(part):
            return True
    return False


@contextmanager
def hinting_at_moved(paths: Iterable[tuple[str, str]]) -> Iterator[None]:
    """Within, an error about a path of the recipe at which there is nothing says how to go on.

    Args:
        paths: key and absolute path, or pattern of files.
    """
    try:
        yield
    except InputError as error:
        for key, path in paths:
            if path in str(error) and not os.path.exists(path) and not glob.glob(path):
                raise InputError(
                    f"{key}: {path} is not there; if it was moved, add {key}=NEW to the command."
                ) from error
        raise
