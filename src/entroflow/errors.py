"""Errors that a user can mend."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input: the message says in one line what, where, and how to mend it.

    The command line prints it without a traceback and exits with code 2.
    """


class RecipeError(InputError):
    """A recipe is wrong; the message says what, where, and how to mend it, in one line."""
