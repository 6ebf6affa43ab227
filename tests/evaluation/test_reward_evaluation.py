"""Evaluation by reward: which prompts, what interval, and how a gain is judged."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from entroflow.errors import InputError, RecipeError
from entroflow.evaluation.base_and_tuned import compare_with_base
from entroflow.evaluation.image_statistics import statistics
from entroflow.evaluation.reward import EXAMPLES, RewardEvaluation
from entroflow.ledger import Ledger
from entroflow.recipe.load import load_recipe
from entroflow.rewards.combined import as_rewards
from tiny_run import PixelPolicy

WORDS = [f"word {number}" for number in range(10)]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text("\n".join(WORDS) + "\n\n")
    return path


def run(evaluation, reward, policy=None, **options):
    policy = policy or PixelPolicy()
    return evaluation.run(policy, seed=0, batch_size=64, reward=as_rewards(reward), **options)


def number(images, prompts, metadata):
    """The number in a prompt."""
    return [float(prompt.split()[1]) for prompt in prompts]


def test_lines_are_dealt_to_validation_and_test(prompts):
    evaluation = RewardEvaluation(path=prompts, images=10, steps=2)
    seen = []

    def reward(images, texts, metadata):
        seen.extend(texts)
        return [0.0] * len(texts)

    run(evaluation, reward)
    assert seen == [word for word in WORDS[::2] for _ in range(2)]
    seen.clear()
    run(evaluation.on_test_prompts().model_copy(update={"images": 7}), reward)
    assert [seen.count(word) for word in WORDS[1::2]] == [3, 2, 0, 2, 0]


def test_the_score_is_a_mean_over_prompts_with_the_interval_of_a_t_test(prompts):
    """Prompts 0, 2, ... 8 with reward 0, 2, ... 8, the first with three images, not two."""
    ledger = Ledger()
    found = run(RewardEvaluation(path=prompts, images=11, steps=2), number, ledger=ledger)
    values = [0, 2, 4, 6, 8]
    score = found.scores["overall"]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (score.value, score.low, score.high) == pytest.approx((4, low, high))
    assert score.images == 11
    assert found.reward == 4
    assert found.by_prompt.tolist() == values
    assert ledger.reward_calls == 11
    assert ledger.network_evaluations == 22


def test_what_failed_is_left_out_of_its_prompt(prompts):
    """One image of prompt 0 and both of prompt 2 have no reward."""

    def reward(images, texts, metadata):
        values = number(images, texts, metadata)
        return [math.nan if i in (0, 2, 3) else value for i, value in enumerate(values)]

    found = run(RewardEvaluation(path=prompts, images=10, steps=2), reward)
    assert found.by_prompt.nan_to_num(-1).tolist() == [0, -1, 4, 6, 8]
    assert found.reward == found.scores["overall"].value == 4.5

    found = run(RewardEvaluation(path=prompts, images=10, steps=2), lambda *_: [math.nan] * 10)
    assert math.isnan(found.scores["overall"].value)


def test_examples_are_one_image_of_the_first_prompts(tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text("\n".join(f"word {number}" for number in range(40)))
    found = run(RewardEvaluation(path=path, images=60, steps=2), number)
    assert list(found.captions) == [f"word {2 * number}" for number in range(EXAMPLES)]
    assert len(found.images) == len(found.passed) == EXAMPLES
    assert set(found.passed) == {None}
    assert set(found.monitors) == set(statistics(found.drawn.images, found.drawn.prompt))


@pytest.mark.parametrize(
    ("images", "drawn"), [(1, [0, 4]), (4, [0, 4]), (7, [0, 2, 6]), (9, [0, 2, 4, 6])]
)
def test_few_images_are_pairs_of_fewer_prompts(prompts, images, drawn):
    """Of the five validation prompts 0, 2, ... 8, spread over the list; at least two."""
    found = run(RewardEvaluation(path=prompts, images=images, steps=2), number)
    assert len(found.by_prompt) == len(drawn)
    known = found.by_prompt[~found.by_prompt.isnan()].tolist()
    assert known == drawn[: min(images, len(drawn))]
    assert math.isnan(found.monitor_means()["diversity"]) == (images == 1)


def test_jsonl_prompts_keep_their_metadata(tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text("\n".join(json.dumps({"text": w, "number": i}) for i, w in enumerate(WORDS)))
    known = []

    def reward(images, texts, metadata):
        known.extend(metadata)
        return [0.0] * len(texts)

    run(RewardEvaluation(path=path, key="text", images=10, steps=2), reward)
    assert known == [{"number": number} for number in range(0, 10, 2) for _ in range(2)]


def test_a_gain_is_judged_prompt_by_prompt(prompts):
    """Prompts differ by far more than the tuned weights add, and that hides nothing.

    A pixel of the tuned weights is brighter by 0.01, and prompt n has the reward 100 n + n pixel.
    """
    policy = PixelPolicy(shift=0.0)
    policy.weights.keep("ema", {"shift": policy.shift + 0.01})
    evaluation = RewardEvaluation(path=prompts, images=10, test_images=10, steps=4)

    def reward(images, texts, metadata):
        means = images.double().flatten(1).mean(dim=1).tolist()
        numbers = number(images, texts, metadata)
        return [100 * n + n * mean for n, mean in zip(numbers, means, strict=True)]

    summary, found = compare_with_base(
        policy, evaluation.on_test_prompts(), seed=0, batch_size=64, reward=as_rewards(reward)
    )
    change = (found["tuned"].by_prompt - found["base"].by_prompt).numpy()
    assert change == pytest.approx([0.01, 0.03, 0.05, 0.07, 0.09], rel=1e-4)
    wanted = stats.ttest_1samp(change, 0).confidence_interval(0.95)
    gain = summary["gain"]
    assert gain["value"] == pytest.approx(change.mean())
    assert (gain["low"], gain["high"]) == pytest.approx((wanted.low, wanted.high))
    assert 0 < gain["low"] < gain["high"] < 1
    wide = summary["models"]["base"]["scores"]["overall"]
    assert wide["high"] - wide["low"] > 100
    assert summary["measure"]["name"] == "reward"
    assert summary["models"]["tuned"]["reward"] == found["tuned"].reward


def test_wrong_input_shows_before_a_run(tmp_path, prompts):
    missing = load_recipe(
        "quickstart", ["evaluation.type=reward", f"evaluation.path={tmp_path / 'none.txt'}"]
    )
    with pytest.raises(InputError, match=r"there is no prompt file .*none\.txt"):
        missing.evaluation.check()
    prompts.write_text("one\ntwo\nthree\n")
    few = RewardEvaluation(path=prompts)
    with pytest.raises(InputError, match="has 3 prompts, but an evaluation needs at least 4"):
        few.check()
    with pytest.raises(RecipeError, match="key 'path' is missing"):
        load_recipe("quickstart", ["evaluation.type=reward"])
    with pytest.raises(RecipeError, match="split is validation or test"):
        load_recipe(
            "quickstart",
            ["evaluation.type=reward", f"evaluation.path={prompts}", "evaluation.split=train"],
        )
    with pytest.raises(InputError, match="needs the reward of the run"):
        few.run(PixelPolicy(), seed=0, batch_size=1)


def test_noise_is_the_same_every_time(prompts):
    evaluation = RewardEvaluation(path=prompts, images=4, steps=2)
    first, second = (run(evaluation, number) for _ in range(2))
    assert torch.equal(first.images, second.images)
