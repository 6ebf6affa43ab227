"""The base class of everything a recipe can choose."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from entroflow.errors import InputError
from entroflow.places import PathOrName, Places, holds_path, with_places

MOST, MOST_OF_ALL = 2**31 - 1, 2**63 - 1
"""Largest whole number, of whose products 64 bits hold many; the largest of seeds and budgets."""

ModelT = TypeVar("ModelT", bound=BaseModel)


class Component(BaseModel):
    """A frozen, typed part of a recipe. Its fields are the keys a recipe may set.

    Attributes:
        parts: fields that are components themselves -> the section whose types they have. Such a
            field is declared `Any`; where its default is a mapping, it holds components by name.
        read_from: fields that name a file whose content is part of the run, as that of a
            template: it is resumed only with the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    parts: ClassVar[Mapping[str, str]] = {}
    read_from: ClassVar[tuple[str, ...]] = ()

    def placed(self, places: Places) -> Self:
        """This component with absolute paths."""
        return placed(self, places)

    def check_parts(self) -> None:
        """Refuse parts that do not fit together, when they are built; most components have no such.

        Raises:
            ValueError: they don't; the message says which, as the end of a sentence.
        """

    def check(self) -> None:
        """Read what it will need, so that wrong input shows before a run begins.

        What costs time is kept for when it is needed. Its parts are checked by themselves; see
        `inputs.check_parts`.

        Raises:
            InputError: a file is missing, can't be read, or is wrong; the message begins with the
                key that names it.
        """
        for key in self.read_from:
            path = getattr(self, key)
            if isinstance(path, Path):
                try:
                    with path.open("rb") as file:
                        file.read(1)
                except OSError as error:
                    raise InputError(f"{key}: can't read {path} ({error.strerror}).") from None

    @field_validator("*")
    @classmethod
    def _is_no_more_than_can_be(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        most = MOST_OF_ALL if name.endswith(("seed", "budget")) else MOST
        if isinstance(value, int) and abs(value) > most:
            raise ValueError(f"input should be at most {most}")
        return value


def placed(component: ModelT, places: Places) -> ModelT:
    """Settings with absolute paths: of type `Path`, or marked `PathOrName`."""
    found = {}
    for key, field in type(component).model_fields.items():
        value = getattr(component, key)
        marks = [mark for mark in field.metadata if isinstance(mark, PathOrName)]
        if marks and isinstance(value, str):
            found[key] = places.within(key).path_or_name(value, marks[0])
        elif holds_path(value):
            found[key] = with_places(value, places.within(key))
    return component.model_copy(update=found)


def refuse_names(names: Iterable[str], taken: Collection[str], where: str) -> None:
    """Refuse names of parts that can't stand within the name of a metric.

    Args:
        taken: what others are called there.
        where: key that holds the parts.

    Raises:
        ValueError: a name is empty, taken, or has a `/`.
    """
    for name in names:
        if not name.strip():
            raise ValueError(f"{where} holds one without a name; give it one")
        if name in taken or "/" in name:
            raise ValueError(f"{where}.{name}: the name is taken, or has a /; choose another")
