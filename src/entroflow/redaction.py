"""Keys, tokens and passwords are cut out of every text before it is printed, logged or stored.

What is secret are the values of environment variables that are named like a key (`OPENAI_API_KEY`,
`HF_TOKEN`, ...) or that a recipe names, and what a url holds for the server alone.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from urllib.parse import quote, quote_plus

SHORTEST = 6
"""Characters of a secret: shorter values (`EMPTY`, `none`) stand for no key."""

_SECRET = re.compile(r"(?:key|token|secret|password|passwd|_pat)(?:_?\d+)?\Z", re.IGNORECASE)
"""The end of the name of a variable that holds a secret."""
# Bounded, so that a long text without an `=` takes no longer than its length.
_QUERY = re.compile(r"([?&;]([^=&;\s?]{1,64})=)([^&;#\s\"'<>]+)")
_USER = re.compile(r"(?<=://)[^/?#\s\"'<>]{1,512}@")
_SECRET_IN_QUERY = re.compile(
    r"key|token|secret|passw|pwd|auth|credential|signature|\A(?:sig|code|pass|sas)\Z",
    re.IGNORECASE,
)

_named: set[str] = set()


def hold_back(variable: str) -> None:
    """From now on the value of this environment variable is secret, whatever its name is."""
    _named.add(variable)


def without_secrets(text: str) -> str:
    """The text, with `<NAME>` in the place of each secret of the environment, and `***` in urls."""
    for secret, name in _secrets():
        if secret in text:
            text = text.replace(secret, f"<{name}>")
        text = _spelled(secret).sub(f"<{name}>", text)
    text = _USER.sub("***@", text)
    return _QUERY.sub(_without_value, text)


def holds_secret(url: str) -> bool:
    """Whether a url holds a user, a password, a key, or the value of a secret variable."""
    return without_secrets(url) != url


def _secrets() -> list[tuple[str, str]]:
    """Each secret in every form that it may have in a text, and its variable; longest first."""
    forms = {
        form: name
        for name, value in os.environ.items()
        if (name in _named or _SECRET.search(name)) and len(value.strip()) >= SHORTEST
        for form in _forms(value.strip())
    }
    return sorted(forms.items(), key=lambda entry: -len(entry[0]))


@cache
def _spelled(secret: str) -> re.Pattern[str]:
    """A secret whose signs may be escaped in any way that writers of JSON or urls choose."""
    return re.compile(
        "".join(
            c if c.isalnum() else rf"(?i:\\*{re.escape(c)}|\\+u{ord(c):04x}|%{ord(c):02x})"
            for c in secret
        )
    )


def _forms(secret: str) -> Iterator[str]:
    raw = os.fsencode(secret)
    yield secret
    yield " ".join(secret.split())
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield repr(secret)[1:-1]
    yield repr(raw)[2:-1]
    yield quote(raw, safe="")
    yield quote_plus(raw)
    yield html.escape(secret)


def _without_value(found: re.Match[str]) -> str:
    return f"{found[1]}***" if _SECRET_IN_QUERY.search(found[2]) else found[0]
