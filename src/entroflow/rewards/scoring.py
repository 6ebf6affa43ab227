"""The engine: finished images in, a value and a status for each out, whatever a reward does."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from entroflow.errors import InputError
from entroflow.ledger import Ledger
from entroflow.noise import Stream, generator
from entroflow.prompts import Prompt
from entroflow.redaction import without_secrets
from entroflow.rewards.awaiting import awaited
from entroflow.rewards.base import Scores, Status, failed, scores_of
from entroflow.rewards.contract import own, own_prompt, told, undisturbed
from entroflow.rewards.parts import Part
from entroflow.rewards.workers import Workers
from entroflow.sampling.rollouts import Rollouts

log = logging.getLogger(__name__)

OnFailure = Literal["mask", "raise"]

CALLS = 4
"""Calls at a time of a reward that waits."""
PATIENCE = 0.2
"""Most seconds to wait for calls whose results nobody needs."""


def score(
    parts: Mapping[str, Part],
    rollouts: Rollouts,
    finished: Iterable[Tensor],
    ledger: Ledger | None = None,
    *,
    seed: int = 0,
    iteration: int = 0,
    on_failure: OnFailure = "mask",
) -> dict[str, Scores]:
    """Score the images of one round; see `Scoring`."""
    scoring = Scoring(parts, ledger, seed=seed, iteration=iteration, on_failure=on_failure)
    scoring.take(rollouts, finished)
    return scoring.scores()


class Scoring:
    """Consumes streams of finished rows, and scores their images as they come.

    A reward that compares is given a group as soon as all its images are there. One that waits for
    others (`waits`), as for a server, is asked in threads of its own while sampling goes on.

    Args:
        parts: by name; all see the same images.
        seed, iteration: part of the address of what a reward draws.
        on_failure: what becomes of an image that could not be scored: it is masked, or it ends the
            run.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        ledger: Ledger | None = None,
        *,
        seed: int = 0,
        iteration: int = 0,
        on_failure: OnFailure = "mask",
    ) -> None:
        self._ledger = ledger
        self._collected = {
            name: _Collected(name, part, (seed, Stream.JUDGE, iteration), on_failure)
            for name, part in parts.items()
        }

    def take(self, rollouts: Rollouts, finished: Iterable[Tensor], last: bool = True) -> None:
        """Score one round.

        Args:
            finished: row numbers, as `sampling.sample` yields them while it fills `rollouts`.
            last: no other round follows; until then no group is known to be whole.

        Raises:
            InputError: a reward returned the wrong number of values or statuses; or an image
                failed, where that is to be raised.
        """
        everyone = self._collected.values()
        try:
            for one in everyone:
                one.begin(rollouts, last)
            for rows in finished:
                for one in everyone:
                    self._count(one, partial(one.add, rows))
            for one in everyone:
                self._count(one, one.finish if last else one.wait)
        except BaseException:
            for one in everyone:
                one.cancel()
            raise
        finally:
            for one in everyone:
                one.close()

    def _count(self, one: _Collected, work: Callable[[], None]) -> None:
        before = one.calls
        with self._ledger.timed("score") if self._ledger is not None else nullcontext():
            work()
        if self._ledger is not None:
            self._ledger.reward_calls += one.calls - before

    def scores(self) -> dict[str, Scores]:
        """By name, scores [B] of the rows of all rounds; NaN for rows that are not scored."""
        for one in self._collected.values():
            self._count(one, one.finish)
        return {name: one.scores() for name, one in self._collected.items()}


class _Collected:
    """What one reward has said so far; rows are numbered through all rounds."""

    def __init__(
        self, name: str, part: Part, address: tuple[int, Stream, int], on_failure: OnFailure
    ) -> None:
        self._name, self._part = name, part
        self._address, self._on_failure = address, on_failure
        self.calls = 0
        self._rounds: list[Rollouts] = []
        self._offsets: list[int] = []
        self._values: list[float] = []
        self._statuses: list[Status] = []
        self._facts: dict[str, list[float]] = {}
        self._floor = 0.0
        self._last = False
        self._sizes: dict[int, int] = {}
        self._waiting: dict[int, list[int]] = {}
        self._workers: Workers[Scores] | None = None
        self._asked: deque[tuple[list[int], Future[Scores]]] = deque()

    def begin(self, rollouts: Rollouts, last: bool) -> None:
        """Make room for a round."""
        plan = rollouts.plan
        self._rounds.append(rollouts)
        self._offsets.append(len(self._values))
        self._values += [math.nan] * plan.rows
        self._statuses += [Status.OK] * plan.rows
        self._last = last
        group, size = plan.group[plan.scored].unique(return_counts=True)
        for number, count in zip(group.tolist(), size.tolist(), strict=True):
            self._sizes[number] = self._sizes.get(number, 0) + count
        if self._part.waits:
            self._workers = Workers(CALLS, f"reward {self._name}")

    def add(self, rows: Tensor) -> None:
        """Score what can be scored now that these rows of the latest round have images."""
        numbers = (rows + self._offsets[-1]).tolist()
        if not self._part.compares:
            reward, prompts = self._part.reward, self._prompts(numbers)
            self._ask(numbers, lambda: reward.score(self._images(numbers), own(prompts)))
            return
        for number, group in zip(numbers, self._rounds[-1].plan.group[rows].tolist(), strict=True):
            self._waiting.setdefault(group, []).append(number)
            self._compare_if_whole(group)

    def finish(self) -> None:
        """Score what is left, as no row will follow."""
        self._last = True
        for group in list(self._waiting):
            self._compare_if_whole(group)
        self.wait()

    def wait(self) -> None:
        """Wait for what was asked."""
        while self._asked:
            rows, found = self._asked.popleft()
            self._keep(rows, found.result())

    def cancel(self) -> None:
        """End the threads, as nobody needs what was asked any more; one that hangs is left."""
        if self._workers is not None:
            self._workers.close()
            self._part.cancel()
            self._workers.join(PATIENCE)
            self._workers = None

    def close(self) -> None:
        """End the threads."""
        if self._workers is not None:
            self._workers.close()
            self._workers.join()
            self._workers = None

    def _compare_if_whole(self, group: int) -> None:
        rows = sorted(self._waiting[group])
        if not self._last or len(rows) < self._sizes[group]:
            return
        del self._waiting[group]
        reward, prompt = self._part.reward, self._prompts(rows[:1])[0]
        source = generator(*self._address, group=group)
        self._ask(rows, lambda: reward.score_group(self._images(rows), own_prompt(prompt), source))

    def _ask(self, rows: list[int], call: Callable[[], Scores]) -> None:
        self.calls += len(rows)
        answered = partial(attempt, self._part.name, call, len(rows), self._on_failure)
        if self._workers is None:
            self._keep(rows, answered())
            return
        self._asked.append((rows, self._workers.submit(answered)))
        while self._asked and self._asked[0][1].done():
            self._keep(self._asked[0][0], self._asked.popleft()[1].result())

    def _located(self, number: int) -> tuple[Rollouts, int]:
        """The round of a row, and its number there."""
        which = bisect_right(self._offsets, number) - 1
        return self._rounds[which], number - self._offsets[which]

    def _images(self, numbers: Sequence[int]) -> Tensor:
        """A copy, for this reward alone."""
        found = []
        for rollouts, row in map(self._located, numbers):
            assert rollouts.images is not None
            found.append(rollouts.images[int(rollouts.image_of(torch.tensor(row)))])
        return torch.stack(found)

    def _prompts(self, numbers: Sequence[int]) -> list[Prompt]:
        where = map(self._located, numbers)
        return [r.plan.prompts[int(r.plan.prompt[row])] for r, row in where]

    def _keep(self, numbers: Sequence[int], scores: Scores) -> None:
        for number, value, status in zip(
            numbers, scores.values.tolist(), scores.statuses, strict=True
        ):
            self._values[number], self._statuses[number] = value, status
            if status is not Status.OK and self._on_failure == "raise":
                raise InputError(
                    f"reward {self._name}: an image of the prompt "
                    f"{self._prompts([number])[0].text!r} has none ({status.value}), and "
                    "scoring.on_failure is raise."
                )
        self._floor = max(self._floor, scores.floor)
        for name, fact in scores.facts.items():
            self._facts.setdefault(name, []).append(fact)

    def scores(self) -> Scores:
        """Of all rows."""
        facts = {name: _mean(found) for name, found in self._facts.items()}
        values = torch.tensor(self._values, dtype=torch.float64)
        return Scores(values, tuple(self._statuses), self._floor, facts)


def score_images(part: Part, images: Tensor, prompt: Prompt, seed: int = 0) -> Scores:
    """Scores of images [n, 3, H, W] of one prompt, outside of any run; failures are masked.

    Raises:
        InputError: see `score`.
    """
    if part.compares:
        source = generator(seed, Stream.JUDGE)
        call = partial(part.reward.score_group, images.clone(), own_prompt(prompt), source)
        return attempt(part.name, call, len(images))
    return score_alone(part, images, [prompt] * len(images))


def score_alone(part: Part, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """Scores of images [n, 3, H, W], each against its prompt; failures are masked.

    Raises:
        InputError: see `score`.
    """
    call = partial(part.reward.score, images.clone(), own(prompts))
    return attempt(part.name, call, len(images))


def score_against(
    part: Part,
    images: Tensor,
    others: Tensor,
    prompts: Sequence[Prompt],
    source: np.random.Generator,
) -> Scores:
    """Scores of images [n, 3, H, W], each against its counterpart in `others`.

    Failures are masked.

    Raises:
        InputError: see `score`.
    """
    copies = images.clone(), others.clone(), own(prompts)
    return attempt(part.name, partial(part.reward.score_against, *copies, source), len(images))


def attempt(
    name: str, call: Callable[[], Any], count: int, on_failure: OnFailure = "mask"
) -> Scores:
    """What a call to a reward returns; where it raises, images without a score.

    Every reward is called here, whatever it is and whoever calls: the run, an evaluation, the
    examination. A value that is not finite, or whose status is not ok, is NaN whatever the reward
    put there. An exit is a failure as any other, but Ctrl-C interrupts.

    Args:
        name: what messages call the reward.
        call: hands over what the reward may change.
        count: images it is asked about.
        on_failure: see `score`.

    Raises:
        InputError: as the reward raised it, or it returned no numbers, or the wrong number of
            values or statuses; or it raised anything, where that is not to be masked.
    """
    who = f"reward {name}"
    try:
        with undisturbed():
            return scores_of(awaited(call()), count, who)
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:
        said = without_secrets(f"{who} failed on {count} images: {told(error)}")
        if on_failure == "raise":
            raise InputError(f"{said} (scoring.on_failure is raise).") from error
        log.warning("%s", said)
        return failed(count, Status.TIMEOUT if isinstance(error, TimeoutError) else Status.ERROR)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
