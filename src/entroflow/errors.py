"""Errors that a user can mend."""

from __future__ import annotations

from entroflow.redaction import without_secrets


class InputError(ValueError):
    """Wrong input: the message says in one line what, where, and how to mend it.

    The command line prints it without a traceback and exits with code 2. No secret of the
    environment is in it, whatever it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class RecipeError(InputError):
    """A recipe is wrong; the message says what, where, and how to mend it, in one line."""
