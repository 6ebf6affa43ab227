"""What an evaluation leaves out: rewards that compare, and rewards that nothing trains on.

Within a group all win rates have the same mean, whatever the images are. So a held-out image is
compared with that of the base for the same prompt and noise: its reward is how often it is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from entroflow.errors import InputError
from entroflow.evaluation.base import Drawn, Evaluated, Evaluation
from entroflow.evaluation.reward import RewardEvaluation
from entroflow.ledger import Ledger
from entroflow.noise import Stream, generator
from entroflow.rewards.combined import Rewards
from entroflow.rewards.parts import Part
from entroflow.rewards.scoring import score_against, score_alone


def watched(
    evaluation: Evaluation,
    found: Evaluated,
    reward: Rewards | None,
    monitors: Mapping[str, Part],
    base: Drawn | None,
    *,
    seed: int,
    batch_size: int,
    ledger: Ledger | None = None,
) -> Evaluated:
    """An evaluation, with what it leaves out.

    Args:
        found: what the evaluation found.
        reward: what is trained on; its mean then counts rewards that compare, as points over the
            base's images.
        monitors: rewards that nothing trains on, by name.
        base: what the base drew of the same prompts and noise; its own images are as good as
            themselves.

    Raises:
        InputError: there are monitors, and the evaluation does not say which images it judged, or
            has a monitor of the same name.
    """
    judges = {} if reward is None else reward.comparing
    if found.drawn is None and monitors:
        raise InputError(
            "monitors.rewards: the evaluation does not return what it has drawn, so that "
            f"{', '.join(monitors)} can't look at it."
        )
    if found.drawn is None or not (judges or monitors):
        return found
    if both := sorted(set(monitors) & set(found.monitors)):
        raise InputError(
            f"monitors.rewards.{both[0]}: the evaluation has one of this name; choose another."
        )
    drawn = found.drawn

    def values(part: Part) -> Tensor:
        if part.compares and base is drawn:
            return torch.full((len(drawn.images),), 0.5, dtype=torch.float64)
        if ledger is not None:
            ledger.reward_calls += len(drawn.images)
        return _scored(part, drawn, base, seed, batch_size)

    win_rates = {name: values(judge) for name, judge in judges.items()}
    more = {name: values(each) for name, each in monitors.items()}
    if reward is not None and win_rates:
        rewarded = replace(drawn, rewards=_total(reward, drawn.rewards, win_rates))
        if isinstance(evaluation, RewardEvaluation):
            found = evaluation.judged(rewarded)
        else:
            mean = rewarded.rewards.nanmean().item()
            found = replace(found, drawn=rewarded, reward=mean)
    return replace(found, monitors={**found.monitors, **more}, win_rates=win_rates)


def _total(reward: Rewards, others: Tensor, win_rates: Mapping[str, Tensor]) -> Tensor:
    """[n] what is trained on: the rewards that judge by themselves, if any, and win rates."""
    weighted = [reward.weights[name] * points for name, points in win_rates.items()]
    return torch.stack([*weighted, others] if reward.pointwise else weighted).sum(dim=0)


def _scored(part: Part, drawn: Drawn, base: Drawn | None, seed: int, batch_size: int) -> Tensor:
    """[n] what a reward says of held-out images; NaN where it failed."""
    # Not of the batch: what is drawn in turn, image by image, is the same in any batches.
    values, source = [], generator(seed, Stream.JUDGE, step=1)
    size = len(drawn.images) if part.waits else batch_size
    for start in range(0, len(drawn.images), size):
        rows = slice(start, start + size)
        images, prompts = drawn.images[rows], [drawn.prompts[p] for p in drawn.prompt[rows]]
        if part.compares:
            assert base is not None
            scores = score_against(part, images, base.images[rows], prompts, source)
        else:
            scores = score_alone(part, images, prompts)
        values.append(scores.values)
    return torch.cat(values)
