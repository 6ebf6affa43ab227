"""What people write: YAML, and changes to it on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode

from entroflow.errors import QUOTED, RecipeError, one_line, quoted
from entroflow.recipe.messages import hint

MOST, DEEPEST = 8000, 50
"""Values of a recipe with its aliases written out, ten characters counting as one; their depth."""
TEXTS = ("title", "paper", "notes")
"""What is for people beside the sections of a recipe."""
_NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that no value of a recipe holds: all that control, but tabs and line feeds."""
_TAG = "tag:yaml.org,2002:"


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

    It holds None, bool, int, float, str, and lists and mappings of these. A key is text as it is
    written, and so is a date.

    Raises:
        RecipeError: it is no YAML, no mapping, or more than a recipe can be.
    """
    try:
        parsed = _read(text)
    except YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {one_line(str(error), 200)}") from None
    except _UnfitError as error:
        raise RecipeError(f"{where}: {error}.") from None
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise RecipeError(f"{where} must be a mapping of sections, not a {type(parsed).__name__}.")
    return parsed


def as_yaml(mapping: Mapping[str, Any]) -> str:
    """A YAML text that reads back as the mapping, with lines of 100 characters where they can be.

    Args:
        mapping: of None, bool, int, float, str, and lists and mappings of these.
    """
    wrapped = _written(mapping, 100)
    # The writer may break a line where its reader joins the two with other spaces.
    return wrapped if _read(wrapped) == mapping else _written(mapping, 2**30)


def _written(mapping: Mapping[str, Any], width: int) -> str:
    writer, out = YAML(), StringIO()
    writer.width = width
    writer.dump(mapping, out)
    return out.getvalue()


def _read(text: str) -> Any:
    """What a text of one YAML document holds.

    Raises:
        YAMLError: it is no YAML.
        _UnfitError: it is more than a recipe can be.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer, yaml.Constructor = _Composer, _Constructor
    try:
        return yaml.load(text)
    except (YAMLError, _UnfitError):
        raise
    except Exception as error:
        # Of a wrong tag or directive, whatever the parser stumbles over.
        raise YAMLError(f"{type(error).__name__}: {error}") from None


class _UnfitError(Exception):
    """YAML that is no recipe, however little text it takes."""


class _Composer(Composer):
    """Makes nodes of a text, as long as they are as many and as deep as those of a recipe.

    The nodes of an alias count wherever it stands.
    """

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader=loader)
        self.warn_double_anchors = False
        self._open: list[list[int]] = []
        self._measured: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node; see the class."""
        is_alias = self.parser.check_event(AliasEvent)
        self._refuse(1, 1)
        self._open.append([1, 1])
        node = super().compose_node(parent, index)
        size, depth = self._open.pop()
        if is_alias:
            # A node is measured when it is whole.
            if id(node) not in self._measured:
                raise _UnfitError("an alias stands inside of what it is an alias of")
            size, depth = self._measured[id(node)]
        elif isinstance(node, ScalarNode):
            size += len(node.value) // 10
        self._measured[id(node)] = size, depth
        self._refuse(size, depth)
        if self._open:
            self._open[-1][0] += size
            self._open[-1][1] = max(self._open[-1][1], depth + 1)
        return node

    def _refuse(self, size: int, depth: int) -> None:
        if len(self._open) + depth > DEEPEST:
            raise _UnfitError(f"its values are nested more than {DEEPEST} deep")
        if size + sum(within for within, _ in self._open) > MOST:
            raise _UnfitError(f"it holds more than {MOST:,} values, aliases written out")

    def compose_scalar_node(self, anchor: Any) -> Any:
        """A node of text; see `_refuse_controls`."""
        node = super().compose_scalar_node(anchor)
        _refuse_controls(node.value)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A node of keys and values; keys are text."""
        node: MappingNode = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise _UnfitError("a key is a list or a mapping, but must be a text")
            if key.value in keys:
                raise _UnfitError(f'duplicate key "{key.value[:QUOTED]}"')
            keys.add(key.value)
            if key.tag != f"{_TAG}merge":
                key.tag = f"{_TAG}str"
        return node


def _refuse_controls(text: str) -> None:
    control = _NO_TEXT.search(text)
    if control:
        raise _UnfitError(f"a text holds the control character {quoted(control[0])}")


class _Constructor(SafeConstructor):
    """Makes plain data of nodes; a date is the text that it is written as."""

    def construct_whole_number(self, node: Any) -> int:
        """A number that has room in 64 bits with its sign.

        Raises:
            ConstructorError: it has not.
        """
        value: int = 2**63 if len(node.value) > QUOTED else self.construct_yaml_int(node)
        if abs(value) >= 2**63:
            raise ConstructorError(None, None, "a whole number is beyond 64 bits", node.start_mark)
        return value


_Constructor.yaml_constructors = {
    tag: SafeConstructor.yaml_constructors[tag]
    for tag in (None, *(_TAG + kind for kind in ("null", "bool", "float", "str", "seq", "map")))
}
_Constructor.add_constructor(f"{_TAG}int", _Constructor.construct_whole_number)
_Constructor.add_constructor(f"{_TAG}timestamp", SafeConstructor.construct_yaml_str)


def override_of(text: str, sections: Sequence[str]) -> tuple[list[str], Any]:
    """The keys and the value of `section.key=value`.

    Raises:
        RecipeError: it is not of that form, there is no such section, or the value is more than one
            in a recipe can be.
    """
    path, equals, value = text.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"an override is section.key=value, not {quoted(text)}.")
    if keys[0] not in sections:
        raise RecipeError(f"{text}: unknown section {quoted(keys[0])}{hint(keys[0], sections)}")
    if len(keys) == 1:
        raise RecipeError(f"{text}: name a key inside {keys[0]}, as in {keys[0]}.key=value.")
    try:
        _refuse_controls(text)
        if len(keys) > DEEPEST:
            raise _UnfitError(f"more than {DEEPEST} keys stand within each other")
        return keys, _read(value)
    except YAMLError:
        return keys, value
    except _UnfitError as error:
        raise RecipeError(f"{one_line(text, QUOTED)}: {error}.") from None


def holder_of(mapping: dict[str, Any], keys: Sequence[str], override: str) -> dict[str, Any]:
    """What holds the last of nested keys: a copy of it, in its place in the mapping.

    Raises:
        RecipeError: something on the way holds a value.
    """
    target = mapping
    for key in keys[:-1]:
        inner = target.get(key) or {}
        if not isinstance(inner, Mapping):
            raise RecipeError(f"{override}: {key} holds {quoted(inner)}, not keys.")
        target[key] = dict(inner)
        target = target[key]
    return target


def fields_of(fields: Any, where: str, hold: str = "keys and values") -> dict[str, Any]:
    """A copy of the keys and values of a section, or of a part of one; none where it is empty.

    Raises:
        RecipeError: it holds something else.
    """
    if fields is None:
        return {}
    if not isinstance(fields, Mapping):
        raise RecipeError(f"{where} must hold {hold}, not {quoted(fields)}.")
    return dict(fields)


def name_of_recipe(mapping: dict[str, Any], otherwise: str) -> str:
    """The name that a recipe gives itself, which is taken out; `otherwise` if it gives none.

    Raises:
        RecipeError: it is no name.
    """
    name = _text(mapping.pop("name", None), otherwise, "name") or otherwise
    parts = re.split(r"[/\\]", name)
    if len(parts) > 1 and {"", ".", ".."} & {part.strip() for part in parts}:
        raise RecipeError(f"{quoted(name)} is a path, but must be the name of a recipe.")
    if not name.isprintable() or len(name) > QUOTED:
        raise RecipeError(
            f"a recipe can't be named {quoted(name)}: a name has at most {QUOTED} characters, all "
            "of which can be printed; rename the file, or give it a key `name`."
        )
    return name


def texts_of(mapping: Mapping[str, Any], name: str) -> dict[str, str]:
    """Title, paper and notes of a recipe; those that it does not have are empty.

    Raises:
        RecipeError: one is no text.
    """
    return {key: _text(mapping.get(key), name, key) for key in TEXTS}


def _text(value: Any, where: str, key: str) -> str:
    if isinstance(value, Mapping | list):
        raise RecipeError(f"{where}: {key} must be a text, not {quoted(value)}.")
    return "" if value is None else str(value)
