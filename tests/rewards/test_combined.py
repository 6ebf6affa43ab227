"""Rewards of any kind as one type, and what each way of combining several does, in numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from entroflow.credit.normalise import group_advantages
from entroflow.credit.terminal import Terminal
from entroflow.errors import InputError, RecipeError
from entroflow.policies.grid import shifted_grid
from entroflow.prompts import Prompt
from entroflow.recipe.load import build_recipe, described, load_recipe
from entroflow.rewards.base import Scores, Status
from entroflow.rewards.combined import as_rewards
from entroflow.rewards.mixture import Mixture
from entroflow.rewards.pairwise import Pairwise
from entroflow.rewards.parts import as_part
from entroflow.sampling.plan import fresh_rows
from entroflow.training.checkpoint import state_of
from entroflow.training.trainer import Trainer
from tiny_run import (
    HERE,
    PROMPTS,
    ROLLOUTS,
    Brightness,
    ByBrightness,
    PixelPolicy,
    recipe,
)

MINE = __name__
NAN = math.nan
CREDIT = Terminal(ddof=1, epsilon=1e-8)


def red(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2)).tolist()


def sometimes(images, prompts, metadata):
    """Fails on every image that is redder than most."""
    return [NAN if level > 0.55 else level for level in red(images, prompts, metadata)]


class Rounded:
    """Few values, so that groups are tied."""

    def score(self, images, prompts):
        values = (images.flatten(1).mean(dim=1) > 0.6).double()
        return Scores(values, (Status.OK,) * len(images))


def mixture(names=("a", "b"), **settings):
    made = Mixture(**settings).model_copy(update={"rewards": {n: Brightness() for n in names}})
    made.check_parts()
    return as_rewards(made)


def plan_of(groups, size):
    prompts = [Prompt(str(g)) for g in range(groups)]
    return fresh_rows(
        prompts, torch.full((groups,), size), torch.zeros(groups, dtype=torch.long),
        shifted_grid(1), torch.full((1,), 0.5),
    )  # fmt: skip


def combined(mixed, groups=1, credit=CREDIT, **values):
    """Advantages [B] of values by name."""
    size = len(next(iter(values.values()))) // groups
    scores = {
        name: Scores(torch.as_tensor(v, dtype=torch.float64), (Status.OK,) * len(v))
        for name, v in values.items()
    }
    return mixed.advantages(credit.advantages, plan_of(groups, size), scores)[:, 0]


def test_a_mixture_of_one_is_the_reward_itself():
    values = [0.1, 0.4, 0.2, 0.9]
    alone = combined(as_rewards(Brightness()), reward=values)
    for how in ("normalise_then_sum", "sum_then_normalise"):
        torch.testing.assert_close(combined(mixture("a", combine=how), a=values), alone)


def test_advantages_are_summed_with_their_weights():
    """A = 0.7 A_1 + 1.4 A_2 by hand, as Pref-GRPO mixes win rate and CLIP (T14)."""
    a, b = np.array([0.0, 0.67, 1.0, 0.33]), np.array([0.3457, 0.3530, 0.3496, 0.3494])
    by_hand = sum(w * (v - v.mean()) / (v.std(ddof=1) + 1e-8) for w, v in ((0.7, a), (1.4, b)))
    found = combined(mixture(weights={"a": 0.7, "b": 1.4}), a=a, b=b)
    np.testing.assert_allclose(found.numpy(), by_hand, atol=1e-12)
    # The example of the paper: with the standard deviation of n (figure), and of n - 1 (code).
    for ddof, advantages in ((0, [-1.34, 0.46, 1.34, -0.46]), (1, [-1.16, 0.39, 1.16, -0.39])):
        A = group_advantages(torch.tensor(a), torch.zeros(4), ddof=ddof, epsilon=1e-8)
        np.testing.assert_allclose(A.numpy(), advantages, atol=0.01)


def test_independent_rewards_change_the_size_of_the_advantages():
    """RMS of 0.7 A_1 + 1.4 A_2 is sqrt(0.49 + 1.96) sqrt(7 / 8) = 1.46 at G = 8 (T14)."""
    a, b = np.random.default_rng(0).standard_normal((2, 8 * 2000))
    found = combined(mixture(weights={"a": 0.7, "b": 1.4}), groups=2000, a=a, b=b)
    assert found.square().mean().sqrt().item() == pytest.approx(1.565 * math.sqrt(7 / 8), abs=0.01)
    # GDPO divides by that, so only the ratio of the weights is left.
    gdpo = mixture(weights={"a": 0.7, "b": 1.4}, combine="gdpo")
    scaled = mixture(weights={"a": 7, "b": 14}, combine="gdpo")
    A = combined(gdpo, groups=2000, a=a, b=b)
    assert A.mean().item() == pytest.approx(0, abs=1e-6)
    assert A.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    wide = Terminal(ddof=1, epsilon=1e-8, advantage_clip=1e9)
    torch.testing.assert_close(
        combined(scaled, groups=2000, credit=wide, a=a, b=b),
        combined(gdpo, groups=2000, credit=wide, a=a, b=b),
    )


def test_a_sum_of_raw_rewards_hears_the_loudest_alone():
    """Win rate (0.4) and a similarity a hundred times narrower (0.6), independent (T13)."""
    rng = np.random.default_rng(1)
    wins = np.stack([rng.permutation(8) / 7 for _ in range(2000)]).ravel()
    similar = 0.33 + 0.003 * rng.standard_normal(wins.shape)
    found = {}
    for how in ("sum_then_normalise", "normalise_then_sum"):
        weighted = mixture(weights={"a": 0.4, "b": 0.6}, combine=how)
        A = combined(weighted, groups=2000, a=wins, b=similar).numpy()
        per_group = [
            [np.corrcoef(A[g : g + 8], v[g : g + 8])[0, 1] for g in range(0, len(A), 8)]
            for v in (wins, similar)
        ]
        found[how] = np.mean(per_group, axis=1)
    np.testing.assert_allclose(found["sum_then_normalise"], [0.999, 0.0], atol=0.02)
    # 0.4 / sqrt(0.52) and 0.6 / sqrt(0.52), a little less in groups of eight.
    np.testing.assert_allclose(found["normalise_then_sum"], [0.53, 0.82], atol=0.03)


@pytest.mark.parametrize("how", ["normalise_then_sum", "sum_then_normalise", "gdpo"])
def test_units_matter_to_raw_sums_alone(how):
    a, b = np.random.default_rng(2).standard_normal((2, 24))
    reward = mixture(combine=how)
    before = combined(reward, groups=3, a=a, b=b)
    after = combined(reward, groups=3, a=50 * a + 7, b=b)
    same = (after - before).abs().max() < 1e-6
    assert bool(same) == (how != "sum_then_normalise")


@pytest.mark.parametrize("how", ["normalise_then_sum", "sum_then_normalise", "gdpo"])
def test_a_group_without_any_spread_has_nothing(how):
    a = [0.3] * 4 + [0.1, 0.2, 0.3, 0.5]
    b = [0.7] * 4 + [0.4, 0.2, 0.1, 0.5]
    found = combined(mixture(combine=how), groups=2, a=a, b=b)
    assert (found[:4] == 0).all()
    assert (found[4:] != 0).all()


@pytest.mark.parametrize("how", ["normalise_then_sum", "sum_then_normalise", "gdpo"])
def test_what_one_could_not_score_is_masked_for_all(how):
    a, b = [0.1, 0.2, 0.3, 0.5], [0.4, NAN, 0.1, 0.5]
    found = combined(mixture(combine=how), a=a, b=b)
    assert found.isnan().tolist() == [False, True, False, False]
    summed = mixture().total(
        {n: Scores(torch.tensor(v), (Status.OK, s, Status.OK, Status.OK))
         for n, v, s in (("a", a, Status.OK), ("b", b, Status.TIMEOUT))}
    )  # fmt: skip
    assert summed.statuses == (Status.OK, Status.TIMEOUT, Status.OK, Status.OK)


def test_a_floor_keeps_noise_from_being_blown_up():
    """0.35 + 0.0026 noise: RMS(A) is 0.935 without, 0.243 with a floor of 0.01 (T10)."""
    values = 0.35 + 0.0026 * np.random.default_rng(3).standard_normal(8 * 4000)
    rms = {
        floor: combined(mixture("a", floors={"a": floor}), groups=4000, a=values)
        .square().mean().sqrt().item()
        for floor in (0.0, 0.01)
    }  # fmt: skip
    assert rms[0.0] == pytest.approx(math.sqrt(7 / 8), abs=0.002)
    assert rms[0.01] == pytest.approx(0.243, abs=0.004)
    # What spreads wider than the floor is left as it is.
    wide = 100 * values
    torch.testing.assert_close(
        combined(mixture("a", floors={"a": 0.01}), groups=4000, a=wide),
        combined(mixture("a"), groups=4000, a=wide),
    )


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 0.1])
def test_normalised_advantages_do_not_know_the_scale(sigma):
    """Illusory advantage: RMS(A) is the same for any spread (T10)."""
    values = 0.35 + sigma * np.random.default_rng(4).standard_normal(8 * 2000)
    credit = Terminal(ddof=1, epsilon=1e-12)
    found = combined(mixture("a"), groups=2000, credit=credit, a=values)
    assert found.square().mean().sqrt().item() == pytest.approx(0.935, abs=0.001)


# --- one type -------------------------------------------------------------------------------------


class Waiting(Brightness):
    waits = True

    def __init__(self):
        self.cancelled = False

    def cancel(self):
        self.cancelled = True


def test_a_reward_of_any_kind_becomes_the_same_type():
    judge = Pairwise(judge=ByBrightness())
    for given, name, compares in ((red, "red", False), (judge, "Pairwise", True)):
        made = as_rewards(given)
        (part,) = made.parts.values()
        assert (part.key, part.name, part.compares, part.waits) == ("reward", name, compares, False)
        assert list(made.parts) == ["reward"]
        assert made.names == (), "metrics have its name already"
        assert bool(made.comparing) == compares != bool(made.pointwise)
        assert as_rewards(made) is made
    rewards = {"wins": judge, "red": red, "slow": Waiting(), "out": Brightness()}
    mixed = as_rewards(Mixture(rewards=rewards, weights={"red": 2.0, "out": 0.0}))
    assert mixed.names == ("wins", "red", "slow")
    assert mixed.weights == {"wins": 1.0, "red": 2.0, "slow": 1.0}
    assert (list(mixed.comparing), list(mixed.pointwise)) == (["wins"], ["red", "slow"])
    slow = mixed.parts["slow"]
    assert (slow.key, slow.waits) == ("reward.rewards.slow", True)
    for part in mixed.parts.values():
        part.cancel()
    assert slow.reward.cancelled


def test_a_part_is_one_reward():
    for given in (Mixture(rewards={"a": red}), Brightness, 3):
        with pytest.raises(InputError, match=r"^monitors\.rewards\.a"):
            as_part(given, "monitors.rewards.a")


# --- in a run -------------------------------------------------------------------------------------

TWO = {
    "type": "mixture",
    "rewards": {"bright": {"type": f"{HERE}.brightness"}, "red": {"type": f"{MINE}.red"}},
}


def test_both_are_scored_once_and_written_down():
    trainer = Trainer(recipe(reward={**TWO, "weights": {"red": 2.0}}), PixelPolicy())
    metrics = trainer.step()
    assert metrics["ledger/reward_calls"] == 2 * ROLLOUTS
    assert metrics["ledger/decodes"] == ROLLOUTS
    bright, level = metrics["reward/bright/mean"], metrics["reward/red/mean"]
    assert metrics["reward/mean"] == pytest.approx(bright + 2 * level)
    assert metrics["reward/red/failed"] == metrics["reward/failed"] == 0
    assert metrics["reward/bright/std"] > 0


def test_only_a_reward_with_a_name_has_metrics_of_its_own():
    """A mixture of one has; a reward that stands alone does not."""
    bright = TWO["rewards"]["bright"]
    for fields, names in ((bright, set()), ({"type": "mixture", "rewards": {"a": bright}}, {"a"})):
        metrics = Trainer(recipe(reward=fields), PixelPolicy()).step()
        keys = {key.split("/")[1] for key in metrics if key.startswith("reward/")}
        assert keys == {"mean", "std", "failed", "tied_groups"} | names


class Counting(Brightness):
    """Remembers how many images it has seen."""

    def __init__(self):
        self.seen = 0

    def score(self, images, prompts):
        self.seen += len(images)
        return super().score(images, prompts)

    def state(self):
        return {"seen": self.seen}

    def load_state(self, state):
        self.seen = state["seen"]


def test_a_part_with_memory_is_in_the_state_of_a_run():
    part = {"type": f"{MINE}.Counting"}
    for reward, keys in (
        ({"type": "mixture", "rewards": {"one": part, "other": part}},
         {"reward.rewards.one", "reward.rewards.other"}),
        (part, {"reward"}),
    ):  # fmt: skip
        trainer = Trainer(recipe(reward=reward), PixelPolicy())
        trainer.step()
        assert state_of(trainer)["components"] == {key: {"seen": ROLLOUTS} for key in keys}


def test_weight_0_is_as_if_it_were_not_there():
    alone = {"type": "mixture", "rewards": {"bright": TWO["rewards"]["bright"]}}
    one = Trainer(recipe(reward=alone), PixelPolicy())
    other = Trainer(recipe(reward={**TWO, "weights": {"red": 0}}), PixelPolicy())
    first, second = one.step(), other.step()
    assert torch.equal(one.policy.shift, other.policy.shift)
    assert second["ledger/reward_calls"] == first["ledger/reward_calls"] == ROLLOUTS
    assert list(other.reward.parts) == ["bright"]


def test_the_order_of_the_names_changes_nothing():
    turned = {**TWO, "rewards": dict(reversed(TWO["rewards"].items()))}
    policies = []
    for fields in (TWO, turned):
        trainer = Trainer(recipe(reward=fields), PixelPolicy())
        trainer.step()
        policies.append(trainer.policy.shift.detach().clone())
    torch.testing.assert_close(*policies, atol=1e-12, rtol=0)


def test_tied_groups_of_one_reward_leave_the_other():
    fields = {"type": "mixture", "rewards": {**TWO["rewards"], "step": {"type": f"{MINE}.Rounded"}}}
    metrics = Trainer(recipe(reward=fields), PixelPolicy()).step()
    assert metrics["reward/step/tied_groups"] == PROMPTS
    assert metrics["reward/tied_groups"] == 0
    assert metrics["policy/gradient_norm"] > 0


def test_failures_are_counted_for_the_reward_that_failed():
    rewards = {**TWO["rewards"], "shy": {"type": f"{MINE}.sometimes"}}
    metrics = Trainer(recipe(reward={"type": "mixture", "rewards": rewards}), PixelPolicy()).step()
    assert metrics["reward/bright/failed"] == 0
    assert 0 < metrics["reward/shy/failed"] == metrics["reward/failed"] < ROLLOUTS


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "mine: reward: rewards holds none"),
        ({"rewards": [1]}, "mine: reward.rewards must hold names, each with keys and values"),
        ({"rewards": {"a": 1}}, "mine: reward.rewards.a must hold keys and values, not 1"),
        (
            {"rewards": {"a": {"type": "shape"}}},
            "mine: reward.rewards.a.type: unknown type 'shape'",
        ),
        (
            {"rewards": {"a": {"type": "shapes", "valu": 1}}},
            "mine: reward.rewards.a: unknown key 'valu'",
        ),
        ({"rewards": {"a": {}}, "weights": {"b": 1}}, "weights.b is of no reward .known: a."),
        ({"rewards": {"a": {}}, "floors": {"a": -1}}, "floors.a is -1"),
        ({"rewards": {"a": {}}, "weights": {"a": 0}}, "weights leave out all rewards"),
        (
            {"rewards": {"a": {"type": "mixture", "rewards": {"b": {}}}}},
            "rewards.a is a mixture itself",
        ),
        ({"rewards": {"a/b": {}}}, "rewards.a/b: the name is taken, or has a /"),
        ({"rewards": {"failed": {}}}, "rewards.failed: the name is taken"),
        ({"rewards": {"": {}}}, "rewards holds one without a name"),
    ],
)
def test_what_does_not_fit_is_refused(fields, said):
    with pytest.raises(RecipeError, match=said):
        build_recipe({"reward": {"type": "mixture", **fields}}, "mine")


def test_a_mixture_is_written_out_read_back_and_overridden(tmp_path):
    fields = {
        "type": "mixture", "weights": {"strict": 2.0},
        "rewards": {"graded": {"type": "shapes"}, "strict": {"type": "shapes", "value": "strict"}},
    }  # fmt: skip
    made = build_recipe({"reward": fields}, "mine")
    assert made.resolved["reward"]["rewards"]["graded"]["value"] == "graded"
    path = tmp_path / "mine.yaml"
    path.write_text(made.to_yaml())
    assert load_recipe(path).hash == made.hash
    changed = load_recipe(path, ["reward.rewards.graded.value=strict", "reward.weights.strict=3"])
    assert changed.reward.parts["graded"].reward.value == "strict"
    assert changed.reward.weights == {"graded": 1.0, "strict": 3.0}


def test_a_mixture_with_parts_of_ones_own_is_described_without_them(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("reward: {type: mixture, rewards: {a: {type: nobody.knows}}}")
    assert "type: nobody.knows" in described(path)
