"""Learning from end to end where the answer is known: the shipped recipes on a toy policy.

The policy is the exact flow between noise and a Gaussian in two dimensions whose mean can be
shifted, and the reward is linear, so E[reward] = DIRECTION (mean + shift), whatever the noise. A
recipe is the one in the package, but for its budget and the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from entroflow.credit.shuffled import Shuffled
from entroflow.credit.terminal import Terminal
from entroflow.credit.trace import Trace
from entroflow.credit.turning_points import TurningPoints
from entroflow.objectives.clipped import Clipped
from entroflow.objectives.transitions import Transitions
from entroflow.policies.grid import shifted_grid
from entroflow.prompts import Prompt
from entroflow.recipe.load import load_recipe, shipped_recipes
from entroflow.rewards.base import Scores
from entroflow.sampling.plan import fresh_rows
from entroflow.sampling.rollouts import Rollouts
from entroflow.training.metrics import Metrics
from entroflow.training.trainer import Trainer
from gaussian_policy import GaussianPolicy
from tiny_run import groups_of

RECIPES = list(shipped_recipes("shapes"))
DIRECTION = torch.tensor([1.0, -2.0], dtype=torch.float64)
RATE, ITERATIONS = 0.05, 30
BUDGET = (
    "prompts.per_iteration=2", f"optimizer.learning_rate={RATE}", "sampling.state_dtype=float64",
)  # fmt: skip
SEEDS = 12
"""Runs of the control."""


def linear(images: Tensor, prompts: object, metadata: object) -> list[float]:
    return (images.double().flatten(1) @ DIRECTION).tolist()


def toy(name: str, *overrides: str, seed: int = 0) -> Trainer:
    """A trainer by a shipped recipe, on the toy policy and its reward."""
    given = {"policy": GaussianPolicy(0.3, 0.5), "reward": linear}
    budget = [*BUDGET, *groups_of(name, 16), f"run.seed={seed}"]
    recipe = load_recipe(name, [*budget, *overrides], given)
    return Trainer(recipe, given["policy"])


def shuffled(name: str) -> list[str]:
    """Overrides that exchange a recipe's credit for the control, with its other settings kept."""
    settings = load_recipe(name).resolved["credit"]
    kept = [f"credit.{key}={value}" for key, value in settings.items() if key != "type"]
    return ["credit.type=shuffled", *kept]


def expected_reward(trainer: Trainer) -> float:
    policy = trainer.policy
    return (DIRECTION * (policy.mean + policy.shift.detach())).sum().item()


def learnt(trainer: Trainer) -> tuple[float, list[Metrics]]:
    """Rise of E[reward] over the run, as a share of what Adam's steps could reach at most."""
    before = expected_reward(trainer)
    metrics = [trainer.step() for _ in range(ITERATIONS)]
    most = RATE * trainer.ledger.optimizer_steps * DIRECTION.abs().sum().item()
    return (expected_reward(trainer) - before) / most, metrics


# --- the reward is learnt -------------------------------------------------------------------------


def check_learning(name: str = "quickstart", seed: int = 0) -> None:
    trainer = toy(name, seed=seed)
    rise, metrics = learnt(trainer)
    assert rise > 0.6
    assert (trainer.policy.shift.detach() * DIRECTION.sign() > 0.4).all()
    rewards = [line["reward/mean"] for line in metrics]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 1
    assert metrics[0]["policy/kl"] == 0
    assert metrics[-1]["policy/kl"] > 0


@pytest.mark.parametrize(
    ("name", "seed"), [*((name, 0) for name in RECIPES), ("quickstart", 1), ("flow_grpo", 1)]
)
def test_learning_raises_the_expected_reward(name, seed, caplog):
    """Both coordinates move the right way, most of the way that the step size allows."""
    check_learning(name, seed)
    assert not caplog.records


def test_strong_kl_holds_the_policy_back():
    """With a large beta the shift stays near the reference, where the same run without goes far."""
    shifts = {}
    for kl in (0.0, 1000.0):
        trainer = toy("quickstart", f"objective.kl={kl}")
        learnt(trainer)
        shifts[kl] = trainer.policy.shift.detach().abs().max().item()
    assert shifts[1000.0] < 0.2 * shifts[0.0]


# --- the control ----------------------------------------------------------------------------------


class ShuffledTrajectories(TurningPoints):
    """`Shuffled` for whole trajectories: all but the first of a group have those of others."""

    type: Literal["shuffled_trajectories"] = "shuffled_trajectories"  # type: ignore[assignment]

    def traced(self, row: Tensor, step: Tensor, rewards: Tensor, prompt: Tensor) -> Trace:
        rewards = rewards.clone()
        for number in prompt.unique():
            mine = (prompt == number).nonzero()[:, 0]
            rewards[mine[1:]] = rewards[torch.roll(mine[1:], 1)]
        return super().traced(row, step, rewards, prompt)


def check_control(name: str = "quickstart", control: Sequence[str] | None = None) -> None:
    rises = []
    for seed in range(SEEDS):
        exchanged = shuffled(name) if control is None else control
        rise, metrics = learnt(toy(name, *exchanged, seed=seed))
        rises.append(rise)
        assert metrics[0]["reward/std"] > 0.1
        assert metrics[0]["policy/gradient_norm"] > 0
    standard_error = np.std(rises, ddof=1) / math.sqrt(SEEDS)
    # The reward itself gives more than 0.6, so what it gives would show.
    assert standard_error < 0.1
    assert abs(np.mean(rises)) < 3 * standard_error, (np.mean(rises), standard_error)


@pytest.mark.parametrize(
    "name", ["quickstart", "flow_grpo", pytest.param("e_grpo", marks=pytest.mark.slow)]
)
def test_shuffled_rewards_do_not_move_the_expected_reward(name):
    """The control: everything is as it was, but over twelve seeds E[reward] neither rises nor
    falls, within 3 standard errors, each of them below 0.1 of what the steps could reach.
    """
    check_control(name)


@pytest.mark.slow
def test_shuffled_trajectories_do_not_move_it_either():
    """The control of TP-GRPO: a rollout's steps earn what those of another changed."""
    check_control("tp_grpo", [f"credit.type={__name__}.ShuffledTrajectories"])


def check_expected_gradient(component: Terminal, is_zero: bool) -> None:
    groups, size = 3000, 4
    prompts = [Prompt("")] * groups
    plan = fresh_rows(
        prompts, torch.full((groups,), size), torch.zeros(groups, dtype=torch.long),
        shifted_grid(1), torch.full((1,), 0.5),
    )  # fmt: skip
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(plan.rows))
    rollouts = Rollouts.empty(plan, (1,), torch.float64)
    advantages = component.advantages(rollouts, Scores(values, ("ok",) * plan.rows))[:, 0]
    gradients = (advantages * values).reshape(groups, size).sum(dim=1)
    error = (gradients.std() / groups**0.5).item()
    assert advantages.abs().mean() > 0.5
    if is_zero:
        assert abs(gradients.mean()) < 5 * error
    else:
        assert gradients.mean() > 50 * error


@pytest.mark.parametrize(
    ("component", "is_zero"), [(Terminal(), False), (Shuffled(), True)], ids=["reward", "control"]
)
def test_the_expected_gradient_of_a_control_is_zero(component, is_zero):
    """x ~ N(m, 1) with reward x: the policy gradient is the mean of A x. By brute force over 3000
    groups of 4 it is clearly positive for the reward's own rows, and must vanish for the control.
    """
    check_expected_gradient(component, is_zero)


# --- mutations ------------------------------------------------------------------------------------


def with_the_opposite_advantage(monkeypatch) -> None:
    right = Clipped.terms

    def wrong(self: Clipped, transitions: Transitions, *arguments: object) -> dict[str, Tensor]:
        return right(self, replace(transitions, advantage=-transitions.advantage), *arguments)

    monkeypatch.setattr(Clipped, "terms", wrong)


def with_rewards_that_stay(monkeypatch) -> None:
    monkeypatch.setattr(Shuffled, "advantages", Terminal.advantages)


def with_every_reward_handed_on(monkeypatch) -> None:
    def wrong(self: Shuffled, rollouts: Rollouts, scores: Scores) -> Tensor:
        values = scores.values.clone()
        for group in rollouts.plan.group.unique():
            mine = (rollouts.plan.group == group).nonzero()[:, 0]
            values[mine] = scores.values[mine.roll(1)]
        return Terminal.advantages(self, rollouts, Scores(values, scores.statuses))

    monkeypatch.setattr(Shuffled, "advantages", wrong)


def check_expected_gradient_of_the_control() -> None:
    check_expected_gradient(Shuffled(), is_zero=True)


@pytest.mark.parametrize(
    ("check", "mutate"),
    [
        (check_learning, with_the_opposite_advantage),
        (check_control, with_rewards_that_stay),
        (check_expected_gradient_of_the_control, with_rewards_that_stay),
        (check_expected_gradient_of_the_control, with_every_reward_handed_on),
    ],
)
def test_checks_reject_wrong_learning(check, mutate, monkeypatch):
    """Each check of this file fails on code with one deliberate error."""
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()
