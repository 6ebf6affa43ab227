"""What pydantic finds wrong with the keys of a component, in one line for people."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from entroflow.errors import QUOTED, quoted


def explained(error: ValidationError, chosen: type[BaseModel], where: str) -> str:
    """The first of its errors in a line, and how many more there are.

    Args:
        chosen: the component that was to be built.
        where: what the line calls it.
    """
    errors = error.errors()
    first = errors[0]
    several = [e for e in errors if e["loc"][:1] == first["loc"][:1] and _of_one_form(e, chosen)]
    if several:
        first = _of_all_forms(several)
        errors = [first, *(e for e in errors if e["loc"][:1] != first["loc"][:1])]
    key = ".".join(str(part) for part in first["loc"])
    more = f" ({len(errors) - 1} more like this)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        # Where a type has one value, another part of the recipe has chosen it.
        names = [
            name for name, field in chosen.model_fields.items()
            if name != "type" or len(get_args(field.annotation)) > 1
        ]  # fmt: skip
        return f"{where}: unknown key {quoted(key)}{hint(key, names)}{more}"
    if first["type"] == "missing":
        return f"{where}: key {key!r} is missing{more}."
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return f"{where}: {message}{more}."
    message = message[0].lower() + message[1:]
    return f"{where}.{key}: {message}, not {quoted(first['input'])}{more}."


def _of_one_form(error: ErrorDetails, chosen: type[BaseModel]) -> bool:
    """Whether an error is about one of several forms that a key may have, as pydantic reports."""
    path = error["loc"]
    field = chosen.model_fields.get(str(path[0])) if len(path) > 1 else None
    forms = get_args(field.annotation) if field and not isinstance(path[1], int) else ()
    return len([form for form in forms if form is not type(None)]) > 1


def _of_all_forms(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """One error for a key that has none of its forms: inside of a list where that is what it is."""
    deepest = max(errors, key=lambda error: len(error["loc"]))
    # The second part of the path is pydantic's name of a form.
    path = (*deepest["loc"][:1], *deepest["loc"][2:])
    if len(path) > 1:
        return {**deepest, "loc": path}
    forms = [
        error["msg"].partition(", unable")[0].removeprefix("Input should be ") for error in errors
    ]
    message = "Input should be " + ", or ".join(dict.fromkeys(forms))
    message = message.replace("array", "list").replace("tuple", "list")
    return {**deepest, "loc": path, "msg": message}


def hint(word: str, words: Sequence[str]) -> str:
    """The end of a sentence about an unknown word: what may have been meant, or all words."""
    near = get_close_matches(str(word)[:QUOTED], words, n=1, cutoff=0.5)
    listed = f" (known: {', '.join(words)})." if len(words) <= 16 else "."
    return f"; did you mean {near[0]!r}?{listed if not near else ''}" if near else f"{listed}"
