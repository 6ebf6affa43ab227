"""How a server is reached: its url, and the key that opens it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from entroflow.errors import InputError, quoted
from entroflow.redaction import hold_back, holds_secret

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable with the API key, where a recipe names no other."""
THIS_MACHINE = re.compile(r"(?i:https?://(localhost|127\.0\.0\.1|\[::1\]))(:\d+)?([/?].*)?")
"""A url of a server that is reached without leaving this machine."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY = re.compile(r"[!-~]*")
"""What an HTTP header can hold, without white space, as no API key has any."""


def api_key(variable: str) -> str | None:
    """The API key that an environment variable holds, without white space around it.

    Returns:
        None where the variable is unset or empty.

    Raises:
        InputError: the name is no name, or the value can't be sent in a header. Neither is shown:
            a wrong name may be the key itself.
    """
    if not _VARIABLE.fullmatch(variable):
        raise InputError(
            "key_variable is the name of an environment variable (letters, digits and "
            "underscores, as OPENAI_API_KEY), not the key itself"
        )
    hold_back(variable)
    key = os.environ.get(variable, "").strip()
    if not _KEY.fullmatch(key):
        raise InputError(
            f"key_variable: the environment variable {variable} holds no API key: it has white "
            "space or control characters inside, or others than ASCII. Set it anew (its value is "
            "not shown)"
        )
    return key or None


def endpoint(url: str, path: str) -> str:
    """The address below the url of a server; its query, as `?api-version=1`, is kept.

    Raises:
        InputError: it is no address of a web server, or holds a password or a key, which would be
            written down with the recipe.
    """
    # Not the host: some servers bear the name that is set in the place of a key, as ollama.
    if holds_secret(re.sub(r"(?<=://)[\w.-]+(?=[:/?#]|\Z)", "", url)):
        raise InputError(
            "url holds a user, a password or a key, which would be written into the run folder. "
            "Leave it out; the key is read from the environment variable that key_variable names"
        )
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known or parts.fragment or not re.fullmatch(r"[!-~]+", url):
        raise InputError("url must be the address of a server, as http://127.0.0.1:8080/v1")
    return parts._replace(path=f"{parts.path.rstrip('/')}/{path}").geturl()


@dataclass(frozen=True)
class SentKey:
    """A part of a recipe that sends an API key to another machine.

    Attributes:
        keys: where it stands in the recipe.
        variable: the environment variable with the API key.
        host: of the server.
    """

    keys: tuple[str, ...]
    variable: str
    host: str


def sent_keys(fields: Any, keys: tuple[str, ...] = ()) -> Iterator[SentKey]:
    """The parts that send an API key to another machine, of what a recipe says.

    Args:
        fields: of a recipe, a section or a part, as they are written.
        keys: where they stand in the recipe.
    """
    if not isinstance(fields, Mapping):
        return
    url, variable = fields.get("url"), fields.get("key_variable", KEY_VARIABLE)
    if isinstance(url, str) and not THIS_MACHINE.fullmatch(url):
        # What is no name may be the key itself.
        is_name = isinstance(variable, str) and _VARIABLE.fullmatch(variable)
        yield SentKey(keys, variable if is_name else "a variable", _host(url))
    for key, value in fields.items():
        yield from sent_keys(value, (*keys, str(key)))


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or quoted(url)
    except ValueError:
        return quoted(url)
