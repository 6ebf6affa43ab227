"""Asking a vision-language model behind an OpenAI-compatible server about images."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import math
import re
import sqlite3
import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
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
from entroflow.redaction import without_secrets
from entroflow.rewards.access import KEY_VARIABLE, api_key, endpoint
from entroflow.rewards.asking import TRANSIENT, Asker, Limits, Once, Reply
from entroflow.rewards.base import Status
from entroflow.rewards.chat import read_reply
from entroflow.rewards.verdicts import Reading

log = logging.getLogger(__name__)

PLACE = "{prompt}"
"""Where a template holds the prompt."""
RESERVED = {
    "model": "it has a key of its own",
    "messages": "they are the template and the images",
    "stream": "an answer is read as a whole",
    "n": "one answer is read to each question",
}
"""What is no key of `body`, and why."""
TELLING = ("root", "parent", "revision", "version", "digest", "sha", "meta", "owned_by")
"""Of what a server lists of a model, what tells one from another; the rest changes by itself."""
LOOK = 30.0
"""Most seconds to look which model a server serves."""


class Served(Component):
    """Who asks a server: which one, with which words, and how patiently.

    Any server with `POST /chat/completions` in the manner of OpenAI will do. The temperature is 0.
    What fails is tried again with growing pauses until the deadline, then masked.
    """

    waits: ClassVar[bool] = True
    section: ClassVar[str]
    """Where a recipe has it, for messages."""
    read_from: ClassVar[tuple[str, ...]] = ("template",)

    url: str = Field("http://127.0.0.1:8080/v1", description="of the server, up to its version")
    model: str = Field(description="name under which it serves the model")
    template: Path | None = Field(
        None, description="file with the question, `{prompt}` where the prompt goes; else our own"
    )
    max_tokens: int = Field(4096, ge=1, description="most tokens of an answer, thoughts included")
    body: dict[str, Any] = Field(
        default_factory=dict,
        description="more keys of the request, as `reasoning_effort: low`; they replace those of "
        "the question, and null leaves one out",
    )
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
    revision: str | None = Field(
        None,
        description="version of the model for the cache, where its name stays the same; else what "
        "the server lists of the model",
    )
    key_variable: str = Field(
        KEY_VARIABLE, description="environment variable with the API key; may be unset"
    )

    @property
    @abstractmethod
    def own_template(self) -> str:
        """The question where no file holds another."""

    @property
    @abstractmethod
    def wanted(self) -> str:
        """What an answer should hold, for messages."""

    def ask(
        self,
        images: Tensor,
        shown: Sequence[Sequence[int]],
        prompts: Sequence[Prompt],
        reading: Reading,
    ) -> tuple[Tensor, tuple[Status, ...]]:
        """Ask m questions.

        Args:
            images: [n, 3, H, W] in [0, 1]; each is encoded once.
            shown: [m] the images of each question, in order.
            prompts: [m].
            reading: how the verdict of an answer is read.

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
        keys = [self._address(question) for question in questions]
        kept = memory.find(keys) if memory else {}
        open_ = {key: body for key, body in zip(keys, questions, strict=True) if key not in kept}
        replies = dict(zip(open_, asker.ask_all(list(open_.values())), strict=True))
        verdicts = {key: self._verdict(reply, reading) for key, reply in replies.items()}
        if memory:
            memory.keep(
                {k: replies[k].body for k, (_, status) in verdicts.items() if status is Status.OK}
            )
        verdicts |= {key: self._verdict(Reply(t, Status.OK), reading) for key, t in kept.items()}
        values, statuses = zip(*(verdicts[key] for key in keys), strict=True) if keys else ((), ())
        return torch.tensor(values, dtype=torch.float64), tuple(statuses)

    def cancel(self) -> None:
        """Give up the questions that are asked now, as nobody waits for the answers any more."""
        if "_asker" in vars(self):
            self._asker.cancel()

    def check_parts(self) -> None:
        """Look at url, key, template and body, so that a wrong one shows when a recipe is loaded.

        Raises:
            InputError: the url or the key can't be used; the template can't be read, or has no
                place for the prompt; the body holds what is no JSON, or not to be changed.
        """
        endpoint(self.url, "chat/completions")
        api_key(self.key_variable)
        if PLACE not in self._words:
            raise InputError(f"template: {self.template} has no {PLACE} for the prompt")
        for key, why in RESERVED.items():
            if key in self.body:
                raise InputError(f"body.{key} can't be set: {why}")
        try:
            text = json.dumps(self.body, allow_nan=False)
        except ValueError:
            raise InputError("body holds a number that is not finite, as JSON has none") from None
        if without_secrets(text) != text or _SECRET_KEY.search(text):
            raise InputError(
                "body holds a secret, which would be written into the run folder. Leave it out; "
                "the key is read from the environment variable that key_variable names"
            )

    def check(self) -> None:
        """See `Component.check`: the template, and the cache, which is made if there is none."""
        super().check()
        _ = self._store

    @cached_property
    def _asker(self) -> Asker:
        key = api_key(self.key_variable)
        return Asker(
            endpoint(self.url, "chat/completions"),
            {"Authorization": f"Bearer {key}"} if key else {},
            Limits(self.in_flight, self.per_second, self.timeout, self.deadline, self.attempts),
            read_reply,
        )

    @cached_property
    def _once(self) -> Once:
        return Once()

    @cached_property
    def _memory(self) -> Memory | None:
        """The answers that are kept; none where it can't be known of which model they are."""
        return None if self._store is None or self._identity is None else self._store

    @cached_property
    def _store(self) -> Memory | None:
        return None if self.cache is None else Memory(self.cache)

    @cached_property
    def _identity(self) -> Mapping[str, Any] | None:
        """What tells the served model from others of its name; None where that can't be asked."""
        if self.revision is not None or self.cache is None:
            return {"revision": self.revision}
        reply = self._asker.look(endpoint(self.url, "models"), min(self.timeout, LOOK))
        if reply.status is not Status.OK and reply.code in {None, *TRANSIENT} - {NO_SUCH_METHOD}:
            log.warning(
                "%s does not say which model it serves, so the answers in %s are not used. "
                "%s.revision names the model without asking.",
                self.url, self.cache, self.section,
            )  # fmt: skip
            return None
        listed = reply.body.get("data") if reply.body else None
        models = [m for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
        return next(
            ({k: m[k] for k in TELLING if k in m} for m in models if m.get("id") == self.model), {}
        )

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
        question = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "messages": [{"role": "user", "content": [*seen, words]}],
            **self.body,
        }
        return {key: value for key, value in question.items() if value is not None}

    def _address(self, question: Mapping[str, Any]) -> str:
        """A digest of all that decides the answer: the server, its model, and the whole request."""
        text = json.dumps([self.url, self._identity, question], sort_keys=True)
        return _digest(text)

    def _verdict(self, reply: Reply, reading: Reading) -> tuple[float, Status]:
        """What a reply says; warns of the first of each kind that says nothing."""
        if reply.status is Status.OK:
            points = reading(reply.body)
            if points is not None:
                return points, Status.OK
            contradicts = reading.contradicts(reply.body)
            reply = Reply(
                None,
                Status.CONTRADICTORY if contradicts else Status.UNPARSED,
                "holds several verdicts" if contradicts else f"holds no {self.wanted}",
                reply.body[-SHOWN:],
            )
        if reply.why:
            ends = f"; it ends {reply.example!r}" if reply.example else ""
            self._once.warn(
                (reply.status, reply.why),
                f"{self.section} ({self.model} at {self.url}): a reply {reply.why}{ends}. "
                f"{self._remedy(reply)} (More of this kind are counted as "
                f"{reply.status.value!r}.)",
            )
        return math.nan, reply.status

    def _remedy(self, reply: Reply) -> str:
        limit = self._limit
        more = f"set {self.section}.{limit[0]}={2 * limit[1]}" if limit else "raise its limit"
        less = f"let the model think less, as by {self.section}.body.reasoning_effort=low."
        template = f"({self.section}.template)"
        remedies = {
            Status.CUT: f"What is cut off never counts: {more}, or {less}",
            Status.EMPTY: f"If it spent all tokens on thoughts, {more}, or {less}",
            Status.TOOL_CALL: "Serve the model without tools.",
            Status.REFUSED: "Such images have no reward.",
            Status.CONTRADICTORY: f"The question must ask for one verdict {template}.",
            Status.UNPARSED: f"The question must ask for it {template}.",
        }
        unknown = reply.status is Status.EMPTY and not reply.example
        return remedies.get(
            Status.ERROR if unknown else reply.status, "The server's log may say why."
        )

    @property
    def _limit(self) -> tuple[str, int] | None:
        """The key that limits the tokens of an answer, and its value."""
        for key in ("max_completion_tokens", "max_tokens"):
            if isinstance(value := self.body.get(key), int):
                return f"body.{key}", value
        return None if "max_tokens" in self.body else ("max_tokens", self.max_tokens)


_SECRET_KEY = re.compile(
    r'"(?:(?:x-)?api[_-]?key|(?:client[_-]?)?secret|password|authorization|access[_-]?token)"\s*+:\s*+"',
    re.IGNORECASE,
)
"""A key of JSON whose value is for the server alone."""
NO_SUCH_METHOD = 501
"""HTTP status of a server that shows nothing at an address, though it may answer at others."""
SHOWN = 200
"""Characters at the end of an answer in a warning."""

_MAKING = threading.Lock()
"""Held while a connection or a cache is made: several threads may ask for the first time."""


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


class Memory:
    """Answers on disk, by the digest of their question; for several threads.

    What can't be read is asked again, and what can't be kept is not: neither ends a run.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._one, self._once = path, threading.Lock(), Once()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open = sqlite3.connect(path, check_same_thread=False)
            with self._open:
                self._open.execute(
                    "CREATE TABLE IF NOT EXISTS checked_answers "
                    "(question TEXT PRIMARY KEY, answer TEXT, digest TEXT)"
                )
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"cache: {path} is no cache of answers ({error}).") from None

    def find(self, questions: Sequence[str]) -> dict[str, str]:
        """The answers that are there, whole, to those of the questions that have one."""
        select = "SELECT answer, digest FROM checked_answers WHERE question = ?"
        found: dict[str, str] = {}
        for question in questions:
            try:
                with self._one:
                    row = self._open.execute(select, (question,)).fetchone()
            except sqlite3.Error as error:
                self._once.warn("find", f"cache: {self._path} can't be read ({error}); its answers "
                                "are asked for again.")  # fmt: skip
                continue
            if row is None:
                continue
            if isinstance(row[0], str) and row[1] == _digest(question + row[0]):
                found[question] = row[0]
            else:
                self._once.warn("torn", f"cache: {self._path} holds an answer that is torn; such "
                                "answers are asked for again.")  # fmt: skip
        return found

    def keep(self, answers: Mapping[str, str]) -> None:
        """Write down answers, as far as they can be."""
        rows = [
            (question, answer, _digest(question + answer))
            for question, answer in answers.items()
            # Half of a pair of surrogates is text to JSON, and none to a data base.
            if _is_unicode(answer)
        ]
        if len(rows) < len(answers):
            self._once.warn("text", f"cache: {self._path} can't keep an answer that is no Unicode "
                            "text; it will be asked for again.")  # fmt: skip
        try:
            with self._one, self._open:
                self._open.executemany(
                    "INSERT OR REPLACE INTO checked_answers VALUES (?, ?, ?)", rows
                )
        except sqlite3.Error as error:
            self._once.warn("keep", f"cache: {self._path} can't keep answers ({error}); they will "
                            "be asked for again.")  # fmt: skip


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _encoded(image: Tensor, kind: str) -> str:
    """One image [3, H, W] as a `data:` address."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format=kind, **({"quality": 95} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
