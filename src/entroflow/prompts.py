"""Prompts and where they come from.

A source answers one question: which prompts does iteration i train on? The answer is a function of
the seed and i alone, so a resumed run continues with the prompts it would have had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from pydantic import Field

from entroflow.component import Component
from entroflow.data_sets import FORMATS, read_data_set
from entroflow.errors import InputError
from entroflow.noise import Stream, generator
from entroflow.places import PathOrName, Places
from entroflow.records import UNREADABLE, Record, read_records


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what a reward may need to know beside its words."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


class PromptSource(Protocol):
    """Where prompts come from."""

    def batch(self, seed: int, iteration: int) -> list[Prompt]:
        """The prompts of one iteration."""
        ...


@runtime_checkable
class ListedSource(Protocol):
    """A source whose prompts can be listed: they are all looked at before a run, and a run is
    resumed only with the same ones.
    """

    def listed(self) -> Sequence[Prompt]:
        """All prompts, in an order that stays."""
        ...


class _ListedPrompts(Component):
    """Prompts from a finite list: every epoch visits each once, in a new random order."""

    per_iteration: int = Field(8, ge=1, description="prompts per iteration")

    def batch(self, seed: int, iteration: int) -> list[Prompt]:
        """See the class."""
        prompts = self._prompts
        first = iteration * self.per_iteration
        chosen = []
        order, epoch_of_order = np.empty(0, dtype=np.int64), -1
        for position in range(first, first + self.per_iteration):
            epoch, index = divmod(position, len(prompts))
            if epoch != epoch_of_order:
                order = generator(seed, Stream.PROMPTS, row=epoch).permutation(len(prompts))
                epoch_of_order = epoch
            chosen.append(prompts[order[index]])
        return chosen

    def listed(self) -> list[Prompt]:
        """See `ListedSource`."""
        return self._prompts

    @cached_property
    def _prompts(self) -> list[Prompt]:
        prompts = self.load()
        if not prompts:
            raise InputError("the prompt list is empty.")
        return prompts

    def load(self) -> list[Prompt]:
        """All prompts."""
        raise NotImplementedError


class TextPrompts(_ListedPrompts):
    """Prompts of a file, read by its suffix in any case.

    - .txt, .text, .lst, .list, .prompts or none: one prompt per line; blank lines are skipped;
    - .jsonl, .ndjson: one JSON object per line;
    - .json: a list of objects or of texts, an object with one such list, or JSON Lines;
    - .csv, .tsv: a table with a header, quoted as in RFC 4180; all metadata are texts;
    - .parquet: a table; needs the extra `datasets`.

    Under `key` stands the prompt, all else of a record is its metadata. Other suffixes, and files
    that do not hold what theirs says, are refused.
    """

    type: Literal["text"] = "text"
    path: Path = Field(description="file of prompts, in UTF-8 unless it is Parquet")
    key: str = Field("prompt", description="key or column of the prompt in records")

    def load(self) -> list[Prompt]:
        """All prompts."""
        return read_prompts(self.path, self.key)


class JSONLPrompts(TextPrompts):
    """The type `text` by another name: here, too, a file is read by its suffix."""

    type: Literal["jsonl"] = "jsonl"  # type: ignore[assignment]


class DatasetPrompts(_ListedPrompts):
    """A data set: a local file or folder, or the name of one on a hub.

    A file is read by its suffix, as by the type `text`; all else by `datasets.load_dataset`. What
    lies beside the recipe or in the current folder comes first; a name on the hub has the form
    `user/name`.
    """

    type: Literal["dataset"] = "dataset"
    name: Annotated[str, PathOrName(FORMATS, in_folders=True)] = Field(
        description="local file or folder, name on the hub, or format such as json"
    )
    config: str | None = Field(None, description="configuration of the data set, if it has several")
    split: str = Field("train", description="split of the data set")
    key: str = Field("prompt", description="column of the prompt")
    data_files: Annotated[tuple[str, ...], PathOrName()] = Field(
        (), description="files to read; empty: the data set's own"
    )

    def placed(self, places: Places) -> Self:
        """See `Component.placed`; the files of a data set are named from within it."""
        found = super().placed(places)
        if self.name not in FORMATS:
            return found
        pattern = places.within("data_files").pattern
        return found.model_copy(update={"data_files": tuple(map(pattern, self.data_files))})

    def load(self) -> list[Prompt]:
        """All prompts."""
        try:
            records = read_data_set(self.name, self.config, self.split, self.key, self.data_files)
        except ImportError:
            raise InputError(
                "prompts of type 'dataset' need the extra: pip install 'entroflow[datasets]'"
            ) from None
        return [_prompt_of(record, self.key) for record in records]


def read_prompts(path: Path, key: str) -> list[Prompt]:
    """The prompts of a file by its suffix: one in a line, or under `key` of its records.

    Args:
        path: of the file.
        key: under which a record holds its prompt.

    Raises:
        InputError: see `read_records`; a record has no text under `key`, or an empty one.
    """
    return [_prompt_of(record, key) for record in read_records(path, key)]


def read_text(path: Path) -> list[Prompt]:
    """The prompts of a file whose records, if it has any, hold them under `prompt`."""
    return read_prompts(path, "prompt")


def _prompt_of(record: Record, key: str) -> Prompt:
    content, where = record.content, record.where
    if isinstance(content, str):
        return Prompt(_checked(content, where))
    if not isinstance(content, Mapping) or not isinstance(content.get(key), str):
        names = [*map(str, content)] if isinstance(content, Mapping) else []
        value = f" ({key!r} is {repr(content[key])[:60]})" if key in names else ""
        raise InputError(
            f"{where} has no text under {key!r}; it has: {', '.join(sorted(names)) or 'none'}"
            f"{value}."
        )
    metadata = {name: value for name, value in content.items() if name != key}
    return Prompt(_checked(content[key], where), metadata)


def _checked(text: str, where: str) -> str:
    """A prompt that can be read.

    Raises:
        InputError: it is empty, or holds what is no text.
    """
    if not text.strip():
        raise InputError(f"{where}: the prompt is empty; remove it, or write one.")
    if odd := UNREADABLE.search(text):
        raise InputError(f"{where}: the prompt holds {odd[0]!r}, which is no character of a text.")
    return text
