"""Policies, objectives and components of one's own, and what a run leaves behind of them."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest
import torch

import entroflow
from entroflow.errors import InputError, UntrustedError
from entroflow.objectives.base import Objective
from entroflow.objectives.transitions import transitions_of
from entroflow.runs.open import open_policy
from entroflow.training.trainer import Trainer
from tiny_run import HERE, Brightness, PixelPolicy, brightness, recipe, train


class NeedsShift(PixelPolicy):
    def __init__(self, shift):
        super().__init__(shift)


@pytest.mark.parametrize("own", ["lambda", "closure", "policy with arguments"])
def test_a_run_of_passed_parts_resumes_with_passed_parts(tmp_path, own):
    """Their names in recipe.yaml need not lead anywhere: the objects are passed again."""

    def closure(images, prompts, metadata):
        return brightness(images, prompts, metadata)

    rewards = {"lambda": lambda images, *_: images.flatten(1).mean(1), "closure": closure}
    parts = {"reward": rewards.get(own, brightness)}

    def policy():
        return NeedsShift(0.0) if own == "policy with arguments" else PixelPolicy()

    folder = train(tmp_path / "run", stop_after=1, policy=policy(), **parts)
    folder = entroflow.resume(folder.path, policy=policy(), **parts)
    assert folder.metrics()[-1]["iteration"] == 3


def test_a_run_does_not_resume_with_another_reward_or_policy(tmp_path):
    folder = train(tmp_path / "run", stop_after=1)
    own = rf"policy {HERE}.PixelPolicy, not {__name__}.NeedsShift"
    with pytest.raises(InputError, match=own):
        entroflow.resume(folder.path, policy=NeedsShift(0.0), reward=brightness)
    own = rf"reward {HERE}.brightness, not {HERE}.Brightness"
    with pytest.raises(InputError, match=own):
        entroflow.resume(folder.path, policy=PixelPolicy(), reward=Brightness())
    assert folder.metrics()[-1]["iteration"] == 1


def test_a_passed_policy_can_not_be_opened_from_the_command_line(tmp_path):
    """It is no settings to build a policy from, and the message says so."""
    folder = train(tmp_path / "run", stop_after=1)
    said = r"PixelPolicy is not for policy: it has no build .* passed from Python"
    with pytest.raises(InputError, match=said):
        open_policy(folder.path)


def test_a_run_with_a_component_beside_its_recipe_resumes(tmp_path, monkeypatch):
    """In another process, which knows the run folder only."""
    name = "reward_beside_the_recipe"
    (tmp_path / f"{name}.py").write_text("def score(images, *_): return [0.5] * len(images)\n")
    text = recipe().to_yaml().replace(f"{HERE}.brightness", f"{name}.score")
    (tmp_path / "mine.yaml").write_text(text)
    with monkeypatch.context() as process:
        process.setattr(sys, "path", [*sys.path])
        folder = entroflow.train(
            tmp_path / "mine.yaml", policy=PixelPolicy(), run=tmp_path / "runs" / "one",
            stop_after=1, trust=True,
        )  # fmt: skip
    del sys.modules[name]
    importlib.invalidate_caches()
    with pytest.raises(UntrustedError):
        entroflow.resume(folder.path, policy=PixelPolicy())
    folder = entroflow.resume(folder.path, policy=PixelPolicy(), trust=True)
    assert folder.metrics()[-1]["iteration"] == 3


class Reinforce(Objective):
    """The least that an objective needs: examples, and a loss."""

    def examples(self, rollouts, advantages):
        return transitions_of(rollouts, advantages)

    def terms(self, part, velocity, others):
        density = part.density(part.mean(velocity))
        return {"loss": -part.advantage.to(density) * density}


def test_an_objective_of_ones_own_needs_only_what_the_protocol_says(tmp_path):
    """On policy its gradient is that of the clipped objective, and so is the run."""
    mine = Trainer(replace(recipe(), objective=Reinforce()), PixelPolicy())
    clipped = Trainer(recipe(objective={"minibatches": 1, "kl": 0.0}), PixelPolicy())
    for trainer in (mine, clipped):
        trainer.step()
    torch.testing.assert_close(mine.policy.shift, clipped.policy.shift, rtol=1e-6, atol=1e-9)
