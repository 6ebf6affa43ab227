"""Rewards that compare, and monitors, on held-out images."""

from __future__ import annotations

import pytest
import torch

from entroflow.errors import InputError
from entroflow.evaluation.base import Evaluated, Score
from entroflow.evaluation.base_and_tuned import compare_with_base
from entroflow.evaluation.reward import RewardEvaluation
from entroflow.evaluation.watching import watched
from entroflow.ledger import Ledger
from entroflow.rewards.base import Scores, Status
from entroflow.rewards.combined import as_rewards
from entroflow.rewards.mixture import Mixture
from entroflow.rewards.pairwise import Pairwise
from entroflow.rewards.parts import as_parts
from tiny_run import Brightness, ByBrightness, PixelPolicy, brightness, part


class Failing:
    def score(self, images, prompts):
        raise OSError("no server")


@pytest.fixture
def evaluation(tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text("\n".join(f"word {number}" for number in range(8)))
    return RewardEvaluation(path=path, images=12, test_images=12, steps=2)


def pairwise(judge=None):
    return Pairwise().model_copy(update={"judge": judge or ByBrightness()})


def look(evaluation, shift, reward, monitors=None, base=None, **options):
    """The evaluation of a policy whose images are brighter by `shift`, with what it leaves out."""
    rewards, watching = as_rewards(reward), as_parts(monitors or {}, "monitors.rewards")
    found = evaluation.run(PixelPolicy(shift), seed=0, batch_size=5, reward=rewards)
    base = base or found.drawn
    return watched(evaluation, found, rewards, watching, base, seed=0, batch_size=5, **options)


@pytest.mark.parametrize(("shift", "rate"), [(0.2, 1.0), (-0.2, 0.0), (0.0, 0.5)])
def test_the_reward_of_a_judge_is_its_win_rate_over_the_base(evaluation, shift, rate):
    ledger, judge = Ledger(), ByBrightness()
    base = look(evaluation, 0.0, pairwise())
    assert base.reward == base.scores["overall"].value == 0.5
    found = look(evaluation, shift, pairwise(judge), base=base.drawn, ledger=ledger)
    assert found.win_rates["reward"].tolist() == [rate] * 12
    assert found.reward == found.scores["overall"].value == rate
    assert found.drawn.rewards.tolist() == [rate] * 12
    # Both orders of twelve pairs, each about its own prompt: validation has the even ones.
    assert ledger.reward_calls == 12
    asked = [text for _, texts in judge.asked for text in texts]
    assert {text: asked.count(text) for text in asked} == {f"word {n}": 6 for n in (0, 2, 4, 6)}


def test_a_mixture_counts_what_compares_and_what_does_not_with_their_weights(evaluation):
    rewards = {"light": Brightness(), "wins": pairwise()}
    mixture = Mixture(weights={"light": 2.0, "wins": 3.0}).model_copy(update={"rewards": rewards})
    base = look(evaluation, 0.0, mixture)
    found = look(evaluation, 0.2, mixture, base=base.drawn)
    light = found.drawn.images.double().flatten(1).mean(dim=1)
    torch.testing.assert_close(found.drawn.rewards, 2 * light + 3 * 1.0)
    assert found.reward == pytest.approx(found.drawn.rewards.mean().item())
    only = Mixture(weights={"wins": 3.0}).model_copy(update={"rewards": {"wins": pairwise()}})
    assert look(evaluation, 0.2, only, base=base.drawn).reward == pytest.approx(3.0)


def test_monitors_are_scored_beside_the_statistics(evaluation):
    monitors = {"light": Brightness(), "wins": pairwise(), "gone": Failing()}
    base = look(evaluation, 0.0, brightness, monitors)
    found = look(evaluation, 0.2, brightness, monitors, base.drawn)
    means = found.monitor_means()
    assert means["light"] == pytest.approx(found.reward)
    assert means["wins"] == 1.0
    assert means["gone"] != means["gone"], "NaN: it failed"
    assert found.scores == look(evaluation, 0.2, brightness).scores
    assert not found.win_rates
    assert {"brightness", "diversity"} <= means.keys()


def test_the_names_of_what_is_measured_are_known_before(evaluation):
    found = evaluation.run(PixelPolicy(), seed=0, batch_size=5, reward=as_rewards(Brightness()))
    assert {*found.monitors} == {*evaluation.monitor_names}


def test_what_can_not_be_watched_is_said(evaluation):
    with pytest.raises(InputError, match=r"monitors\.rewards\.brightness: the evaluation has one"):
        look(evaluation, 0.0, Brightness(), {"brightness": Brightness()})
    blind = Evaluated({"overall": Score(0.5, 0.4, 0.6, 2)}, 0.5, {}, torch.zeros(0), [], [])
    with pytest.raises(InputError, match="does not return what it has drawn, so that light can't"):
        watched(evaluation, blind, None, {"light": part(Brightness())}, None, seed=0, batch_size=5)
    assert (
        watched(evaluation, blind, as_rewards(pairwise()), {}, None, seed=0, batch_size=5) is blind
    )


def test_the_comparison_says_how_often_the_tuned_weights_win(evaluation):
    policy = PixelPolicy()
    policy.weights.keep("ema", {"shift": policy.shift + 0.2})
    summary, _ = compare_with_base(
        policy, evaluation, seed=0, batch_size=64, reward=as_rewards(pairwise()),
        monitors={"light": part(Brightness())},
    )  # fmt: skip
    models = summary["models"]
    assert models["base"]["win_rates"]["reward"]["value"] == 0.5
    assert models["tuned"]["win_rates"]["reward"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert summary["gain"]["value"] == 0.5
    light = [models[name]["monitors"]["light"] for name in ("base", "tuned")]
    assert light[1] > light[0]


def test_a_judge_that_prefers_a_place_finds_no_gain(evaluation):
    """Also where training asks in one order only, as published."""
    judge = Pairwise(order="fixed").model_copy(update={"judge": ByBrightness(always_first=True)})
    base = look(evaluation, 0.0, judge)
    found = look(evaluation, 0.2, judge, base=base.drawn)
    assert found.win_rates["reward"].tolist() == [0.5] * 12


def test_every_prompt_counts_alike_also_in_the_win_rate(tmp_path):
    """Ten images of four prompts: three of two, two of the others."""
    path = tmp_path / "held_out.txt"
    path.write_text("\n".join(f"word {number}" for number in range(8)))
    evaluation = RewardEvaluation(path=path, images=10, steps=2)
    base = look(evaluation, 0.0, pairwise())
    found = look(evaluation, 0.002, pairwise(), base=base.drawn)
    assert found.reward == found.scores["overall"].value


def test_a_value_beside_a_failure_is_never_used(evaluation):
    class Own:
        def score(self, images, prompts):
            statuses = [Status.ERROR, *[Status.OK] * (len(images) - 1)]
            values = torch.full((len(images),), 2.0)
            values[1:2] = torch.inf
            return Scores(values, tuple(statuses))

    found = look(evaluation, 0.0, Brightness(), {"own": Own()})
    assert found.monitor_means()["own"] == 2.0
    assert found.monitors["own"].isnan().sum() == 6, "two in each of three batches"


def test_a_win_rate_is_not_measured_at_other_guidance_scales(evaluation):
    summary, _ = compare_with_base(
        PixelPolicy(),
        evaluation,
        seed=0,
        batch_size=64,
        reward=as_rewards(pairwise()),
        with_tuned=False,
    )
    assert [tried["guidance"] for tried in summary["guidance_tried"]] == [1.0]
