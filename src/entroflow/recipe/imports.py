"""Finds classes and functions by dotted paths, those of the user's beside their recipe.

A recipe may come from anyone, and to import a module is to run it. So what lies beside a recipe is
found only where the folder is the user's working tree, or is trusted; modules of Python itself hold
no part of a recipe and are not imported for one; and of what is found nothing is called before it
is known to be a part of its kind.
"""

from __future__ import annotations

import functools
import importlib
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from entroflow.callables import uncached
from entroflow.errors import InputError, RecipeError, UntrustedError, one_line
from entroflow.recipe.messages import hint

EXTRAS = {
    "entroflow.policies.diffusers.": "diffusers",
    "entroflow.rewards.clip": "diffusers",
    "entroflow.rewards.served_": "judge",
}
"""Beginning of a module's name -> the extra that brings what it imports."""


def search_beside(folder: Path | None, trust: bool = False) -> None:
    """A user's components live beside the recipe that names them, or in the current folder.

    Both come last, so that a file of the user's takes the place of no installed module; those of
    recipes that were loaded before make room.

    Args:
        folder: of the recipe; it is searched if it is the user's working tree.
        trust: search it wherever it is.
    """
    while _searched:
        with suppress(ValueError):
            sys.path.remove(_searched.pop())
    _untrusted.clear()
    if folder is not None and not trust and not is_working_tree(folder):
        _untrusted.append(folder)
        folder = None
    for place in (folder, Path.cwd()):
        if place is not None and str(place) not in sys.path:
            sys.path.append(str(place))
            _searched.append(str(place))


_searched: list[str] = []
"""What `search_beside` has added to `sys.path`."""


_untrusted: list[Path] = []
"""The folder of the last recipe, if it is not searched."""


def is_working_tree(folder: Path) -> bool:
    """Whether a folder is the current one, or lies below it.

    Below the home folder and the root anything may lie, as what was downloaded: of these only the
    folder itself is the working tree.
    """
    here, folder = Path.cwd().resolve(), folder.resolve()
    if here in (Path(here.anchor), _home()):
        return folder == here
    return folder.is_relative_to(here)


def _home() -> Path | None:
    with suppress(RuntimeError):
        return Path.home().resolve()
    return None


def refuse_untrusted(path: str, where: str) -> None:
    """Refuse a dotted path that leads into the folder of a recipe that is not trusted.

    Args:
        where: what errors call the key that holds it.

    Raises:
        UntrustedError: it does; nothing was imported.
    """
    top = path.partition(".")[0]
    for folder in _untrusted:
        if PathFinder.find_spec(top, [str(folder)]) is not None and not _is_installed(top):
            raise UntrustedError(
                f"{where}: {path} is code in {folder}, which is not below the current folder; read "
                "it, and let it run with --trust (from Python: trust=True)."
            )


def _is_installed(top: str) -> bool:
    """Whether a module is found without the folder of the recipe; it is not imported.

    That it was imported says nothing: the folder may have been trusted then.
    """
    return any(finder.find_spec(top, None) is not None for finder in sys.meta_path)


def is_of_python(path: str) -> bool:
    """Whether a dotted path leads into Python itself, as `os.system` does."""
    return path.partition(".")[0] in sys.stdlib_module_names


def refuse_shadowed(module_name: str, folder: Path | None, where: str) -> None:
    """A module beside the recipe must be the one that is imported under its name."""
    top = module_name.partition(".")[0]
    for place in (folder, Path.cwd()):
        if place is None:
            continue
        beside = [place / f"{top}.py", place / top / "__init__.py"]
        if any(path.is_file() for path in beside):
            found = getattr(sys.modules.get(top), "__file__", None)
            if found is not None and Path(found).resolve() in [p.resolve() for p in beside]:
                return
            here = next(path for path in beside if path.is_file())
            if found is None or found.startswith(tuple(_installed())):
                raise RecipeError(
                    f"{where}: {top!r} is the module {found or 'of Python itself'}, not the one in "
                    f"{place}; rename {here}."
                )
            raise RecipeError(
                f"{where}: two modules are called {top!r}, {found} and {here}, and one process can "
                "load only one of them; rename one, and the type in its recipe."
            )


def home_of(part: Any) -> str:
    """The dotted path of a function, of what a partial is of, or of an object's class."""
    while isinstance(part, functools.partial):
        part = part.func
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}.{named.__qualname__}"


def users_function(path: str, where: str) -> Any:
    """What a dotted path of the user's names, which can be called and is no class.

    Args:
        where: what errors call the key that holds it.

    Raises:
        RecipeError: it does not; see also `imported` and `refuse_untrusted`.
    """
    refuse_untrusted(path, where)
    if is_of_python(path):
        raise RecipeError(f"{where}: {path} is of Python itself, which holds no part of a recipe.")
    function = imported(path, where)
    if isinstance(function, type):
        raise RecipeError(f"{where}: {path} is a class; name a function, or an instance of it.")
    if not callable(function):
        raise RecipeError(f"{where}: {path} can't be called.")
    return uncached(function)


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
    except KeyboardInterrupt:
        raise
    except BaseException as error:
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
    with users_errors(f"{where}: {path}"):
        is_there = hasattr(module, attribute)
    if not is_there:
        public = [entry for entry in vars(module) if not entry.startswith("_")]
        found = f"{module_name} ({getattr(module, '__file__', 'built in')})"
        raise RecipeError(f"{where}: {found} has no {attribute!r}{hint(attribute, public)}")
    return getattr(module, attribute)


@contextmanager
def users_errors(where: str) -> Iterator[None]:
    """Within, what the user's own code raises is a RecipeError, even if it is to end the program.

    Args:
        where: what errors say of it, as `reward: my_module.MyReward`.
    """
    try:
        yield
    except (KeyboardInterrupt, InputError):
        raise
    except BaseException as error:
        raise RecipeError(f"{where} {raised(error)}.") from error


def raised(error: BaseException) -> str:
    """What someone else's code raised, and in which line, as the end of a sentence."""
    if isinstance(error, SyntaxError):
        return f"raised {type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if not f.filename.startswith(tuple(_installed()))]
    frame = (users or frames)[-1]
    at = f"{frame.filename}, line {frame.lineno}"
    return f"raised {type(error).__name__}: {one_line(str(error), 300)} ({at})"


def _installed() -> list[str]:
    """How the paths of modules begin that are not the user's own."""
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return [*places, str(Path(__file__).parents[1]), "<frozen"]
