"""The engine: finished images in, a value and a status for each out, whatever a reward does."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from entroflow.errors import InputError
from entroflow.ledger import Ledger
from entroflow.prompts import Prompt
from entroflow.rewards.base import AnyReward, GroupReward, Scores, Status, failed, name_of
from entroflow.sampling.noise import Stream, generator
from entroflow.sampling.rollouts import Rollouts

log = logging.getLogger(__name__)

OnFailure = Literal["mask", "raise"]


def score(
    rewards: Mapping[str, AnyReward],
    rollouts: Rollouts,
    finished: Iterable[Tensor],
    ledger: Ledger | None = None,
    *,
    seed: int = 0,
    iteration: int = 0,
    on_failure: OnFailure = "mask",
) -> dict[str, Scores]:
    """Consume a stream of finished rows and score their images as they come.

    A reward that compares is given each group as soon as all its images are there.

    Args:
        rewards: by name; all see the same images.
        finished: row numbers, as `sampling.sample` yields them while it fills `rollouts`.
        seed, iteration: part of the address of what a reward draws.
        on_failure: what becomes of an image that could not be scored: it is masked, or it ends the
            run.

    Returns:
        By name, scores [B] of all rows of the plan; NaN for rows that are not scored. A value that
        is not finite, or whose status is not ok, is NaN whatever the reward put there.

    Raises:
        InputError: a reward returned the wrong number of values or statuses; or an image failed,
            where that is to be raised.
    """
    collected = {
        name: _Collected(name, reward, rollouts, seed, iteration, on_failure)
        for name, reward in rewards.items()
    }
    for rows in finished:
        for one in collected.values():
            with ledger.timed("score") if ledger is not None else nullcontext():
                calls = one.take(rows)
            if ledger is not None:
                ledger.reward_calls += calls
    return {name: one.scores() for name, one in collected.items()}


class _Collected:
    """What one reward has said so far."""

    def __init__(
        self,
        name: str,
        reward: AnyReward,
        rollouts: Rollouts,
        seed: int,
        iteration: int,
        on_failure: OnFailure,
    ) -> None:
        self._name, self._reward, self._rollouts = name, reward, rollouts
        self._address, self._on_failure = (seed, Stream.JUDGE, iteration), on_failure
        plan = rollouts.plan
        self._values = torch.full((plan.rows,), torch.nan, dtype=torch.float64)
        self._statuses = [Status.OK] * plan.rows
        self._facts: dict[str, list[float]] = {}
        self._floor = 0.0
        self._waiting: dict[int, list[int]] = {}
        group, size = plan.group[plan.scored].unique(return_counts=True)
        self._sizes = dict(zip(group.tolist(), size.tolist(), strict=True))

    def take(self, rows: Tensor) -> int:
        """Score what can be scored now that these rows have images; how many were."""
        reward, plan = self._reward, self._rollouts.plan
        if not isinstance(reward, GroupReward):
            prompts = [plan.prompts[p] for p in plan.prompt[rows].tolist()]
            images = self._images(rows)
            self._keep(rows, self._attempt(lambda: reward.score(images, prompts), len(rows)))
            return len(rows)
        scored = 0
        for row in rows.tolist():
            number = int(plan.group[row])
            mine = self._waiting.setdefault(number, [])
            mine.append(row)
            if len(mine) == self._sizes[number]:
                whole = torch.tensor(sorted(self._waiting.pop(number)))
                self._keep(whole, self._compared(reward, whole, number))
                scored += len(whole)
        return scored

    def _compared(self, reward: GroupReward, rows: Tensor, number: int) -> Scores:
        prompt = self._rollouts.plan.prompts[int(self._rollouts.plan.prompt[rows[0]])]
        images, source = self._images(rows), generator(*self._address, group=number)
        return self._attempt(lambda: reward.score_group(images, prompt, source), len(rows))

    def _attempt(self, call: Callable[[], Scores], count: int) -> Scores:
        return attempt(self._reward, call, count, self._on_failure)

    def _images(self, rows: Tensor) -> Tensor:
        assert self._rollouts.images is not None
        return self._rollouts.images[self._rollouts.image_of(rows)]

    def _keep(self, rows: Tensor, scores: Scores) -> None:
        for row, value, status in zip(
            rows.tolist(), scores.values.tolist(), scores.statuses, strict=True
        ):
            good = status == Status.OK and math.isfinite(value)
            self._values[row] = value if good else math.nan
            self._statuses[row] = Status.UNPARSED if status == Status.OK and not good else status
            if not good and self._on_failure == "raise":
                raise InputError(
                    f"reward {self._name}: an image of the prompt "
                    f"{self._rollouts.plan.texts[int(self._rollouts.plan.prompt[row])]!r} has none "
                    f"({self._statuses[row].value}), and scoring.on_failure is raise."
                )
        self._floor = max(self._floor, scores.floor)
        for name, fact in scores.facts.items():
            self._facts.setdefault(name, []).append(fact)

    def scores(self) -> Scores:
        """Of all rows."""
        facts = {name: _mean(found) for name, found in self._facts.items()}
        return Scores(self._values, tuple(self._statuses), self._floor, facts)


def score_images(reward: AnyReward, images: Tensor, prompt: Prompt, seed: int = 0) -> Scores:
    """Scores of images [n, 3, H, W] of one prompt, outside of any run; failures are masked.

    Raises:
        InputError: see `score`.
    """
    if isinstance(reward, GroupReward):
        source = generator(seed, Stream.JUDGE)
        return attempt(reward, lambda: reward.score_group(images, prompt, source), len(images))
    return attempt(reward, lambda: reward.score(images, [prompt] * len(images)), len(images))


def attempt(
    reward: AnyReward, call: Callable[[], Scores], count: int, on_failure: OnFailure = "mask"
) -> Scores:
    """What a call to a reward returns; where it raises, images without a score.

    Args:
        reward: for messages.
        count: images it is asked about.
        on_failure: see `score`.

    Raises:
        InputError: as the reward raised it, or it returned the wrong number of values or statuses;
            or it raised anything, where that is not to be masked.
    """
    try:
        scores = call()
    except InputError:
        raise
    except Exception as error:
        said = f"reward {name_of(reward)} failed on {count} images: {type(error).__name__}: {error}"
        if on_failure == "raise":
            raise InputError(f"{said} (scoring.on_failure is raise).") from error
        log.warning("%s", said)
        return failed(count, Status.TIMEOUT if isinstance(error, TimeoutError) else Status.ERROR)
    if scores.values.shape != (count,) or len(scores.statuses) != count:
        raise InputError(
            f"reward {name_of(reward)} must return one value and one status per image: "
            f"{count} images, but values of shape {tuple(scores.values.shape)} and "
            f"{len(scores.statuses)} statuses."
        )
    return scores


def join_scores(rounds: Sequence[Mapping[str, Scores]]) -> dict[str, Scores]:
    """The scores of several rounds as one."""
    return {
        name: Scores(
            torch.cat([scores[name].values for scores in rounds]),
            tuple(status for scores in rounds for status in scores[name].statuses),
            rounds[0][name].floor,
            {
                # A round in which everything failed has none.
                fact: _mean([s[name].facts[fact] for s in rounds if fact in s[name].facts])
                for fact in dict.fromkeys(f for scores in rounds for f in scores[name].facts)
            },
        )
        for name in rounds[0]
    }


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
