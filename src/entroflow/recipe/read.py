"""Reads a recipe as it is written, with the changes to it; nothing that it names is imported."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn

from entroflow.errors import RecipeError, UntrustedError, quoted
from entroflow.places import Places, with_override
from entroflow.recipe.imports import is_working_tree, refuse_untrusted, search_beside
from entroflow.recipe.kinds import RECIPE, TRAIN, Kind, other_recipe, other_run
from entroflow.recipe.messages import hint
from entroflow.recipe.registry import Layout
from entroflow.recipe.text import fields_of, holder_of, override_of, parse_yaml, texts_of
from entroflow.rewards.access import sent_keys

LARGEST = 2**20
"""Bytes of a recipe file."""
FOUND_IN = "found_in"
"""Key of a run's recipe: the folder of the recipe file, where code of the user's may lie."""


@dataclass(frozen=True)
class Written:
    """A recipe as it is written, with the changes to it.

    Attributes:
        layout: what recipes of its kind hold.
        name: of the recipe in the package or of the file, for messages.
        mapping: what it holds, without `found_in`.
        places: where files that it names are looked for, in the folder it lay in first.
        beside: the folder that its file lies in; None for one in the package.
    """

    layout: Layout
    name: str
    mapping: Mapping[str, Any]
    places: Places
    beside: Path | None

    @property
    def home(self) -> Path | None:
        """The folder it lay in first, if that may hold code of the user's."""
        folder = self.places.folder
        return None if folder == self.layout.shipped else folder

    def type_in(self, section: str) -> str:
        """The type of the component that it chooses for a section.

        Raises:
            RecipeError: the section holds no keys and values.
        """
        fields = fields_of(self.mapping.get(section), f"{self.name}: {section}")
        return str(fields.get("type", self.layout.default_type(section)))

    def search(self, trust: bool) -> None:
        """Let code of the user's be imported from its folder; see `imports.search_beside`."""
        search_beside(self.home, trust)

    def refuse_strangers(self) -> None:
        """Refuse a recipe that needs trust: for code that it names, or an API key that it sends.

        Raises:
            UntrustedError: it does; nothing was imported.
        """
        self.search(trust=False)
        for path in dotted_paths(self.mapping):
            refuse_untrusted(path, self.name)
        self.refuse_sent_keys(list(self.layout.sections))

    def refuse_sent_keys(self, sections: Sequence[str]) -> None:
        """Refuse a stranger's recipe that has an API key of the user's sent to another machine.

        Where the user has named the server or the variable, it is their own will.

        Args:
            sections: that are looked at.

        Raises:
            UntrustedError: it has.
        """
        # Not the home folder: that is what the file says of itself.
        if self.beside is None or is_working_tree(self.beside):
            return
        for sent in sent_keys({section: self.mapping.get(section) for section in sections}):
            if not any(self._is_changed(*sent.keys, key) for key in ("url", "key_variable")):
                raise UntrustedError(
                    f"{self.name}: {'.'.join(sent.keys)}: the API key in {sent.variable} would be "
                    f"sent to {sent.host}, by a recipe in {self.beside}, which is not below the "
                    "current folder; read it, and allow it with --trust (from Python: trust=True)."
                )

    def _is_changed(self, *keys: str) -> bool:
        return reduce(Places.within, keys, self.places).overridden is True


def read(name_or_path: str | Path, overrides: Sequence[str], layout: Layout) -> Written:
    """Read a recipe by its name in the package or its file, and change it.

    Args:
        overrides: `section.key=value`, in order; but a type goes before its fields.

    Raises:
        RecipeError: there is none, it is no YAML file of a recipe's size, a run folder, or of the
            other kind; an override of an unknown section, or inside of a value.
    """
    name, mapping, beside = _file(str(name_or_path), layout)
    overridden: Any = {}
    for override in sorted(overrides, key=lambda o: not o.partition("=")[0].endswith(".type")):
        overridden = with_override(overridden, _apply(override, mapping, layout))
    folder = mapping.pop(FOUND_IN, None)
    if folder is not None and not isinstance(folder, str):
        raise RecipeError(f"{name}: {FOUND_IN} must be a folder, not {quoted(folder)}.")
    home = (beside or layout.shipped) if folder is None else Path(folder)
    return Written(layout, name, mapping, Places(home, overridden), beside)


def titles(layout: Layout) -> dict[str, tuple[str, str]]:
    """Name -> title and paper of the recipes in the package."""
    texts = {name: texts_of(read(name, (), layout).mapping, name) for name in layout.recipes}
    return {name: (each["title"], each["paper"]) for name, each in texts.items()}


def _file(name: str, layout: Layout) -> tuple[str, dict[str, Any], Path | None]:
    """Name, content and folder of a recipe; there is no folder for one in the package."""
    shipped = layout.recipes
    if name in shipped:
        return name, parse_yaml(shipped[name].read_text(encoding="utf-8"), name), None
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") and not os.path.exists(path):
        raise RecipeError(f"there is no recipe {quoted(name)}{hint(name, list(shipped))}")
    if os.path.isfile(path / RECIPE):
        _refuse_run(path, layout.kind)
    mapping = parse_yaml(_text_of(path), path.stem)
    if message := other_recipe(name, mapping, layout.kind):
        raise RecipeError(message)
    return path.stem, mapping, path.resolve().parent


def _refuse_run(folder: Path, kind: Kind) -> NoReturn:
    """Say that a run folder is no recipe.

    Raises:
        RecipeError: always.
    """
    recipe = folder / RECIPE
    if message := other_run(folder, parse_yaml(_text_of(recipe), str(recipe)), kind):
        raise RecipeError(message)
    raise RecipeError(
        f"{folder} is a run folder, not a recipe: {recipe} is its recipe, and `{TRAIN[kind]} "
        f"--resume {shlex.quote(str(folder))}` goes on with it."
    )


def _text_of(path: Path) -> str:
    try:
        # What is no file, as a device or a pipe, may never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise RecipeError(f"{path} is not a YAML file.")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe file {path}.") from None
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        raise RecipeError(f"the recipe file {path} can't be read: {error}.") from None
    if len(content) > LARGEST:
        raise RecipeError(f"{path} is not a recipe: it has more than {LARGEST:,} bytes.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not a YAML file in UTF-8.") from None


def _apply(override: str, mapping: dict[str, Any], layout: Layout) -> list[str]:
    """Change a mapping; returns the keys of what was set."""
    keys, value = override_of(override, list(layout.sections))
    target = holder_of(mapping, keys, override)
    default = layout.default_type(keys[0])
    if default is not None and keys[1:] == ["type"] and target.get("type", default) != value:
        # Fields of the old type mean nothing to the new one.
        target.clear()
    target[keys[-1]] = value
    return keys


def dotted_paths(fields: Any) -> Iterator[str]:
    """The dotted paths by which a part and its parts are named."""
    if isinstance(fields, Mapping):
        kind = fields.get("type")
        if isinstance(kind, str) and "." in kind:
            yield kind
        for value in fields.values():
            yield from dotted_paths(value)
