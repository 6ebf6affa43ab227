"""An objective owns its examples: supervised fine-tuning on final latents, without a transition."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from entroflow.errors import InputError
from entroflow.noise import Stream, gaussian
from entroflow.objectives.base import Examples, Objective
from entroflow.recipe.load import load_recipe
from entroflow.rewards.base import FunctionReward
from entroflow.training.trainer import Trainer
from gaussian_policy import GaussianPolicy

DIRECTION = torch.tensor([1.0, -2.0], dtype=torch.float64)
LEVELS = (0.25, 0.5, 0.75)
"""Sigmas of the noised copies."""


@dataclass(frozen=True)
class Noised(Examples):
    """Noised copies of final latents.

    Attributes:
        target: [N, *latent] noise - latent.
    """

    target: Tensor


class FineTuning(Objective):
    """Rejection sampling: images above their group's mean are data, weighted by how far above."""

    keeps = ("latents",)

    def __init__(self):
        self.seen = []

    def examples(self, rollouts, advantages):
        plan = rollouts.plan
        gain = advantages[:, 0].nan_to_num(0.0).clamp(min=0)
        row = (gain > 0).nonzero()[:, 0].repeat_interleave(len(LEVELS))
        step = torch.arange(len(LEVELS)).repeat(len(row) // len(LEVELS))
        sigma = torch.tensor(LEVELS, dtype=torch.float64)[step]
        latents = rollouts.latents_of(row)
        shape = latents.shape[1:]
        noise = gaussian(
            shape, rollouts.address, Stream.FORWARD, plan.group[row], plan.member[row], step
        ).to(latents)
        t = sigma.reshape(-1, *[1] * len(shape)).to(latents)
        table = Noised(
            states=(1 - t) * latents + t * noise, state=torch.arange(len(row)), sigma=sigma,
            prompt=plan.prompt[row], row=row, step=step, weight=gain[row] / gain[row].sum(),
            idle=torch.zeros(len(row), dtype=torch.bool), target=noise - latents,
        )  # fmt: skip
        self.seen.append((rollouts, table))
        return table

    def terms(self, part, velocity, others):
        return {"loss": (velocity - part.target).square().flatten(1).mean(dim=1)}


def linear(images, prompts, metadata):
    return (images.double().flatten(1) @ DIRECTION).tolist()


def trainer(objective, *overrides):
    """By quickstart with another objective, on the policy whose one parameter shifts its data."""
    given = {"policy": GaussianPolicy(0.3, 0.5), "reward": FunctionReward(linear)}
    small = ["prompts.per_iteration=2", "allocation.group_size=16", "sampling.state_dtype=float64"]
    recipe = load_recipe("quickstart", [*small, "optimizer.learning_rate=0.05", *overrides], given)
    return Trainer(replace(recipe, objective=objective), given["policy"])


@pytest.mark.parametrize("kernel", ["flow_sde", "ode"])
def test_fine_tuning_learns_without_a_line_changed_in_the_trainer(kernel, caplog):
    """The data move where the reward grows, with noise in the steps or without any."""
    run = trainer(FineTuning(), f"kernel.type={kernel}")
    lines = [run.step() for _ in range(30)]
    assert (run.policy.shift.detach() * DIRECTION.sign() > 0.3).all()
    rewards = [line["reward/mean"] for line in lines]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.7
    assert "policy/ratio_max_deviation" not in lines[0]
    assert not caplog.records


def test_its_gradient_is_that_of_the_weighted_regression():
    """d/dshift of sum w mean (v - target)^2 times D, with v = kappa x - t (m + shift) / V."""
    run = trainer(FineTuning(), "optimizer.max_grad_norm=1e9")
    policy, gradients, step = run.policy, [], run.optimizer.step
    run.optimizer.step = lambda: (gradients.append(policy.shift.grad.clone()), step())
    run.step()
    ((_, table),) = run.recipe.objective.seen
    wanted = torch.zeros(2, dtype=torch.float64)
    for n in range(len(table)):
        t, x = table.sigma[n].item(), table.states[n].double()
        V = (1 - t) ** 2 * 0.5 + t**2
        v = (t - (1 - t) * 0.5) / V * x - t / V * 0.3
        wanted += table.weight[n] * 2 * (v - table.target[n]) * (-t / V)
    assert math.isclose(table.weight.sum().item(), 1.0, rel_tol=1e-12)
    torch.testing.assert_close(gradients[0], wanted, rtol=1e-9, atol=1e-12)


def test_a_plan_without_noise_is_refused_where_noise_is_needed():
    quickstart = load_recipe("quickstart").objective
    with pytest.raises(InputError, match="no step of the plan is stochastic"):
        trainer(quickstart, "kernel.type=ode").step()


def test_final_latents_are_those_of_the_images():
    """The toy policy decodes a latent into an image of its values."""
    run = trainer(FineTuning())
    run.step()
    ((rollouts, _),) = run.recipe.objective.seen
    rows = torch.arange(rollouts.plan.rows)
    images = rollouts.images[rollouts.image_of(rows)]
    torch.testing.assert_close(rollouts.latents_of(rows).float(), images.flatten(1))


def test_the_weights_that_roll_out_are_those_the_objective_names():
    """Under the reference every iteration samples from the start; the live weights move on."""

    class FromTheReference(FineTuning):
        sampled_with = "reference"

    run = trainer(FromTheReference())
    active, velocity = [], run.policy.velocity

    def seen(*given):
        active.append((torch.is_grad_enabled(), run.policy.shift.detach().abs().sum().item()))
        return velocity(*given)

    run.policy.velocity = seen
    for _ in range(3):
        run.step()
    assert run.policy.shift.detach().abs().sum() > 0.1
    assert {shift for grad, shift in active if not grad} == {0.0}
    assert max(shift for grad, shift in active if grad) > 0
