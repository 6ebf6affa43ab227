"""Builds components of what a recipe says of them: those of the package, and the user's own."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from entroflow.component import Component, placed
from entroflow.errors import RecipeError, quoted
from entroflow.places import Places
from entroflow.recipe.imports import (
    imported,
    is_of_python,
    refuse_shadowed,
    refuse_untrusted,
    users_errors,
)
from entroflow.recipe.messages import explained, hint
from entroflow.recipe.registry import COMPONENTS, PROTOCOLS, Layout
from entroflow.recipe.text import fields_of

ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Source:
    """Where a recipe, or a part of one, comes from.

    Attributes:
        places: where files that it names are looked for.
        is_built: whether the user's own parts are imported and built; else they stay None.
    """

    places: Places = field(default_factory=Places)
    is_built: bool = True

    def within(self, key: str) -> Source:
        """The same for the part at a key."""
        return replace(self, places=self.places.within(key))


def changed(component: ModelT, fields: Mapping[str, Any], where: str) -> ModelT:
    """A copy with other values, checked like those of a recipe.

    Args:
        where: what errors call the component.

    Raises:
        RecipeError: an unknown key; a value of the wrong type or out of range.
    """
    fields = {**component.model_dump(mode="json"), **fields}
    return cast(ModelT, validated(type(component), fields, where)[0])


def section_of(
    layout: Layout, section: str, fields: Any, where: str, source: Source
) -> tuple[Any, dict[str, Any]]:
    """What stands in a section of a recipe, and its fields with defaults written out.

    Args:
        where: what errors call it.

    Raises:
        RecipeError: an unknown key or type; a value of the wrong type or out of range.
    """
    fields, types = fields_of(fields, where), layout.sections[section]
    if types is None:
        return fields, fields
    if isinstance(types, type):
        return validated(types, fields, where, source)
    return component_of(section, fields, where, source)


def component_of(
    section: str, fields: dict[str, Any], where: str, source: Source
) -> tuple[Any, dict[str, Any]]:
    """A component of a type that the fields choose, and the fields with defaults written out.

    Args:
        section: that has such components, or kind of part inside of one.
        where: what errors call it.

    Raises:
        RecipeError: see `section_of`.
    """
    types = COMPONENTS[section]
    kind = fields.pop("type", next(iter(types)))
    if not isinstance(kind, str):
        raise RecipeError(f"{where}.type must be a name, not {quoted(kind)}.")
    if kind in types:
        chosen = imported(types[kind], f"{where}.type")
        return validated(chosen, {"type": kind, **fields}, where, source)
    if "." not in kind:
        raise RecipeError(f"{where}.type: unknown type {quoted(kind)}{hint(kind, list(types))}")
    if not source.is_built:
        return None, {"type": kind, **fields}
    return _users(section, kind, fields, where, source)


def _users(
    section: str, kind: str, fields: dict[str, Any], where: str, source: Source
) -> tuple[Any, dict[str, Any]]:
    """A component of the user's, by dotted path; nothing is called that is none of this kind."""
    protocols = [imported(path, where) for path in PROTOCOLS[section]]
    refuse_untrusted(kind, f"{where}.type")
    if is_of_python(kind):
        refuse_shadowed(kind, source.places.folder, f"{where}.type")
        raise _unfit(section, kind, where, [*_methods(protocols[0])], "it is of Python itself")
    if kind.partition(".")[0] in sys.modules:
        # Another module of this name may lack what is looked for.
        refuse_shadowed(kind, source.places.folder, f"{where}.type")
    chosen = imported(kind, f"{where}.type")
    refuse_shadowed(kind, source.places.folder, f"{where}.type")
    if not callable(chosen) and all(_lacking(chosen, protocol) for protocol in protocols):
        raise RecipeError(f"{where}.type: {kind} is neither a class nor a function.")
    if not inspect.isclass(chosen):
        return _as_it_is(section, kind, chosen, fields, where), {"type": kind}
    component, resolved = _instance(section, kind, chosen, fields, where, source)
    _refuse_missing(section, kind, component, where)
    return component, resolved


def _refuse_missing(section: str, kind: str, component: Any, where: str) -> None:
    """Refuse an object that lacks something of every protocol of its section."""
    protocols = [imported(path, where) for path in PROTOCOLS[section]]
    lacking = [_missing(component, protocol) for protocol in protocols]
    if all(lacking):
        raise _unfit(section, kind, where, lacking[0])


def _unfit(
    section: str,
    kind: str,
    where: str,
    lacking: Sequence[str],
    why: str = "an object that was passed from Python can be used from Python only",
) -> RecipeError:
    return RecipeError(
        f"{where}.type: {kind} is not for {section}: it has no {', '.join(lacking)} ({why})."
    )


def _methods(protocol: Any) -> list[str]:
    """What has to be there before anything is called; other attributes an `__init__` may set."""
    return [key for key in vars(protocol) if key[0] != "_"]


def _lacking(part: Any, protocol: Any) -> list[str]:
    """The methods of a protocol that an object, or a class and its annotations, do not have."""
    bases = part.__mro__ if inspect.isclass(part) else ()
    annotated = {name for base in bases for name in inspect.get_annotations(base)}
    return [
        name for name in _methods(protocol) if not hasattr(part, name) and name not in annotated
    ]


def _missing(component: Any, protocol: Any) -> list[str]:
    return [
        key
        for key in {**vars(protocol), **protocol.__annotations__}
        if key[0] != "_" and not hasattr(component, key)
    ]


def _instance(
    section: str, kind: str, chosen: type, fields: dict[str, Any], where: str, source: Source
) -> tuple[Any, dict[str, Any]]:
    """An instance of a class of the user's, if that has the methods of the section."""
    protocols = [imported(path, where) for path in PROTOCOLS[section]]
    lacking = [_lacking(chosen, protocol) for protocol in protocols]
    if all(lacking):
        if section == "reward" and any("__call__" in vars(base) for base in chosen.__mro__):
            raise RecipeError(
                f"{where}.type: {kind} is a class whose instances can be called (it has __call__); "
                f"name an instance, as `mine = {chosen.__name__}()` in its module, or give it a "
                "method score."
            )
        raise _unfit(section, kind, where, lacking[0])
    with users_errors(f"{where}: {kind}"):
        if issubclass(chosen, BaseModel):
            component, resolved = validated(chosen, fields, where, source)
            return component, {**resolved, "type": kind}
        _refuse_arguments(chosen, (), fields, f"{where}: {kind}")
        return chosen(**fields), {"type": kind, **fields}


def _as_it_is(section: str, kind: str, chosen: Any, fields: Mapping[str, Any], where: str) -> Any:
    """An object of the user's, or in the section of rewards what can be called."""
    protocols = [imported(path, where) for path in PROTOCOLS[section]]
    is_function = all(_lacking(chosen, protocol) for protocol in protocols)
    if fields:
        what = "a function" if is_function else "an object"
        raise RecipeError(f"{where}: {what} takes no keys, but {quoted(sorted(fields))} are given.")
    if not is_function:
        _refuse_missing(section, kind, chosen, where)
        return chosen
    if section != "reward":
        why = "a function is none; name a class or an object"
        raise _unfit(section, kind, where, _methods(protocols[0]), why)
    with users_errors(f"{where}: {kind}"):
        _refuse_arguments(chosen, ("images", "prompts", "metadata"), {}, f"{where}: {kind}")
    return chosen


def _refuse_arguments(
    function: Any, positional: Sequence[str], named: Mapping[str, Any], where: str
) -> None:
    """Refuse arguments that do not fit the signature of what is to be called."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        if named:
            raise RecipeError(f"{where} does not say which keys it takes.") from None
        return
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        given = f" (it is called with {', '.join(positional)})" if positional else ""
        raise RecipeError(f"{where} {error}{given}.") from None


def validated(
    chosen: type[BaseModel], fields: dict[str, Any], where: str, source: Source = Source()
) -> tuple[BaseModel, dict[str, Any]]:
    """An instance of a class, and its fields with defaults written out; see `section_of`."""
    if chosen.model_config.get("extra", "ignore") == "ignore":
        # pydantic would drop them in silence.
        names = sorted(chosen.model_fields)
        aliases = {field.alias for field in chosen.model_fields.values()}
        for key in fields:
            if key not in names and key not in aliases:
                raise RecipeError(f"{where}: unknown key {quoted(key)}{hint(key, names)}")
    nested = chosen.parts if issubclass(chosen, Component) else {}
    built: dict[str, Any] = {}
    written: dict[str, Any] = {}
    for key, section in nested.items():
        build = _named_parts if holds_several(chosen, key) else _part
        built[key], written[key] = build(
            section, fields.get(key), f"{where}.{key}", source.within(key)
        )
    plain = {key: value for key, value in fields.items() if key not in nested}
    try:
        # JSON rules: lists may become tuples and strings paths, but "8" is no number.
        text = json.dumps(plain, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: its values are no JSON ({error}).") from None
    try:
        component = chosen.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise RecipeError(explained(error, chosen, where)) from None
    if isinstance(component, Component):
        component = component.placed(source.places)
    else:
        component = placed(component, source.places)
    resolved = component.model_dump(mode="json", exclude={*nested})
    component = component.model_copy(update=built)
    if isinstance(component, Component):
        try:
            component.check_parts()
        except ValueError as error:
            raise RecipeError(f"{where}: {error}.") from None
    return component, dict(sorted({**resolved, **written}.items(), key=lambda kv: kv[0] != "type"))


def _part(section: str, fields: Any, where: str, source: Source) -> tuple[Any, dict[str, Any]]:
    """A component inside of another one."""
    return component_of(section, fields_of(fields, where), where, source)


def _named_parts(
    section: str, named: Any, where: str, source: Source
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Components inside of another one, by name."""
    named = fields_of(named, where, "names, each with keys and values")
    built = {
        n: _part(section, fields, f"{where}.{n}", source.within(n)) for n, fields in named.items()
    }
    return {n: part for n, (part, _) in built.items()}, {n: w for n, (_, w) in built.items()}


def holds_several(component: type[BaseModel], key: str) -> bool:
    """Whether a field for parts holds several, by name."""
    default = component.model_fields[key].get_default(call_default_factory=True)
    return isinstance(default, Mapping)
