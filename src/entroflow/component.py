"""The base class of everything a recipe can choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Component(BaseModel):
    """A frozen, typed part of a recipe. Its fields are the keys a recipe may set.

    Attributes:
        parts: fields that are components themselves -> the section whose types they have. Such a
            field is declared `Any`; where its default is a mapping, it holds components by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    parts: ClassVar[Mapping[str, str]] = {}
