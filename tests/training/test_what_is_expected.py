"""The ledger's plan: what an iteration will cost, before it is run; and the steps it will take."""

from __future__ import annotations

import math

import pytest
import torch

from entroflow.policies.attention import show
from entroflow.recipe.load import chosen_type, load_recipe, shipped_recipes
from entroflow.rewards.combined import as_rewards
from entroflow.sampling.plan import Role
from entroflow.training.trainer import Trainer
from tiny_run import ROLLOUTS, PixelPolicy, groups_of, recipe

COUNTS = ("network_evaluations", "weighted_evaluations", "reward_calls")


class Counting:
    """A reward in which no two images are equal, so that nothing is skipped."""

    def __init__(self):
        self.seen = 0

    def __call__(self, images, prompts, metadata):
        values = [(self.seen + n) ** 1.5 for n in range(len(images))]
        self.seen += len(images)
        return values


class Attentive(PixelPolicy):
    """Shows attention over four tokens, the first of them text."""

    def velocity(self, x, sigma, cond, guidance):
        tokens = x.float().flatten(1).reshape(len(x), 1, 4, 3) + self.shift.float().mean()
        show(0, tokens, tokens, slice(0, 1))
        return super().velocity(x, sigma, cond, guidance)


@pytest.mark.parametrize("name", sorted(shipped_recipes("shapes")))
@pytest.mark.parametrize("changes", [[], ["sampling.guidance=2"], ["objective.epochs=2"]], ids=str)
def test_every_recipe_costs_what_was_expected(name, changes):
    """Counted by the ledger over one iteration of a Gaussian policy; guidance takes two passes."""
    settings = load_recipe(name, ["prompts.per_iteration=2", *groups_of(name, 4), *changes])
    policy = Attentive()
    policy.evaluations = lambda guidance: 1 if guidance == 1 else 2
    trainer = Trainer(settings, policy, as_rewards(Counting()))
    if chosen_type(name, "allocation") == "attention_shift":
        # While the weights are the reference's, nothing is compared.
        trainer.step()
    expected, before = trainer.expected(), trainer.ledger.counts()
    metrics = trainer.step()
    assert metrics["policy/skipped"] == 0
    for count in COUNTS:
        assert metrics[f"ledger/{count}"] - before[count] == expected[count], count
    assert expected["reward_calls"] > 0


def test_the_expectation_by_hand():
    """Four steps of eight rollouts; two of each trained: forward and backward, and reference."""
    expected = Trainer(recipe(), PixelPolicy()).expected()
    forward, trained = 4 * ROLLOUTS, 2 * ROLLOUTS
    assert expected["network_evaluations"] == forward + 2 * trained
    assert expected["weighted_evaluations"] == forward + 4 * trained
    assert expected["reward_calls"] == ROLLOUTS


def test_the_steps_and_rows_of_a_plan_in_numbers():
    """Two starts, one merged: anchors and branches of the first prompt, alike ones once."""
    settings = recipe(
        exploration={"type": "merged_steps", "starts": [0, 1], "merge": [1, 2]},
        objective={"clip_range": 0.2},
    )
    trainer = Trainer(settings, PixelPolicy())
    expected = trainer.expected()
    grid = trainer.base_grid
    assert expected["grid"] == pytest.approx(grid.tolist(), abs=1e-6)
    found = [
        (step["start"], step["end"], step["rows"], step["trained"]) for step in expected["steps"]
    ]
    assert found == [(0, 1, ROLLOUTS, ROLLOUTS), (1, 3, ROLLOUTS, ROLLOUTS)]
    for step in expected["steps"]:
        s = settings.kernel.std(grid[step["start"]], grid[step["end"]], grid).item()
        assert step["std"] == pytest.approx(s, rel=1e-12)
        assert step["entropy"] == pytest.approx(0.5 * math.log(2 * math.pi * math.e * s**2))
        assert step["sigma_next"] == pytest.approx(grid[step["end"]].item(), abs=1e-6)
    anchor, first, second = expected["rows"]
    assert anchor == {
        "role": Role.ANCHOR.name.lower(), "points": [0, 1, 2, 3, 4], "stochastic": [],
        "trained": [], "count": 1,
    }  # fmt: skip
    assert (first["points"], first["count"]) == ([0, 1, 2, 3, 4], 4)
    assert (second["points"], second["stochastic"]) == ([1, 3, 4], [0])
    assert (
        trainer._plan(
            settings.prompts.batch(0, 0), torch.tensor([4, 4]), torch.zeros(2, dtype=torch.long)
        ).trained_states()
        == 2 * 2
    )
