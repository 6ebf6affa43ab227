"""Where what a recipe names lies: paths are made absolute when the recipe is read.

So a run goes on from any folder, and a name that stands for two things is never mixed up later.
"""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    Attributes:
        folder: of the recipe, if it has one.
    """

    folder: Path | None

    def path(self, path: Path) -> Path:
        """Its absolute form; in the current folder where it is in neither. `~` is the home."""
        return next(filter(os.path.exists, self._candidates(path)), self._candidates(path)[-1])

    def path_or_name(self, text: str, of: PathOrName) -> str:
        """The absolute path where there is one, or where the text can be nothing else."""
        if text in of.words or "://" in text:
            return text
        candidates = self._candidates(Path(text))
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
        candidates = [str(path) for path in self._candidates(Path(text))]
        return next(filter(glob.glob, candidates), candidates[-1])

    def _candidates(self, path: Path | str) -> list[Path]:
        # Not `Path.expanduser`: it raises where there is no such user.
        path = os.path.expanduser(path)
        return [place / path for place in (self.folder, Path.cwd()) if place is not None]


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
        return {key: with_places(each, places) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        kind = next(k for k in (list, tuple, set, frozenset) if isinstance(value, k))
        return kind(with_places(each, places) for each in value)
    return places.path(value) if isinstance(value, Path) else value
