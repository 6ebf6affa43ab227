"""Functions of the user's, as they are called."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any


def uncached(function: Any) -> Any:
    """A function without a cache of functools, whose keys can't be lists of prompts."""
    if isinstance(function, functools.partial):
        inner = uncached(function.func)
        if inner is function.func:
            return function
        return functools.partial(inner, *function.args, **function.keywords)
    if isinstance(function, MethodType):
        return MethodType(uncached(function.__func__), function.__self__)
    while hasattr(function, "cache_clear") and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
