"""Asking a vision-language model behind an OpenAI-compatible server about images."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import sqlite3
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from entroflow.component import Component
from entroflow.errors import InputError
from entroflow.pictures import to_pil
from entroflow.prompts import Prompt
from entroflow.rewards.asking import Asker, Limits, Reply
from entroflow.rewards.base import Status

PLACE = "{prompt}"
"""Where a template holds the prompt."""


class Served(Component):
    """Who asks a server: which one, with which words, and how patiently.

    Any server with `POST /chat/completions` in the manner of OpenAI will do. The temperature is 0.
    What fails is tried again with growing pauses until the deadline, then masked.
    """

    waits: ClassVar[bool] = True
    read_from: ClassVar[tuple[str, ...]] = ("template",)

    url: str = Field("http://127.0.0.1:8080/v1", description="of the server, up to its version")
    model: str = Field(description="name under which it serves the model")
    template: Path | None = Field(
        None, description="file with the question, `{prompt}` where the prompt goes; else our own"
    )
    max_tokens: int = Field(4096, ge=1, description="most tokens of an answer")
    image_format: Literal["jpeg", "png"] = Field("jpeg", description="jpeg is of quality 95")
    in_flight: int = Field(16, ge=1, description="most questions at the same time")
    per_second: float | None = Field(None, gt=0, description="most questions in a second")
    timeout: float = Field(120.0, gt=0, description="seconds for one attempt")
    deadline: float = Field(
        300.0, gt=0, description="seconds for a question, with all its attempts"
    )
    attempts: int = Field(5, ge=1, description="most attempts of a question")
    cache: Path | None = Field(
        None, description="file that keeps answers, so that no question is asked twice"
    )
    key_variable: str = Field(
        "OPENAI_API_KEY", description="environment variable with the API key; may be unset"
    )

    @property
    @abstractmethod
    def own_template(self) -> str:
        """The question where no file holds another."""

    def ask(
        self,
        images: Tensor,
        shown: Sequence[Sequence[int]],
        prompts: Sequence[Prompt],
        read: Callable[[str], float | None],
    ) -> tuple[Tensor, tuple[Status, ...]]:
        """Ask m questions.

        Args:
            images: [n, 3, H, W] in [0, 1]; each is encoded once.
            shown: [m] the images of each question, in order.
            prompts: [m].
            read: what an answer says; None where it can't be read.

        Returns:
            [m] numbers in float64, NaN where the status [m] is not ok.
        """
        pictures = [_encoded(image, self.image_format) for image in images]
        questions = [
            self._question([pictures[i] for i in of_one], prompt)
            for of_one, prompt in zip(shown, prompts, strict=True)
        ]
        with _MAKING:
            asker, memory = self._asker, self._memory
        keys = [self._key(question) for question in questions]
        known = memory.find(keys) if memory else {}
        open_ = {key: body for key, body in zip(keys, questions, strict=True) if key not in known}
        replies = dict(zip(open_, asker.ask_all(list(open_.values())), strict=True))
        said = {key: _text(reply) for key, reply in replies.items()}
        points = {
            key: None if text is None else read(text) for key, text in {**said, **known}.items()
        }
        if memory:
            readable = {k: t for k, t in said.items() if t is not None and points[k] is not None}
            memory.keep(readable)
        statuses = [
            Status.OK
            if points[key] is not None
            else replies[key].status
            if key in replies and replies[key].status is not Status.OK
            else Status.UNPARSED
            for key in keys
        ]
        values = [math.nan if points[key] is None else points[key] for key in keys]
        return torch.tensor(values, dtype=torch.float64), tuple(statuses)

    def check_parts(self) -> None:
        """Read the template, so that a wrong one shows when the recipe is loaded.

        Raises:
            InputError: it can't be read, or has no place for the prompt.
        """
        self._check_words()

    @cached_property
    def _asker(self) -> Asker:
        key = os.environ.get(self.key_variable)
        return Asker(
            self.url.rstrip("/") + "/chat/completions",
            {"Authorization": f"Bearer {key}"} if key else {},
            Limits(self.in_flight, self.per_second, self.timeout, self.deadline, self.attempts),
        )

    @cached_property
    def _memory(self) -> _Memory | None:
        return _Memory(self.cache) if self.cache is not None else None

    def _check_words(self) -> None:
        if PLACE not in self._words:
            raise InputError(f"template: {self.template} has no {PLACE} for the prompt")

    @cached_property
    def _words(self) -> str:
        if self.template is None:
            return self.own_template
        try:
            return self.template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"template: can't read {self.template} ({error})") from None

    def _question(self, pictures: Sequence[str], prompt: Prompt) -> dict[str, Any]:
        # Images first, then words: so a server can reuse what it computed of the first image.
        seen = [{"type": "image_url", "image_url": {"url": address}} for address in pictures]
        # Not `format`: a prompt may hold braces.
        words = {"type": "text", "text": self._words.replace(PLACE, prompt.text)}
        return {
            "model": self.model,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "messages": [{"role": "user", "content": [*seen, words]}],
        }

    def _key(self, question: Mapping[str, Any]) -> str:
        """A digest of all that decides the answer."""
        text = json.dumps([self.url, question], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


_MAKING = threading.Lock()
"""Held while a connection or a cache is made: several threads may ask for the first time."""


class _Memory:
    """Answers on disk, by the digest of their question; for several threads."""

    def __init__(self, path: Path) -> None:
        self._one = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open = sqlite3.connect(path, check_same_thread=False)
            with self._open:
                self._open.execute(
                    "CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer TEXT)"
                )
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"cache: {path} is no cache of answers ({error}).") from None

    def find(self, questions: Sequence[str]) -> dict[str, str]:
        with self._one:
            rows = [
                self._open.execute("SELECT * FROM answers WHERE question = ?", (each,)).fetchone()
                for each in questions
            ]
        return {row[0]: row[1] for row in rows if row is not None}

    def keep(self, answers: Mapping[str, str]) -> None:
        with self._one, self._open:
            self._open.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", answers.items())


def _text(reply: Reply) -> str | None:
    """What the model said; None where a reply does not hold it."""
    try:
        assert reply.body is not None
        said = reply.body["choices"][0]["message"]["content"]
    except (AssertionError, KeyError, IndexError, TypeError):
        return None
    return said if isinstance(said, str) else None


def _encoded(image: Tensor, kind: str) -> str:
    """One image [3, H, W] as a `data:` address."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format=kind, **({"quality": 95} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
