"""The base class of everything a recipe can choose."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Component(BaseModel):
    """A frozen, typed part of a recipe. Its fields are the keys a recipe may set."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
