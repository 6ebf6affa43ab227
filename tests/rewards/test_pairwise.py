"""The pairwise reward with judges that are known: what it asks, and what it makes of failures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from entroflow.credit.normalise import group_advantages
from entroflow.errors import RecipeError
from entroflow.noise import Stream, generator
from entroflow.prompts import Prompt
from entroflow.recipe.load import build_recipe, load_recipe
from entroflow.rewards.base import Status
from entroflow.rewards.pairwise import Pairwise
from entroflow.training.trainer import Trainer
from tiny_run import GROUP, HERE, PROMPTS, ByBrightness, PixelPolicy, only, recipe

MINE = __name__


def pairwise(judge=None, **settings):
    return Pairwise(**settings).model_copy(update={"judge": judge or ByBrightness()})


def images(levels):
    return torch.tensor(levels).float()[:, None, None, None].expand(-1, 3, 4, 4)


def scored(reward, levels, seed=0, group=0):
    source = generator(seed, Stream.JUDGE, 0, group)
    return reward.score_group(images(levels), Prompt("a ring"), source)


LEVELS = [0.1, 0.9, 0.5, 0.3, 0.2, 0.8, 0.7, 0.6]


# --- what is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "questions"),
    [
        ({"order": "fixed"}, 28),
        ({"order": "random"}, 28),
        ({}, 56),
        ({"schedule": "circulant", "comparisons": 4, "order": "fixed"}, 16),
        ({"schedule": "random", "comparisons": 4}, 32),
    ],
)
def test_how_often_the_judge_is_asked(settings, questions):
    """G (G - 1) / 2 pairs, G k / 2 of circulant and random, twice that with swap (T2)."""
    judge = ByBrightness()
    found = scored(pairwise(judge, **settings), LEVELS)
    ((sides, prompts),) = judge.asked
    assert len(sides) == questions == found.facts["questions"]
    assert prompts == ["a ring"] * questions
    unordered = [tuple(sorted(pair)) for pair in sides]
    assert all(
        unordered.count(pair) == 1 + (settings.get("order", "swap") == "swap") for pair in unordered
    )
    if settings.get("order") == "fixed":
        assert sides == sorted(map(list, unordered)) or settings.get("schedule") == "circulant"
        assert all(first < second for first, second in sides)


def test_what_is_drawn_follows_from_the_address():
    settings = {"order": "random", "schedule": "random"}
    asked = {}
    for name, address in {"a": (0, 0), "again": (0, 0), "group": (0, 1), "seed": (1, 0)}.items():
        judge = ByBrightness()
        scored(pairwise(judge, **settings), LEVELS, *address)
        asked[name] = judge.asked
    assert asked["a"] == asked["again"]
    assert asked["a"] != asked["group"]
    assert asked["a"] != asked["seed"]


def test_a_strict_judge_ranks():
    rank = np.argsort(np.argsort(LEVELS)) / 7
    for settings in ({}, {"order": "fixed"}, {"order": "random"}):
        found = scored(pairwise(**settings), LEVELS)
        np.testing.assert_allclose(found.values.numpy(), rank, atol=1e-12)
        assert found.statuses == (Status.OK,) * 8
        assert found.facts["discriminability"] == pytest.approx(1)
        assert found.facts["intransitive"] == 0
    published = scored(pairwise(order="fixed", decimals=3, on_unparsed="tie"), LEVELS)
    np.testing.assert_allclose(published.values.numpy(), np.round(rank, 3), atol=1e-12)


def test_a_group_of_one_is_skipped():
    judge = ByBrightness()
    found = scored(pairwise(judge), [0.4])
    assert found.values.isnan().all()
    assert found.statuses == (Status.SKIPPED,)
    assert not judge.asked


# --- failures -------------------------------------------------------------------------------------


def test_a_judge_that_says_nothing_readable_is_no_tie():
    """All garbage: the group is masked, and counted; as published it is a tie everywhere (T7)."""
    garbage = ByBrightness(fails=56, status="unparsed")
    found = scored(pairwise(garbage), LEVELS)
    assert found.values.isnan().all()
    assert found.statuses == (Status.UNPARSED,) * 8
    assert found.facts["unparsed"] == 1
    ties = scored(pairwise(garbage, on_unparsed="tie"), LEVELS)
    assert (ties.values == 0.5).all()
    assert ties.facts["unparsed"] == 1


def test_a_lost_answer_leaves_the_swapped_one():
    """The first 28 questions fail, the second order answers: nothing changes but the share."""
    found = scored(pairwise(ByBrightness(fails=28, status="timeout")), LEVELS)
    whole = scored(pairwise(), LEVELS)
    assert torch.equal(found.values, whole.values)
    assert found.facts["failed"] == 0.5
    assert found.statuses == (Status.OK,) * 8


def test_an_image_without_any_comparison_says_why():
    """Questions 0 to 6 of a fixed round robin are those about the first image."""
    found = scored(pairwise(ByBrightness(fails=7, status="timeout"), order="fixed"), LEVELS)
    assert found.values.isnan().tolist() == [True] + [False] * 7
    assert found.statuses[0] is Status.TIMEOUT


def test_a_judge_with_a_preference_for_a_place():
    """Asked twice it learns nothing, and says so; asked once it ranks by the index (T5)."""
    twice = scored(pairwise(ByBrightness(always_first=True)), LEVELS)
    assert (group_advantages(twice.values, torch.zeros(8, dtype=torch.long)) == 0).all()
    assert twice.facts["first"] == twice.facts["disagreements"] == 1
    once = scored(pairwise(ByBrightness(always_first=True), order="fixed"), LEVELS)
    np.testing.assert_allclose(once.values.numpy(), [(7 - i) / 7 for i in range(8)], atol=1e-12)


def test_against_others_an_image_meets_its_counterpart_alone():
    judge = ByBrightness()
    reward = pairwise(judge)
    prompts = [Prompt("first"), Prompt("second"), Prompt("third")]
    found = reward.score_against(
        images([0.2, 0.5, 0.9]), images([0.3, 0.5, 0.1]), prompts, generator(0, Stream.JUDGE)
    )
    assert found.values.tolist() == [0, 0.5, 1]
    ((sides, asked),) = judge.asked
    assert sides == [[0, 3], [1, 4], [2, 5], [3, 0], [4, 1], [5, 2]]
    assert asked == ["first", "second", "third"] * 2


# --- in a run -------------------------------------------------------------------------------------


def test_images_of_two_prompts_never_meet():
    """Each question is about the caption of its group (T17), whatever the batches are."""
    trainer = Trainer(
        recipe(reward={"type": "pairwise", "judge": {"type": f"{HERE}.ByBrightness"}}),
        PixelPolicy(),
    )
    metrics = trainer.step()
    judge = only(trainer.recipe).judge
    assert len(judge.asked) == PROMPTS
    for sides, prompts in judge.asked:
        assert len(set(prompts)) == 1
        assert {i for pair in sides for i in pair} == set(range(GROUP))
    assert {prompts[0] for _, prompts in judge.asked} == {
        prompt.text for prompt in trainer.recipe.prompts.batch(0, 0)
    }
    assert metrics["reward/mean"] == pytest.approx(0.5)
    assert metrics["judge/reward/discriminability"] == pytest.approx(1)
    assert metrics["judge/reward/questions"] == GROUP * (GROUP - 1)
    assert metrics["ledger/reward_calls"] == PROMPTS * GROUP
    assert metrics["policy/gradient_norm"] > 0


def test_the_best_checkpoint_is_that_of_the_best_score_where_nothing_can_be_compared():
    """Without its images an evaluation has no win rates, but it has a score."""
    judge = {"type": f"{HERE}.ByBrightness"}
    compares = {"type": "pairwise", "judge": judge}
    both = {"type": "mixture", "rewards": {"a": compares, "b": {"type": f"{HERE}.brightness"}}}
    line = {"eval/reward": 0.2, "eval/score": 0.3}
    for reward, expected in ((compares, 0.3), (both, 0.2), ({"type": f"{HERE}.brightness"}, 0.2)):
        trainer = Trainer(recipe(reward=reward), PixelPolicy())
        assert trainer.standing(line) == expected
        assert trainer.standing({**line, "eval/win_rate": 0.2}) == 0.2
        assert trainer.standing({"eval/reward": None, "eval/score": None}) == -math.inf


def test_win_rates_raise_what_the_judge_prefers():
    trainer = Trainer(
        recipe(
            reward={"type": "pairwise", "judge": {"type": f"{HERE}.ByBrightness"}},
            objective={"kl": 0.0}, optimizer={"warm_up": 0}, allocation={"group_size": 8},
        ),
        PixelPolicy(),
    )  # fmt: skip
    for _ in range(10):
        trainer.step()
    assert trainer.policy.shift.detach().mean() > 0.05


def test_completions_meet_those_of_the_same_step():
    """With TP-GRPO each (prompt, index) is a group of its own."""
    trainer = Trainer(
        recipe(
            reward={"type": "pairwise", "judge": {"type": f"{HERE}.ByBrightness"}},
            credit={"type": "turning_points"},
        ),
        PixelPolicy(),
    )
    trainer.step()
    assert len(only(trainer.recipe).judge.asked) == PROMPTS * (1 + 2)


# --- recipes --------------------------------------------------------------------------------------


def with_reward(fields):
    return build_recipe({"reward": fields, "evaluation": {"type": f"{HERE}.Shift"}}, "mine")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"type": "pairwise", "judge": {"type": "openai"}},
            "mine: reward.judge: key 'model' is missing",
        ),
        ({"type": "pairwise", "judge": 3}, "mine: reward.judge must hold keys and values, not 3"),
        (
            {"type": "pairwise", "judge": {"type": f"{MINE}.nobody"}},
            "mine: reward.judge.type: .* has no 'nobody'",
        ),
        (
            {"type": "pairwise", "judge": {"type": f"{HERE}.Brightness"}},
            "mine: reward.judge.type: .*Brightness is not for judge: it has no compare",
        ),
        (
            {"type": "pairwise", "judge": {"type": f"{HERE}.ByBrightness", "fail": 1}},
            "mine: reward.judge: .*unexpected keyword argument 'fail'",
        ),
        (
            {"type": "pairwise", "judge": {"type": f"{HERE}.ByBrightness"}, "schedul": "random"},
            "mine: reward: unknown key 'schedul'; did you mean 'schedule'",
        ),
    ],
)
def test_wrong_judges_are_refused(fields, said):
    with pytest.raises(RecipeError, match=said):
        with_reward(fields)


def test_a_judge_is_part_of_the_recipe(tmp_path):
    """Written out, read back, overridden and hashed."""
    made = with_reward({"type": "pairwise", "judge": {"type": f"{HERE}.ByBrightness", "fails": 2}})
    assert only(made).judge.fails == 2
    path = tmp_path / "mine.yaml"
    path.write_text(made.to_yaml())
    again = load_recipe(path)
    assert again.hash == made.hash
    assert only(again).judge.fails == 2
    other = load_recipe(path, ["reward.judge.fails=3"])
    assert only(other).judge.fails == 3
    assert other.hash != made.hash
