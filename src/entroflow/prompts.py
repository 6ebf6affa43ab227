"""Prompts and where they come from.

A source answers one question: which prompts does iteration i train on? The answer is a function of
the seed and i alone, so a resumed run continues with the prompts it would have had.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field

from entroflow.component import Component
from entroflow.errors import InputError
from entroflow.sampling.noise import Stream, generator
from entroflow.shapes import grammar


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


class ShapesPrompts(Component):
    """Prompts of the shapes world: a random skill, then a random caption of one split."""

    type: Literal["shapes"] = "shapes"
    per_iteration: int = Field(8, ge=1, description="prompts per iteration")
    split: grammar.Split = Field("train", description="captions to draw from")
    skills: tuple[str, ...] = Field(
        grammar.SKILLS, min_length=1, description="skills, dealt evenly over the prompts"
    )

    def model_post_init(self, _: Any) -> None:
        """Refuse unknown skills."""
        unknown = set(self.skills) - set(grammar.SKILLS)
        if unknown:
            raise ValueError(
                f"unknown skills {sorted(unknown)}; known: {', '.join(grammar.SKILLS)}"
            )

    def batch(self, seed: int, iteration: int) -> list[Prompt]:
        """Skills are dealt evenly in random order; captions are drawn with replacement."""
        rng = generator(seed, Stream.PROMPTS, iteration)
        dealt = [self.skills[i % len(self.skills)] for i in range(self.per_iteration)]
        skills = rng.permutation(len(self.skills))
        renamed = dict(zip(self.skills, (self.skills[i] for i in skills), strict=True))
        return [Prompt(grammar.text(grammar.draw(rng, self.split, (renamed[s],)))) for s in dealt]


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
    """One prompt per line of a text file; blank lines are skipped."""

    type: Literal["text"] = "text"
    path: Path = Field(description="text file in UTF-8")

    def load(self) -> list[Prompt]:
        """All prompts."""
        return read_text(self.path)


class JSONLPrompts(_ListedPrompts):
    """One JSON object per line; `key` holds the prompt, everything else becomes its metadata."""

    type: Literal["jsonl"] = "jsonl"
    path: Path = Field(description="JSON Lines file in UTF-8")
    key: str = Field("prompt", description="key of the prompt in each object")

    def load(self) -> list[Prompt]:
        """All prompts."""
        return read_jsonl(self.path, self.key)


class DatasetPrompts(_ListedPrompts):
    """A data set that `datasets.load_dataset` finds: a hub name, or a local file or folder."""

    type: Literal["dataset"] = "dataset"
    name: str = Field(description="hub name, local folder, or format such as json")
    config: str | None = Field(None, description="configuration of the data set, if it has several")
    split: str = Field("train", description="split of the data set")
    key: str = Field("prompt", description="column of the prompt")
    data_files: tuple[str, ...] = Field((), description="files to read; empty: the data set's own")

    def load(self) -> list[Prompt]:
        """All prompts."""
        try:
            import datasets
        except ImportError:
            raise InputError(
                "prompts of type 'dataset' need the extra: pip install 'entroflow[datasets]'"
            ) from None
        if self.name == "pandas":
            raise InputError("the format pandas reads pickles, which run code; give another.")
        files = list(self.data_files) or None
        try:
            table = datasets.load_dataset(
                self.name, self.config, split=self.split, data_files=files
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise InputError(f"can't load the data set {self.name!r}: {error}") from error
        return [
            _prompt_from_record(dict(record), self.key, f"{self.name}[{index}]")
            for index, record in enumerate(table)
        ]


def read_prompts(path: Path, key: str) -> list[Prompt]:
    """The prompts of a file: JSON objects if its name ends in .jsonl, else one in a line."""
    return read_jsonl(path, key) if path.suffix == ".jsonl" else read_text(path)


def read_text(path: Path) -> list[Prompt]:
    """One prompt per line; blank lines are skipped."""
    return [Prompt(line.strip()) for line in _lines(path) if line.strip()]


def read_jsonl(path: Path, key: str) -> list[Prompt]:
    """One JSON object per line; `key` holds the prompt, everything else becomes its metadata."""
    prompts = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is not JSON: {error}") from None
        prompts.append(_prompt_from_record(record, key, f"{path}:{number}"))
    return prompts


def _lines(path: Path) -> list[str]:
    try:
        # Not str.splitlines: it also cuts at characters that JSON allows within a text.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"there is no prompt file {path}.") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise InputError(f"{path} is not a text file in UTF-8.") from None


def _prompt_from_record(record: Any, key: str, where: str) -> Prompt:
    if not isinstance(record, Mapping) or not isinstance(record.get(key), str):
        found: Sequence[str] = sorted(record) if isinstance(record, Mapping) else ()
        raise InputError(
            f"{where} has no text under {key!r}; it has: {', '.join(found) or 'none'}."
        )
    return Prompt(record[key], {name: value for name, value in record.items() if name != key})
