"""The base class of everything a recipe can choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

MOST = 2**31 - 1
"""Largest whole number but for seeds and budgets; of more, products would leave 64 bits."""


class Component(BaseModel):
    """A frozen, typed part of a recipe. Its fields are the keys a recipe may set.

    Attributes:
        parts: fields that are components themselves -> the section whose types they have. Such a
            field is declared `Any`; where its default is a mapping, it holds components by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    parts: ClassVar[Mapping[str, str]] = {}

    @field_validator("*")
    @classmethod
    def _is_no_more_than_can_be(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        if isinstance(value, int) and abs(value) > MOST and not name.endswith(("seed", "budget")):
            raise ValueError(f"input should be at most {MOST}")
        return value
