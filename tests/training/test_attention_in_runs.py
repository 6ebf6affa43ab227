"""Attention entropy in whole runs: who gets rollouts, which steps explore (A-8), what is said."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

import entroflow
from entroflow.allocation.attention_shift import AttentionShift
from entroflow.checkpoints import write_digests
from entroflow.credit.normalise import group_advantages
from entroflow.credit.terminal import Terminal
from entroflow.errors import InputError
from entroflow.exploration.attention_peaks import AttentionPeaks
from entroflow.objectives.transitions import transitions_of
from entroflow.recipe.load import load_recipe
from entroflow.sampling.plan import Role
from entroflow.settings import Attention
from entroflow.training.launch import resume
from entroflow.training.trainer import Trainer
from random_network import random_weights
from tiny_run import PixelPolicy, assert_same_run, final_tensors, lines, recipe

TINY = (
    "prompts.per_iteration=3", "sampling.steps=4", "evaluation.images=2",
    "evaluation.test_images=1", "evaluation.steps=2", "run.iterations=2", "run.evaluate_every=2",
)  # fmt: skip
UNIFORM = ("allocation.type=uniform", "allocation.group_size=4")
EQUAL = ("allocation.type=attention_shift", "allocation.low=4", "allocation.high=4")
SPLIT = ("allocation.type=attention_shift", "allocation.low=2", "allocation.high=6")
ALL = ("exploration.type=attention_peaks", "exploration.count=3")
PEAKS = ("exploration.type=attention_peaks", "exploration.count=2", "exploration.exclude=[0]")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "base.safetensors"
    save_file(random_weights(), path)
    return f"policy.weights={path}"


def trainer_of(name, weights, *changes):
    return Trainer(load_recipe(name, [*TINY, weights, *changes]))


# --- equal budgets and all steps are the host -----------------------------------------------------


@pytest.mark.parametrize(("host", "changes"), [
    ("flow_grpo", (*EQUAL, *ALL)),
    pytest.param("flow_grpo", EQUAL, marks=pytest.mark.slow),
    pytest.param("flow_grpo", (*UNIFORM, *ALL), marks=pytest.mark.slow),
    pytest.param("flow_grpo", (*UNIFORM, "attention.measure=true"), marks=pytest.mark.slow),
    ("tp_grpo", (*EQUAL, *ALL)),
    ("pref_grpo", (*EQUAL, "objective.kl=0.02")),
    ("e_grpo", EQUAL),
])  # fmt: skip
def test_with_equal_budgets_and_all_steps_it_is_its_host(host, changes, weights, tmp_path):
    """Two iterations, KL and learnt judges included, to the bit."""
    own = ["exploration.merge=1", "exploration.starts=[0, 2]"] if host == "e_grpo" else []
    same = [c for c in changes if c.startswith("objective")]
    runs = [
        entroflow.train(host, [*TINY, weights, *own, *given], run=tmp_path / name)
        for name, given in (("host", [*UNIFORM, *same]), ("ours", changes))
    ]
    first, second = map(final_tensors, runs)
    for part, tensors in first.items():
        assert all(torch.equal(second[part][key], value) for key, value in tensors.items())
    for one, other in zip(*map(lines, runs), strict=True):
        odd = ("plan", "judge/reward/seconds")
        if set(changes) <= {*EQUAL, *same}:
            # Nothing is measured, so it costs the same, too.
            keys = ("network_evaluations", "weighted_evaluations", "check_evaluations")
            assert all(one[f"ledger/{key}"] == other[f"ledger/{key}"] for key in keys)
        both = {k for k in one.keys() & other.keys() if k not in odd and "ledger" not in k}
        assert {key: one[key] for key in both} == {key: other[key] for key in both}
        assert one["ledger/reward_calls"] == other["ledger/reward_calls"]
    measured = set(changes) & {*ALL, "attention.measure=true"}
    assert ("attention" in lines(runs[1])[1]) == bool(measured)
    assert "attention" not in lines(runs[0])[1]


def test_measuring_for_the_report_alone_is_no_part_of_the_cost(weights):
    plain, measured = (trainer_of("flow_grpo", weights, *UNIFORM, *c)
                       for c in ((), ("attention.measure=true",)))  # fmt: skip
    for _ in range(2):
        one, other = plain.step(), measured.step()
        assert one["ledger/network_evaluations"] == other["ledger/network_evaluations"]
        assert one["ledger/weighted_evaluations"] == other["ledger/weighted_evaluations"]
    # At first policy and reference agree; then 4 states of each of 3 prompts are compared.
    more = other["ledger/check_evaluations"] - one["ledger/check_evaluations"]
    assert more == 12


# --- the two levels -------------------------------------------------------------------------------


def test_what_has_moved_more_gets_more(weights, monkeypatch):
    """Two rounds of one group: members go on, and every group is normalised over all of its own."""
    trainer = trainer_of("flow_grpo", weights, *SPLIT, "credit.scale=group")
    trainer.step()
    seen = {}
    own = Terminal.advantages

    def advantages_of(credit, rollouts, scores):
        seen["rollouts"], seen["scores"] = rollouts, scores
        seen["table"] = own(credit, rollouts, scores)
        return seen["table"]

    monkeypatch.setattr(Terminal, "advantages", advantages_of)
    metrics = trainer.step()
    found = metrics["attention"]
    plan, scores = seen["rollouts"].plan, seen["scores"]
    order = sorted(range(3), key=lambda p: -found["shift"][p])
    assert len({*found["shift"]}) == 3
    assert [found["size"][p] for p in order] == [6, 4, 2]
    for prompt, size in enumerate(found["size"]):
        mine = plan.prompt == prompt
        assert sorted(plan.member[mine].tolist()) == list(range(size))
        assert plan.group[mine].unique().tolist() == [prompt]
        advantages = seen["table"][mine, 0]
        assert advantages.sum().item() == pytest.approx(0, abs=1e-9)
        expected = group_advantages(scores.values[mine], plan.group[mine], ddof=0, epsilon=1e-4)
        torch.testing.assert_close(advantages, expected)
        # Of all groups two: larger ones spread more by their size alone.
        first = mine & (plan.member < 2)
        spread = scores.values[first].double().std(correction=0).item()
        assert found["spread"][prompt] == pytest.approx(spread)
    expected = stats.spearmanr(found["shift"], found["spread"]).statistic
    assert metrics["attention/rank_correlation"] == pytest.approx(expected)
    assert metrics["attention/shift"] == sorted(found["shift"])[1]


def test_the_budget_is_what_was_expected(weights):
    trainer = trainer_of("flow_grpo", weights, *SPLIT, *PEAKS)
    expected = trainer.expected()
    # The reference's curve: one ODE of 4 steps for each of 3 prompts, before anything else.
    assert trainer.ledger.network_evaluations == 3 * 4
    before = trainer.ledger.counts()
    trainer.step()
    after = trainer.ledger.counts()
    spent = {key: after[key] - before[key] for key in after}
    compared = 3 * 4
    assert expected["network_evaluations"] == spent["network_evaluations"] + compared
    trainer.step()
    again = trainer.ledger.counts()
    for key in ("network_evaluations", "weighted_evaluations", "reward_calls"):
        assert expected[key] == again[key] - after[key], key


def test_only_the_peaks_explore_and_they_move_with_the_curve(weights):
    trainer = trainer_of("flow_grpo", weights, *UNIFORM, *PEAKS, "attention.curve_ema=0")
    curve = None
    for _ in range(3):
        if curve is not None:
            high = sorted(range(1, 3), key=lambda step: -curve[step])[:2]
            assert trainer.first_plan().std[0].nonzero()[:, 0].tolist() == sorted(high)
        metrics = trainer.step()
        curve = metrics["attention"]["entropy"]
        assert metrics["attention"]["explored"] == [1, 2]
        assert set(metrics["by_step"]["loss"]) == {"1", "2"}
        assert metrics["policy/ratio_max_deviation"] == 0
        torch.testing.assert_close(
            trainer.attention.curve.values, torch.tensor(curve, dtype=torch.float64)
        )


HILLS = [0.1, 0.6, 0.2, 0.3, 0.8, 0.4, 0.1, 0.9]
"""A curve over 8 steps: but for the last, highest at 4 and 1."""
EIGHT = ("sampling.steps=8", "exploration.type=attention_peaks", "exploration.count=2")


def test_steps_follow_the_curve(weights):
    trainer = trainer_of("flow_grpo", weights, *UNIFORM, *EIGHT)
    for curve, steps in ((HILLS, [1, 4]), (HILLS[::-1], [0, 3])):
        trainer.attention.curve.values = torch.tensor(curve, dtype=torch.float64)
        assert trainer.step()["attention"]["explored"] == steps
        # It moves a tenth of the way towards what was measured, after the plan.
        assert trainer.attention.curve.values.tolist() != curve


def test_a_resumed_run_chooses_by_the_curve_of_the_checkpoint(weights, tmp_path):
    """The reference's own would do as well where both are alike; so the stored one is changed."""
    run = entroflow.train(
        "flow_grpo", [*TINY, weights, *UNIFORM, *EIGHT, "attention.curve_ema=0.99"],
        run=tmp_path / "run", stop_after=1,
    )  # fmt: skip
    assert run.metrics()[-1]["attention"]["explored"] != [1, 4]
    for path in run.path.glob("checkpoints/*/state.json"):
        state = json.loads(path.read_text(encoding="utf-8"))
        assert len(state["attention"]["values"]) == 8
        state["attention"]["values"] = [None, *HILLS[1:]]
        path.write_text(json.dumps(state), encoding="utf-8")
        write_digests(path.parent)
    again = resume(run.path)
    assert again.metrics()[-1]["attention"]["explored"] == [1, 4]


def test_the_curve_is_a_moving_average_that_begins_with_the_references(weights):
    trainer = trainer_of("flow_grpo", weights, *UNIFORM, *PEAKS, "attention.curve_ema=0.75")
    trainer.first_plan()
    expected = trainer.attention.curve.values.clone()
    for _ in range(2):
        found = torch.tensor(trainer.step()["attention"]["entropy"], dtype=torch.float64)
        expected = 0.75 * expected + 0.25 * found
        torch.testing.assert_close(trainer.attention.curve.values, expected)


@pytest.mark.parametrize("stop", [0, 1])
def test_a_run_that_is_resumed_chooses_and_allocates_the_same(weights, tmp_path, stop):
    settings = [*TINY, weights, *SPLIT, *PEAKS, "run.checkpoint_every=1"]
    whole = entroflow.train("flow_grpo", settings, run=tmp_path / "whole")
    entroflow.train("flow_grpo", settings, run=tmp_path / "cut", stop_after=stop)
    cut = resume(tmp_path / "cut")
    assert_same_run(whole, cut)
    page = (whole.path / "report.html").read_text(encoding="utf-8")
    assert "Where attention sent the rollouts" in page
    for prompt in whole.metrics()[-1]["attention"]["prompt"]:
        assert f'<th scope="row">{prompt}</th>' in page


# --- compositions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    (*SPLIT, *PEAKS, "credit.type=turning_points"),
    (*SPLIT, "exploration.type=merged_steps", "exploration.starts=attention_peaks",
     "exploration.count=2", "exploration.merge=1"),
    (*SPLIT, *PEAKS, "credit.type=turning_points", "reward.type=pairwise",
     "reward.judge.type=shapes_preference"),
    (*SPLIT, *PEAKS, "kernel.type=cps", "objective.weight=variance", "kernel.floor=0"),
    (*SPLIT, *PEAKS, "objective.type=guard", "allocation.split=proportional"),
    (*SPLIT, *PEAKS, "sampling.guidance=2.0", "attention.keys=text"),
])  # fmt: skip
def test_it_composes(weights, changes):
    """A group that spans two rounds is one, whatever compares or completes it."""
    trainer = trainer_of("flow_grpo", weights, *changes)
    trainer.step()
    metrics = trainer.step()
    assert sorted(metrics["attention"]["size"]) != [4, 4, 4]
    # Rows that start from one state are trained in batches of other shapes: sums round otherwise.
    clip = trainer.recipe.objective.clip(trainer.dimensions)
    assert metrics["policy/ratio_max_deviation"] < 0.1 * clip
    assert metrics["reward/failed"] == 0
    assert math.isfinite(metrics["policy/loss"])
    before, expected = trainer.ledger.counts(), trainer.expected()
    assert metrics["policy/transitions"] > 0
    assert expected["reward_calls"] == metrics["ledger/reward_calls"] / 2
    line = trainer.step()
    assert expected["reward_calls"] == line["ledger/reward_calls"] - before["reward_calls"]
    spent = line["ledger/network_evaluations"] - before["network_evaluations"]
    assert expected["network_evaluations"] == spent


def test_completions_of_two_rounds_are_compared_with_their_own_kind(weights):
    """Groups of completions: the same prompt and index, whatever prompts a round has."""
    trainer = trainer_of("flow_grpo", weights, *SPLIT, *PEAKS, "credit.type=turning_points")
    prompts = trainer.recipe.prompts.batch(0, 0)
    rounds = [
        trainer._plan(prompts, torch.tensor(sizes), torch.tensor(spent))
        for sizes, spent in (([2, 2, 2], [0, 0, 0]), ([0, 4, 0], [2, 2, 2]))
    ]
    kinds = {}
    for plan in rounds:
        child = (plan.role == Role.COMPLETION).nonzero()[:, 0]
        for row, parent, step in zip(
            child.tolist(), plan.parent[child].tolist(), plan.parent_step[child].tolist(),
            strict=True,
        ):  # fmt: skip
            kind = int(plan.prompt[parent]), int(plan.points[parent, step])
            kinds.setdefault(kind, set()).add(int(plan.group[row]))
    assert len(kinds) == 3 * 2
    assert all(len(groups) == 1 for groups in kinds.values())
    assert len({min(groups) for groups in kinds.values()}) == len(kinds)
    assert max(max(groups) for groups in kinds.values()) < 0


@pytest.mark.parametrize("weighting", ["sample", "prompt"])
def test_how_unequal_groups_share_the_loss(weights, weighting):
    trainer = trainer_of(
        "flow_grpo", weights, *SPLIT, *PEAKS, f"objective.loss_weighting={weighting}"
    )
    trainer.step()
    prompts = trainer.recipe.prompts.batch(0, 1)
    rollouts, found = trainer._roll_out(prompts, trainer._encode(prompts))
    (scores,) = found.values()
    advantages = trainer.recipe.credit.advantages(rollouts, scores).clone()
    sizes = torch.bincount(rollouts.plan.prompt)
    assert sorted(sizes.tolist()) == [2, 4, 6]
    advantages[(rollouts.plan.prompt == sizes.argmax()).nonzero()[0]] = torch.nan
    table = transitions_of(rollouts, advantages, weighting)
    total = torch.zeros(3, dtype=torch.float64).index_add_(0, table.prompt, table.weight)
    left = torch.where(sizes == 6, 5, sizes).double()
    expected = torch.full((3,), 1 / 3).double() if weighting == "prompt" else left / left.sum()
    torch.testing.assert_close(total, expected)
    for prompt in range(3):
        assert len(table.weight[(table.prompt == prompt) & (table.weight > 0)].unique()) == 1


def test_by_prompt_the_loss_does_not_know_how_often_a_group_is_counted():
    """Twice the rows of a group are the same gradient; a sample's share would double."""
    from entroflow.objectives.transitions import _shares

    values = torch.tensor([1.0, 5.0, 2.0, 4.0, 6.0], dtype=torch.float64)
    prompt, valid = torch.tensor([0, 0, 1, 1, 1]), torch.ones(5, dtype=torch.bool)
    once = (_shares(valid, prompt) * values).sum()
    doubled = torch.tensor([0, 1, 2, 3, 4, 2, 3, 4])
    twice = (_shares(valid[doubled], prompt[doubled]) * values[doubled]).sum()
    assert once.item() == pytest.approx((3 + 4) / 2)
    assert twice.item() == pytest.approx(once.item())


# --- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [
    {"exploration": AttentionPeaks(count=1)},
    {"allocation": AttentionShift(low=2, high=4)},
    {"attention": Attention(measure=True)},
])  # fmt: skip
def test_a_policy_that_shows_no_attention_is_refused_before_the_first_iteration(part):
    trainer = Trainer(replace(recipe(), **part), PixelPolicy())
    with pytest.raises(InputError, match="the policy shows none"):
        trainer.try_inputs()
    assert trainer.ledger.counts() == Trainer(recipe(), PixelPolicy()).ledger.counts()
