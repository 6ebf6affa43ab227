"""A whole run on a tiny budget: its policy, evaluation, credit, rewards and recipe."""

from __future__ import annotations

import math

import torch

import entroflow
from entroflow.checkpoints import read_tensors
from entroflow.credit.terminal import Terminal
from entroflow.evaluation.base import Evaluated, Score
from entroflow.recipe.load import build_recipe, chosen_type
from entroflow.rewards.base import Scores, Status
from entroflow.rewards.pairwise import Answers
from entroflow.rewards.parts import as_part
from entroflow.runs.folder import RunFolder
from gaussian_policy import GaussianPolicy

HERE = __name__
"""Components of this file are chosen in recipes by their dotted path."""

PROMPTS, GROUP = 2, 4
ROLLOUTS = PROMPTS * GROUP


class PixelPolicy(GaussianPolicy):
    """Images of 2 x 2 pixels whose values are those of the latent; shows no attention."""

    shows_attention = False

    def __init__(self, shift=0.0):
        super().__init__(0.5, 0.05, latent_shape=(3, 2, 2))
        with torch.no_grad():
            self.shift.fill_(shift)
        self.weights.keep("reference")

    def decode(self, latents):
        return latents.float()


class Shift:
    """Judges a policy by the mean of its shift, which no noise hides."""

    def run(self, policy, *, seed, batch_size, reward=None, ledger=None):
        score = policy.shift.detach().mean().item()
        overall = Score(score, score, score, images=2)
        images = torch.linspace(0, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
        return Evaluated(
            {"overall": overall}, score, {"diversity": 0.5}, images, ["a circle", "a ring"],
            [True, False],
        )  # fmt: skip


class RunningScale:
    """Terminal credit divided by a running mean of rewards: a component with memory."""

    def __init__(self):
        self.mean = 1.0

    def complete(self, plan):
        return plan

    def advantages(self, rollouts, scores):
        self.mean = 0.7 * self.mean + 0.3 * scores.values.abs().mean().item()
        return Terminal(scale="none").advantages(rollouts, scores) / self.mean

    def state(self):
        return {"mean": self.mean}

    def load_state(self, state):
        self.mean = state["mean"]


def brightness(images, prompts, metadata):
    return images.flatten(1).mean(dim=1).tolist()


class Brightness:
    def score(self, images, prompts):
        values = images.double().flatten(1).mean(dim=1)
        return Scores(values, (Status.OK,) * len(images))


class ByBrightness:
    """Prefers the brighter image; remembers what it was asked."""

    def __init__(self, always_first: bool = False, fails: int = 0, status: str = "error") -> None:
        self.always_first, self.fails, self.status = always_first, fails, Status(status)
        self.asked: list[tuple[list[list[int]], list[str]]] = []

    def compare(self, images, sides, prompts):
        self.asked.append((sides.tolist(), [prompt.text for prompt in prompts]))
        level = images.flatten(1).mean(dim=1)
        first, second = sides.unbind(1)
        points = 0.5 + 0.5 * (level[first] - level[second]).sign().double()
        if self.always_first:
            points = torch.ones(len(sides), dtype=torch.float64)
        statuses = [Status.OK] * len(sides)
        for i in range(self.fails):
            points[i], statuses[i] = math.nan, self.status
        return Answers(points, tuple(statuses))


def only(recipe):
    """The reward of a recipe that has one."""
    (part,) = recipe.reward.parts.values()
    return part.reward


def part(given):
    return as_part(given, "reward")


def groups_of(name: str, mean: int) -> list[str]:
    """Overrides that give the prompts of a shipped recipe so many rollouts, on average."""
    if chosen_type(name, "allocation") == "attention_shift":
        return [f"allocation.low={mean // 2}", f"allocation.high={2 * mean - mean // 2}"]
    return [f"allocation.group_size={mean}"]


def recipe(**sections):
    """A tiny recipe for `PixelPolicy`."""
    settings = {
        "prompts": {"per_iteration": PROMPTS},
        "allocation": {"group_size": GROUP},
        "sampling": {"steps": 4, "batch_size": 4},
        "exploration": {"type": "window", "size": 2},
        "objective": {"clip_range": 0.2, "minibatches": 2, "kl": 0.01},
        "optimizer": {"learning_rate": 0.02, "warm_up": 3, "micro_batch": 5, "ema": 0.5},
        "evaluation": {"type": f"{HERE}.Shift"},
        "reward": {"type": f"{HERE}.brightness"},
        "run": {"iterations": 3, "evaluate_every": 2, "checkpoint_every": 2},
    }
    for section, fields in sections.items():
        before = settings.get(section, {})
        same = "type" not in before or fields.get("type", before["type"]) == before["type"]
        settings[section] = {**(before if same else {}), **fields}
    return build_recipe(settings, "tiny")


def train(folder, stop_after=None, reward=None, watch=None, policy=None, **sections):
    """A run by the tiny recipe, from a file beside the run folder."""
    path = folder.with_suffix(".yaml")
    path.write_text(recipe(**sections).to_yaml(), encoding="utf-8")
    return entroflow.train(
        path, policy=policy or PixelPolicy(), reward=reward, run=folder, stop_after=stop_after,
        watch=watch,
    )  # fmt: skip


def lines(folder):
    """The metrics without their times."""
    found = RunFolder.open(folder.path).metrics()
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def final_tensors(folder):
    latest = folder.latest()
    return {
        part: read_tensors(latest / f"{part}.safetensors") for part in ("live", "ema", "optimizer")
    }


def assert_same_run(one, other):
    assert other.latest().name == one.latest().name
    first, second = final_tensors(one), final_tensors(other)
    for part, tensors in first.items():
        assert tensors
        assert second[part].keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(second[part][key], value), (part, key)
    assert lines(other) == lines(one)
    for folder in ("images", "examples"):
        names = sorted(path.name for path in (one.path / folder).iterdir())
        assert sorted(path.name for path in (other.path / folder).iterdir()) == names
