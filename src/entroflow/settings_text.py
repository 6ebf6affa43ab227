"""What people write: YAML, and changes to it on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from entroflow.errors import RecipeError
from entroflow.wrong_keys import hint


def names_and_changes(arguments: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Of a command's arguments the recipe, if one is named, and the `section.key=value` changes.

    Raises:
        RecipeError: more than one recipe.
    """
    names = [argument for argument in arguments or [] if "=" not in argument]
    if len(names) > 1:
        raise RecipeError(f"one recipe at a time, not {' and '.join(names)}.")
    return names, [argument for argument in arguments or [] if "=" in argument]


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping that a text holds; nothing for an empty one.

    Raises:
        RecipeError: it is no YAML, or no mapping.
    """
    try:
        parsed = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{where} is not valid YAML: {reason}") from None
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise RecipeError(f"{where} must be a mapping of sections, not a {type(parsed).__name__}.")
    return parsed


def override_of(text: str, sections: Sequence[str]) -> tuple[list[str], Any]:
    """The keys and the value of `section.key=value`.

    Raises:
        RecipeError: it is not of that form, or there is no such section.
    """
    path, equals, value = text.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"an override is section.key=value, not {text!r}.")
    if keys[0] not in sections:
        raise RecipeError(f"{text}: unknown section {keys[0]!r}{hint(keys[0], sections)}")
    if len(keys) == 1:
        raise RecipeError(f"{text}: name a key inside {keys[0]}, as in {keys[0]}.key=value.")
    try:
        return keys, YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        return keys, value


def holder_of(mapping: dict[str, Any], keys: Sequence[str], override: str) -> dict[str, Any]:
    """What holds the last of nested keys: a copy of it, in its place in the mapping.

    Raises:
        RecipeError: something on the way holds a value.
    """
    target = mapping
    for key in keys[:-1]:
        inner = target.get(key) or {}
        if not isinstance(inner, Mapping):
            raise RecipeError(f"{override}: {key} holds {inner!r}, not keys.")
        target[key] = dict(inner)
        target = target[key]
    return target
