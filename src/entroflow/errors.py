"""Errors that a user can mend."""

from __future__ import annotations

from entroflow.redaction import without_secrets

LONGEST = 1000
"""Characters of a message."""
QUOTED = 100
"""Characters of a value within a message."""


class InputError(ValueError):
    """Wrong input: the message says in one line what, where, and how to mend it.

    The command line prints it without a traceback and exits with code 2. Whatever is quoted in it,
    the message is one line of bounded length that a terminal can show, and no secret of the
    environment is in it.
    """

    def __init__(self, message: str) -> None:
        # A secret that is cut in two would not be recognised.
        super().__init__(one_line(without_secrets(message)))


class RecipeError(InputError):
    """A recipe is wrong; the message says what, where, and how to mend it, in one line."""


class UntrustedError(RecipeError):
    """A recipe needs to be trusted: for code of a folder elsewhere, or an API key that it sends."""


def one_line(text: str, most: int = LONGEST) -> str:
    """A text in one line; of more than `most` characters the middle is left out."""
    line = " ".join(text.split())
    if len(line) > most:
        line = f"{line[: 2 * most // 3]} ... {line[-(most // 3) :]}"
    return printable(line)


def printable(text: str) -> str:
    """A text whose control characters are spelled out: a terminal would obey them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def quoted(value: object) -> str:
    """A value as it stands in a message."""
    return one_line(repr(value), QUOTED)
