"""Evaluation: held-out prompts, scores and their intervals, and the comparison with the base."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from entroflow.errors import InputError
from entroflow.evaluation import shapes as shapes_module
from entroflow.evaluation.base import Evaluated, HeldOutEvaluation, Score
from entroflow.evaluation.base_and_tuned import (
    _gain,
    compare_with_base,
    try_guidance,
)
from entroflow.evaluation.shapes import EXAMPLES_PER_SKILL, ShapesEvaluation, held_out
from entroflow.ledger import Ledger
from entroflow.policies.base import Condition, WeightSets
from entroflow.policies.grid import shifted_grid
from entroflow.policies.shapes.policy import ShapesPolicy
from entroflow.rewards.combined import as_rewards
from entroflow.rewards.shapes import ShapesReward
from entroflow.runs.evaluate import evaluate
from entroflow.shapes import grammar
from entroflow.shapes.scenes import lay_out, render
from random_network import random_weights

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


@cache
def drawn(prompts):
    """A scene of every prompt: [P, 3, 32, 32]."""
    return render(lay_out([grammar.parse(p) for p in prompts], np.random.default_rng(0)))


class DrawnPolicy:
    """Draws scenes of its prompts, or nothing but a light background.

    The velocity (x - target) / sigma leads in any number of Euler steps to the target, up to
    rounding. `skill` is the share of the way from the empty picture to the scene: 1 is perfect.
    `right_at`: the only guidance scale at which scenes are drawn.
    """

    latent_shape = (3, 32, 32)

    def __init__(self, skill=1.0, right_at=None):
        self.skill = torch.nn.Parameter(torch.tensor(skill))
        self.weights = WeightSets({"skill": self.skill})
        self.right_at = right_at
        self.seen = []

    def encode(self, prompts):
        self.seen.append(list(prompts))
        return Condition({"scene": drawn(tuple(prompts))})

    def velocity(self, x, sigma, cond, guidance):
        share = self.skill * (self.right_at in (None, guidance))
        target = 0.9 + share * (cond.tensors["scene"] - 0.9)
        return (x - target) / sigma.to(x).reshape(-1, 1, 1, 1)

    def decode(self, latents):
        return latents.clamp(0, 1)

    def sigmas(self, steps):
        return shifted_grid(steps)

    def evaluations(self, guidance):
        return 1 if guidance == 1 else 2


def evaluated(policy, *, seed=0, batch_size=64, reward=None, ledger=None, **settings):
    settings = {"steps": 2, "images": 8, "prompts_per_skill": 4, **settings}
    return ShapesEvaluation(**settings).run(
        policy, seed=seed, batch_size=batch_size, reward=reward, ledger=ledger
    )


# --- scores ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_perfect_policy_scores_1():
    ledger = Ledger()
    found = evaluated(DrawnPolicy(), reward=as_rewards(ShapesReward(value="strict")), ledger=ledger)
    assert set(found.scores) == {*grammar.SKILLS, "overall"}
    for skill, score in found.scores.items():
        assert score.value == 1
        assert score.images == (48 if skill == "overall" else 8)
        assert score.high == pytest.approx(1)
        assert score.low < 1
    assert found.reward == 1
    assert all(found.passed)
    # Every image of a prompt is the same one here, and scenes have no texture.
    assert tuple(found.monitors) == ShapesEvaluation.monitor_names
    assert found.monitor_means()["diversity"] < 1e-6
    assert found.monitor_means()["texture"] < 1e-6
    assert found.monitor_means()["contrast"] > 0.1
    assert ledger.network_evaluations == 2 * 48
    assert ledger.decodes == 48


@torch.no_grad()
def test_a_policy_that_draws_nothing_scores_0():
    found = evaluated(DrawnPolicy(skill=0.0))
    for score in found.scores.values():
        assert score.value == 0
        assert score.low == pytest.approx(0, abs=1e-12)
        assert score.high > 0
    assert not any(found.passed)
    assert math.isnan(found.reward)
    assert math.isnan(found.monitor_means()["contrast"])


@torch.no_grad()
def test_overall_is_the_mean_of_the_skills():
    """A policy that can draw some skills only; single skills have their own scores."""
    able = ("counting", "position")
    policy = DrawnPolicy()

    def encode(prompts):
        shown = torch.tensor([grammar.parse(p).skill in able for p in prompts])
        return Condition({"scene": drawn(tuple(prompts)).where(shown[:, None, None, None], 0.9)})

    policy.encode = encode
    scores = evaluated(policy).scores
    assert {skill: s.value for skill, s in scores.items() if skill != "overall"} == {
        skill: float(skill in able) for skill in grammar.SKILLS
    }
    assert scores["overall"].value == pytest.approx(2 / 6)


@torch.no_grad()
def test_the_reward_reported_is_the_mean_without_failures():
    """The second image of the call has none; metadata is empty, prompts are the captions."""
    values = []

    def reward(images, prompts, metadata):
        assert all(grammar.split_of(grammar.parse(prompt)) == "validation" for prompt in prompts)
        assert metadata == [{}] * len(images)
        returned = images.flatten(1).mean(dim=1).double().tolist()
        returned[1] = math.nan
        values.extend(value for value in returned if not math.isnan(value))
        return returned

    found = evaluated(DrawnPolicy(), reward=as_rewards(reward))
    assert len(values) == 47
    assert found.reward == pytest.approx(np.mean(values), rel=1e-12)


# --- intervals ------------------------------------------------------------------------------------

Z = stats.norm.ppf(0.975)


def wilson(right, n):
    """The proportions p at which |share - p| = z sqrt(p (1 - p) / n), by root finding."""
    share = right / n

    def beyond(p):
        return (share - p) ** 2 - Z**2 * p * (1 - p) / n

    # At 0 and 1 the share itself is one of the two roots, and an end.
    low = optimize.brentq(beyond, 0, min(share, 1 - 1e-12), xtol=1e-14) if right else 0.0
    high = optimize.brentq(beyond, max(share, 1e-12), 1, xtol=1e-14) if right < n else 1.0
    return low, high


def scored(rights, n):
    """Scores by skill of `rights` [6] right images out of n each, in mixed order."""
    strict = torch.cat([(torch.arange(n) < right).double() for right in rights])
    skills = [skill for skill in grammar.SKILLS for _ in range(n)]
    order = np.random.default_rng(0).permutation(len(skills)).tolist()
    return shapes_module._by_skill(strict[order], [skills[i] for i in order])


@pytest.mark.parametrize("n", [1, 2, 48, 96])
def test_intervals_of_skills_are_wilsons(n):
    rights = [0, 1, n // 3, n // 2, max(0, n - 1), n]
    scores = scored(rights, n)
    for skill, right in zip(grammar.SKILLS, rights, strict=True):
        low, high = wilson(right, n)
        assert scores[skill].value == pytest.approx(right / n)
        assert scores[skill].low == pytest.approx(low, abs=1e-9)
        assert scores[skill].high == pytest.approx(high, abs=1e-9)


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9, 1.0])
def test_the_overall_interval_covers_the_true_mean(p):
    """MOVER, by simulation: 95% of the time, or a little more near 0 and 1, and never collapsed."""
    rng = np.random.default_rng(0)
    truth = np.clip(p + np.array([-0.02, 0.08, 0, 0, -0.1, 0.04]), 0, 1)
    trials = 400
    covered = 0
    for rights in rng.binomial(24, truth, size=(trials, 6)):
        overall = scored(rights, 24)["overall"]
        assert overall.low < overall.high
        assert -1e-12 <= overall.low <= overall.value <= overall.high <= 1 + 1e-12
        covered += overall.low <= truth.mean() <= overall.high
    assert covered / trials > 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials)
    if 0.1 < p < 0.9:
        assert covered / trials < 0.99


def test_the_overall_interval_is_mover_for_a_mean():
    """Distances to the ends add up in squares; away from 0 and 1 it is close to the normal one."""
    rights, n = [20, 24, 28, 30, 18, 25], 48
    overall = scored(rights, n)["overall"]
    share = np.array(rights) / n
    ends = np.array([wilson(right, n) for right in rights])
    assert overall.low == pytest.approx(
        share.mean() - np.sqrt(((share - ends[:, 0]) ** 2).sum()) / 6
    )
    assert overall.high == pytest.approx(
        share.mean() + np.sqrt(((ends[:, 1] - share) ** 2).sum()) / 6
    )
    normal = Z * np.sqrt((share * (1 - share) / n).sum()) / 6
    assert overall.high - overall.low == pytest.approx(2 * normal, rel=0.05)


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", grammar.SPLITS)
@pytest.mark.parametrize("most", [1, 2, 7, 16, 1000])
def test_held_out_prompts_are_of_their_split(split, most):
    for skill in grammar.SKILLS:
        chosen = held_out(skill, split, most)
        forms = [form for form in grammar.split_forms(split)[skill] if form]
        everything = {spec for form in forms for spec in form}
        assert len(set(chosen)) == len(chosen) <= most
        assert set(chosen) <= everything
        assert {grammar.split_of(spec) for spec in chosen} == {split}
        assert chosen == held_out(skill, split, most)
        if most >= 1000:
            assert len(chosen) > 0.5 * min(most, len(everything))
        elif min(map(len, forms)) * len(forms) >= most:
            assert len(chosen) == most
            counts = [sum(spec in form for spec in chosen) for form in forms]
            assert max(counts) - min(counts) <= 1


def test_held_out_prompts_are_spread_over_their_form():
    """Not the first ones of a list: the captions of a form come in the order of its attributes."""
    chosen = held_out("color_attr", "validation", 8)
    assert len({spec.things[0].shape for spec in chosen}) >= 4
    form = grammar.split_forms("validation")["color_attr"][0]
    places = [form.index(spec) for spec in chosen]
    assert max(places) > 0.8 * len(form) * 7 / 8


@torch.no_grad()
@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_policy_is_shown_the_prompts_of_the_split(split):
    policy = DrawnPolicy()
    first = evaluated(policy, split=split)
    second = evaluated(policy, split=split, seed=9)
    (prompts,) = {tuple(seen) for seen in policy.seen}
    assert len(set(prompts)) == len(prompts)
    assert all(grammar.split_of(grammar.parse(prompt)) == split for prompt in prompts)
    skills = [grammar.parse(prompt).skill for prompt in prompts]
    for skill in grammar.SKILLS:
        assert skills.count(skill) == len(held_out(skill, split, 4)) >= 2
    assert first.captions == second.captions
    assert set(first.captions) <= set(prompts)


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 3, 8, 9])
def test_images_are_shared_evenly_by_the_prompts(images):
    """Also fewer images than prompts; examples are at most four of each skill, in order."""
    policy, asked = DrawnPolicy(), []

    def reward(pictures, prompts, metadata):
        asked.extend(prompts)
        return [0.0] * len(prompts)

    found = evaluated(policy, reward=as_rewards(reward), images=images)
    assert len(asked) == 6 * images
    for skill in grammar.SKILLS:
        mine = [prompt for prompt in asked if grammar.parse(prompt).skill == skill]
        counts = [mine.count(prompt) for prompt in set(mine)]
        assert len(mine) == images
        assert len(counts) == min(images, len(held_out(skill, "validation", 4)))
        assert max(counts) - min(counts) <= 1
    shown = [grammar.parse(caption).skill for caption in found.captions]
    each = min(images, EXAMPLES_PER_SKILL)
    assert shown == [skill for skill in grammar.SKILLS for _ in range(each)]
    assert len(found.images) == len(found.passed) == 6 * each


# --- batches and noise ----------------------------------------------------------------------------


def plain(found):
    """The numbers of an evaluation in a list."""
    numbers = [value for score in found.scores.values() for value in vars(score).values()]
    return [*numbers, found.reward, *found.monitor_means().values()]


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batches_change_no_bit_with_an_elementwise_policy(batch_size):
    policy = DrawnPolicy(skill=0.8)
    one, other = (
        evaluated(policy, batch_size=size, reward=as_rewards(ShapesReward()))
        for size in (64, batch_size)
    )
    assert plain(other) == plain(one)
    assert torch.equal(other.images, one.images)
    assert (other.captions, other.passed) == (one.captions, one.passed)


def test_batches_change_nothing_but_rounding_through_the_network():
    policy = ShapesPolicy(random_weights(), precision="fp32")
    settings = {"images": 2, "prompts_per_skill": 1, "reward": ShapesReward()}
    one, other = (evaluated(policy, batch_size=size, **settings) for size in (12, 5))
    torch.testing.assert_close(other.images, one.images, rtol=0, atol=1e-4)
    assert other.captions == one.captions
    assert other.monitor_means()["diversity"] == pytest.approx(
        one.monitor_means()["diversity"], abs=1e-4
    )
    assert one.monitor_means()["diversity"] > 0.05
    assert other.reward == pytest.approx(one.reward, abs=0.02)


def test_noise_is_fixed_by_the_seed():
    policy = ShapesPolicy(random_weights(), precision="fp32")
    settings = {"images": 2, "prompts_per_skill": 1, "steps": 1}
    one, same, other = (evaluated(policy, seed=seed, **settings) for seed in (0, 0, 1))
    assert torch.equal(one.images, same.images)
    assert np.array_equal(plain(one), plain(same), equal_nan=True)
    assert not torch.isclose(one.images, other.images).all(dim=(1, 2, 3)).any()
    assert not any(parameter.requires_grad for parameter in (one.images, other.images))


# --- the comparison with the base -----------------------------------------------------------------


def comparison(policy, with_tuned=True, ledger=None, **settings):
    settings = {"split": "test", "steps": 1, "images": 4, **settings}
    evaluation = ShapesEvaluation(**settings)
    return compare_with_base(
        policy, evaluation, seed=1, batch_size=64, with_tuned=with_tuned, ledger=ledger
    )


def tuned_policy(base, tuned, **settings):
    """A policy with the given skills of reference and moving average; its live weights have 0.3."""
    policy = DrawnPolicy(skill=0.3, **settings)
    policy.weights.keep("reference", {"skill": torch.tensor(base)})
    policy.weights.keep("ema", {"skill": torch.tensor(tuned)})
    return policy


def test_the_tuned_weights_stand_beside_the_base():
    """0 before and 1 after; the average is judged, not the live weights, which come back."""
    policy, ledger = tuned_policy(0.0, 1.0), Ledger()
    summary, found = comparison(policy, ledger=ledger)
    assert list(summary["models"]) == list(found) == ["base", "base_guided", "tuned"]
    strict = {name: m["scores"]["overall"]["value"] for name, m in summary["models"].items()}
    assert strict == {"base": 0, "base_guided": 0, "tuned": 1}
    assert policy.skill.item() == pytest.approx(0.3)
    before, after = (found[name].scores["overall"] for name in ("base", "tuned"))
    gain = summary["gain"]
    assert gain["value"] == 1
    # MOVER for a difference of independent shares: distances to the near ends, in squares.
    assert gain["low"] == pytest.approx(1 - math.sqrt((1 - after.low) ** 2 + before.high**2))
    assert gain["high"] == pytest.approx(1)
    # Two evaluations of 24 images, as the best guidance is the base's own; before them the search,
    # 6 images a scale: nothing rises or falls at skill 0, so all of 1, 1.5, 2, 3, 4, 6, 8 are
    # tried, and all but 1 pass twice.
    assert ledger.network_evaluations == 2 * 24 + 6 + 6 * 12
    assert found["base_guided"] is found["base"]
    assert {name for name, _ in summary.items()} >= {"split", "steps", "seed", "best_guidance"}
    assert (summary["split"], summary["steps"], summary["seed"]) == ("test", 1, 1)
    assert list(summary["models"]["tuned"]["monitors"])[-3:] == ["diversity", "texture", "contrast"]


def test_equal_weights_gain_nothing():
    """The same prompts and noise for all: bit-equal images; the interval is wide about 0."""
    summary, found = comparison(tuned_policy(1.0, 1.0))
    assert torch.equal(found["base"].images, found["tuned"].images)
    gain = summary["gain"]
    assert gain["value"] == 0
    assert gain["low"] == pytest.approx(-gain["high"])
    assert gain["low"] < 0
    assert summary["best_guidance"] == 1


@pytest.mark.parametrize("scale", [-0.5, math.inf, math.nan])
def test_only_scales_that_mean_something_are_tried(scale):
    with pytest.raises(ValueError, match=r"guidance_tried\.1"):
        ShapesEvaluation(guidance_tried=(1.0, scale))


@pytest.mark.parametrize("right_at", [1.0, 1.5, 8.0])
def test_the_base_gets_its_best_guidance(right_at):
    """A base that draws at one scale only: found on validation prompts, shown on test prompts."""
    policy = tuned_policy(1.0, 0.0, right_at=right_at)
    summary, found = comparison(policy)
    splits = [{grammar.split_of(grammar.parse(p)) for p in seen} for seen in policy.seen]
    assert splits == [{"validation"}] * len(GUIDANCE_SCALES) + [{"test"}] * (2 + (right_at != 1))
    tried = {entry["guidance"]: entry["value"] for entry in summary["guidance_tried"]}
    assert tried == {scale: float(scale == right_at) for scale in GUIDANCE_SCALES}
    assert {entry["images"] for entry in summary["guidance_tried"]} == {6}
    assert summary["best_guidance"] == right_at
    assert found["base_guided"].scores["overall"].value == 1
    assert found["base"].scores["overall"].value == float(right_at == 1)
    guided = summary["models"]["base_guided"]
    assert (guided["guidance"], guided["passes"]) == (right_at, 1 if right_at == 1 else 2)
    assert {summary["models"][name]["passes"] for name in ("base", "tuned")} == {1}


class Scripted(HeldOutEvaluation):
    """Strict scores by guidance scale; notes how it is run."""

    def run(self, policy, *, seed, batch_size, reward=None, ledger=None):
        strict = policy.strict[self.guidance]
        policy.runs.append(self)
        overall = Score(strict, strict, strict, images=self.images)
        return Evaluated({"overall": overall}, 0.0, {"sharpness": 0.1}, torch.zeros(0), [], [])


class ScriptedPolicy(DrawnPolicy):
    """`strict`: score by guidance scale."""

    def __init__(self, strict):
        super().__init__()
        self.strict, self.runs = strict, []
        self.weights.keep("reference")
        self.weights.keep("ema")


@pytest.mark.parametrize(
    ("scores", "tried"),
    [
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), 7),
        ((0.5, 0.4, 0.3, 0.9, 0.9, 0.9, 0.9), 3),
        ((0.2, 0.3, 0.4, 0.39, 0.38, 0.9, 0.9), 5),
        ((0.2, 0.3, 0.29, 0.31, 0.3, 0.2, 0.9), 6),
        ((0.5, 0.5, 0.4, 0.4, 0.3, 0.3, 0.2), 7),
    ],
)
def test_guidance_is_raised_until_the_score_has_fallen_twice_in_a_row(scores, tried):
    policy = ScriptedPolicy(dict(zip(GUIDANCE_SCALES, scores, strict=True)))
    found = try_guidance(policy, Scripted(images=7), seed=0, batch_size=1)
    assert list(found) == list(GUIDANCE_SCALES[:tried])
    assert [score.value for score in found.values()] == list(scores[:tried])
    assert {run.images for run in policy.runs} == {1}


def test_the_guidance_of_the_evaluation_is_among_those_tried():
    policy = ScriptedPolicy({scale: scale for scale in (*GUIDANCE_SCALES, 2.5)})
    summary, _ = compare_with_base(policy, Scripted(guidance=2.5), seed=0, batch_size=1)
    tried = [entry["guidance"] for entry in summary["guidance_tried"]]
    assert tried == [1, 1.5, 2, 2.5, 3, 4, 6, 8]


def test_an_evaluation_of_ones_own_is_compared_with_its_own_settings_and_monitors():
    """All but split, guidance and number of images stay as the recipe has them."""
    policy = ScriptedPolicy(dict(zip(GUIDANCE_SCALES, (0.5, 0.4, 0.3, 0, 0, 0, 0), strict=True)))
    evaluation = Scripted(steps=7, test_images=20)
    summary, found = compare_with_base(policy, evaluation.on_test_prompts(), seed=0, batch_size=1)
    assert [(run.split, run.images, run.steps) for run in policy.runs] == [
        *[("validation", 5, 7)] * 3,
        *[("test", 20, 7)] * 2,
    ]
    assert list(found) == ["base", "base_guided", "tuned"]
    assert summary["models"]["tuned"]["monitors"] == {"sharpness": 0.1}


def test_the_comparison_keeps_the_prompts_of_the_recipe():
    policy = tuned_policy(1.0, 1.0)
    comparison(policy, prompts_per_skill=1)
    assert {len(seen) for seen in policy.seen} == {6}


def test_all_but_the_guided_base_are_judged_at_the_guidance_of_the_recipe():
    summary, found = comparison(tuned_policy(1.0, 1.0, right_at=2.0), guidance=2.0)
    assert {name: e.scores["overall"].value for name, e in found.items()} == {
        "base": 1, "base_guided": 1, "tuned": 1,
    }  # fmt: skip
    assert (summary["guidance"], summary["best_guidance"]) == (2.0, 2.0)
    summary, found = comparison(tuned_policy(1.0, 1.0, right_at=1.5), guidance=2.0)
    assert [found[name].scores["overall"].value for name in ("base", "tuned")] == [0, 0]
    assert (summary["guidance"], summary["best_guidance"]) == (2.0, 1.5)


def test_without_tuned_weights_only_the_base_is_shown():
    policy = DrawnPolicy()
    policy.weights.keep("reference")
    summary, found = comparison(policy, with_tuned=False, split="validation")
    assert list(found) == ["base", "base_guided"]
    assert "gain" not in summary
    assert summary["split"] == "validation"


def test_the_interval_of_a_gain_covers_the_true_one():
    """MOVER by simulation: two independent policies of strict scores 0.3 and 0.5."""

    def judged(rights):
        nothing = torch.zeros(0, 3, 32, 32)
        return Evaluated(scored(rights, 24), 0.0, {}, nothing, [], [])

    rng = np.random.default_rng(1)
    trials, covered = 300, 0
    for _ in range(trials):
        gain = _gain(*(judged(rng.binomial(24, p, 6)) for p in (0.3, 0.5)))
        covered += gain["low"] <= 0.2 <= gain["high"]
    assert 0.91 < covered / trials < 0.99


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"split": "train"}, "split is validation or test"),
        ({"steps": 0}, "evaluation.steps: .* greater than or equal to 1, not 0"),
        ({"guidance": -1.0}, "evaluation.guidance: .* greater than or equal to 0, not -1.0"),
        ({"images": 2.5}, "evaluation.images: .* integer, not 2.5"),
        ({"seed": 2**63 - 1}, "run.seed: .* less than"),
        ({"seed": -1}, "run.seed: .* greater than or equal to 0, not -1"),
    ],
)
def test_evaluate_refuses_settings_out_of_range(setting, message):
    with pytest.raises(InputError, match=message):
        evaluate(**setting)
