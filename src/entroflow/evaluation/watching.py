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
from entroflow.rewards.base import AnyReward, GroupReward
from entroflow.rewards.mixture import Mixture, rewards_of
from entroflow.rewards.scoring import score_against, score_alone


def compares(*rewards: AnyReward) -> bool:
    """Whether any of them, or of their parts, judges an image against others only."""
    parts = [part for reward in rewards for part in rewards_of(reward).values()]
    return any(isinstance(part, GroupReward) for part in parts)


def watched(
    evaluation: Evaluation,
    found: Evaluated,
    reward: AnyReward | None,
    monitors: Mapping[str, AnyReward],
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
    judges = {
        name: part
        for name, part in ({} if reward is None else rewards_of(reward)).items()
        if isinstance(part, GroupReward)
    }
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

    def values(reward: AnyReward) -> Tensor:
        if isinstance(reward, GroupReward) and base is drawn:
            return torch.full((len(drawn.images),), 0.5, dtype=torch.float64)
        if ledger is not None:
            ledger.reward_calls += len(drawn.images)
        return _scored(reward, drawn, base, seed, batch_size)

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


def _total(reward: AnyReward, others: Tensor, win_rates: Mapping[str, Tensor]) -> Tensor:
    """[n] what is trained on: the rewards that judge by themselves, if any, and win rates."""
    if not isinstance(reward, Mixture):
        (only,) = win_rates.values()
        return only
    parts = [reward.weight(name) * points for name, points in win_rates.items()]
    if len(rewards_of(reward)) > len(win_rates):
        parts.append(others)
    return torch.stack(parts).sum(dim=0)


def _scored(
    reward: AnyReward, drawn: Drawn, base: Drawn | None, seed: int, batch_size: int
) -> Tensor:
    """[n] what a reward says of held-out images; NaN where it failed."""
    # Not of the batch: what is drawn in turn, image by image, is the same in any batches.
    values, source = [], generator(seed, Stream.JUDGE, step=1)
    size = len(drawn.images) if getattr(reward, "waits", False) else batch_size
    for start in range(0, len(drawn.images), size):
        rows = slice(start, start + size)
        images, prompts = drawn.images[rows], [drawn.prompts[p] for p in drawn.prompt[rows]]
        if isinstance(reward, GroupReward):
            assert base is not None
            scores = score_against(reward, images, base.images[rows], prompts, source)
        else:
            scores = score_alone(reward, images, prompts)
        values.append(scores.values)
    return torch.cat(values)
