"""Finds classes and functions by dotted paths, those of the user's beside their recipe."""

from __future__ import annotations

import importlib
import sys
import sysconfig
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from entroflow.errors import RecipeError
from entroflow.wrong_keys import hint

EXTRAS = {
    "entroflow.policies.diffusers.": "diffusers",
    "entroflow.rewards.clip": "diffusers",
    "entroflow.rewards.served_": "judge",
}
"""Beginning of a module's name -> the extra that brings what it imports."""


def search_beside(folder: Path | None) -> None:
    """A user's components live beside the recipe that names them, or in the current folder.

    Both come last, so that a file of the user's takes the place of no installed module; those of
    recipes that were loaded before make room.
    """
    while _searched:
        with suppress(ValueError):
            sys.path.remove(_searched.pop())
    for place in (folder, Path.cwd()):
        if place is not None and str(place) not in sys.path:
            sys.path.append(str(place))
            _searched.append(str(place))


_searched: list[str] = []
"""What `search_beside` has added to `sys.path`."""


def refuse_shadowed(module_name: str, folder: Path | None, where: str) -> None:
    """A module beside the recipe must be the one that was imported under its name."""
    top = module_name.partition(".")[0]
    for place in (folder, Path.cwd()):
        if place is None:
            continue
        beside = [place / f"{top}.py", place / top / "__init__.py"]
        if any(path.is_file() for path in beside):
            found = getattr(sys.modules[top], "__file__", None)
            if found is None or Path(found).resolve() not in [p.resolve() for p in beside]:
                raise RecipeError(
                    f"{where}: {top!r} is the module {found or 'of Python itself'}, not "
                    f"the one in {place}; rename that one, or use a new process."
                )
            return


def home_of(part: Any) -> str:
    """The dotted path of the class or function an object comes from."""
    named = part.function if hasattr(part, "function") else type(part)
    return f"{named.__module__}.{getattr(named, '__qualname__', type(part).__name__)}"


def imported(path: str, where: str) -> Any:
    """What a dotted path names.

    Args:
        where: what errors call the key that holds it.

    Raises:
        RecipeError: no such module or name, or the module raised something itself.
    """
    module_name, _, attribute = path.rpartition(".")
    try:
        if not module_name or module_name.startswith("."):
            raise ModuleNotFoundError("no module is named", name=module_name)
        module = importlib.import_module(module_name)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and f"{module_name}.".startswith(f"{absent}."):
            raise RecipeError(
                f"{where}: can't import {module_name!r} ({error}); it must be installed, or lie "
                "beside the recipe or in the current folder."
            ) from None
        extra = next((e for home, e in EXTRAS.items() if module_name.startswith(home)), None)
        if absent is not None and extra is not None:
            raise RecipeError(
                f"{where}: it needs the extra: pip install 'entroflow[{extra}]' ({error})."
            ) from None
        raise RecipeError(f"{where}: the import of {module_name!r} {raised(error)}.") from error
    if not hasattr(module, attribute):
        public = [entry for entry in vars(module) if not entry.startswith("_")]
        found = f"{module_name} ({getattr(module, '__file__', 'built in')})"
        raise RecipeError(f"{where}: {found} has no {attribute!r}{hint(attribute, public)}")
    return getattr(module, attribute)


def raised(error: Exception) -> str:
    """What someone else's code raised, and in which line, as the end of a sentence."""
    if isinstance(error, SyntaxError):
        return f"raised {type(error).__name__}: {error}"
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    installed = [*places, str(Path(__file__).parent), "<frozen"]
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if not f.filename.startswith(tuple(installed))]
    frame = (users or frames)[-1]
    at = f"{frame.filename}, line {frame.lineno}"
    return f"raised {type(error).__name__}: {error} ({at})"
