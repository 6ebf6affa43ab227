"""Win rates: closed forms of strict orders, coins and biased judges, and recovery of a quality.

Where numbers of a simulation are asserted, they follow from the model that the test states: a judge
prefers image i to j with probability sigmoid(beta (q_i - q_j) + bias), q standard normal.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entroflow.credit.normalise import group_advantages
from entroflow.rewards.win_rates import (
    circulant,
    discriminability,
    random_pairs,
    round_robin,
    settled,
    shown,
    trust,
    win_rates,
)

NAN = math.nan


def rng(seed=0):
    return np.random.default_rng(seed)


def met(n, pairs):
    count = torch.zeros(n, dtype=torch.long)
    for column in pairs.unbind(1):
        count.index_add_(0, column, torch.ones_like(column))
    return count.tolist()


# --- who meets whom -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 16])
def test_all_meet_all_once(n):
    pairs = round_robin(n).tolist()
    assert pairs == [list(pair) for pair in combinations(range(n), 2)]
    assert len(pairs) == n * (n - 1) // 2


@pytest.mark.parametrize("schedule", ["ring", "random"])
@pytest.mark.parametrize("n", [2, 3, 5, 8, 9, 16])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 20])
def test_every_image_meets_k_others(n, k, schedule):
    """n k / 2 different pairs; one more where n k is odd, and all where k is too large."""
    pairs = circulant(n, k) if schedule == "ring" else random_pairs(n, k, rng())
    expected = min(k + n * k % 2, n - 1)
    assert met(n, pairs) == [expected] * n
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs) == n * expected // 2
    assert (pairs[:, 0] < pairs[:, 1]).all()


def test_random_pairs_follow_from_their_source():
    assert torch.equal(random_pairs(16, 4, rng(1)), random_pairs(16, 4, rng(1)))
    assert not torch.equal(random_pairs(16, 4, rng(1)), random_pairs(16, 4, rng(2)))


def test_what_is_shown_first():
    pairs = round_robin(8)
    assert torch.equal(shown(pairs, "fixed", rng()), pairs)
    twice = shown(pairs, "swap", rng())
    assert len(twice) == 56
    assert torch.equal(twice[:28], pairs)
    assert torch.equal(twice[28:], pairs.flip(1))
    tossed = shown(pairs, "random", rng(3))
    assert torch.equal(tossed.sort(dim=1).values, pairs)
    assert torch.equal(tossed, shown(pairs, "random", rng(3)))
    turned = (tossed[:, 0] != pairs[:, 0]).double().mean()
    assert 0.25 < turned < 0.75


# --- closed forms ---------------------------------------------------------------------------------


def judged(n, pairs, answer, order="fixed", on_disagree="tie", source=None):
    """Sides, answers, points and win rates of a judge (first, second) -> points of the first."""
    sides = shown(pairs, order, source or rng())
    answers = torch.tensor([answer(i, j) for i, j in sides.tolist()], dtype=torch.float64)
    points = settled(answers, pairs, sides, order, on_disagree)
    return sides, answers, points, win_rates(n, pairs, points)


def strict(quality):
    return lambda i, j: float(quality[i] > quality[j])


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([2, 3, 8, 9, 16]), st.sampled_from(["fixed", "random", "swap"]))
def test_the_sum_is_half_the_group(data, n, order):
    """Whatever the judge says, ties and soft answers included: each comparison hands out 1 (T1)."""
    pairs = round_robin(n)
    answers = data.draw(st.lists(st.floats(0, 1), min_size=2 * len(pairs), max_size=2 * len(pairs)))
    told = iter(answers)
    rates = judged(n, pairs, lambda i, j: next(told), order)[-1]
    assert abs(rates.sum().item() - n / 2) < 1e-9


@pytest.mark.parametrize("n", [2, 3, 8, 16, 24])
@pytest.mark.parametrize("order", ["fixed", "swap", "random"])
def test_a_strict_order_in_closed_form(n, order):
    """w = rank / (G - 1), its standard deviations and the largest advantages (T3)."""
    quality = rng(n).permutation(n)
    rates = judged(n, round_robin(n), strict(quality), order)[-1]
    np.testing.assert_allclose(rates.numpy(), quality / (n - 1), atol=1e-12)
    population = math.sqrt((n + 1) / (12 * (n - 1)))
    sample = math.sqrt(n * (n + 1) / (12 * (n - 1) ** 2))
    assert rates.std(correction=0).item() == pytest.approx(population, abs=1e-12)
    assert rates.std(correction=1).item() == pytest.approx(sample, abs=1e-12)
    group = torch.zeros(n, dtype=torch.long)
    for ddof, largest in (
        (0, math.sqrt(3 * (n - 1) / (n + 1))),
        (1, (n - 1) * math.sqrt(3 / (n * (n + 1)))),
    ):
        A = group_advantages(rates, group, ddof=ddof, epsilon=0.0)
        assert A.abs().max().item() == pytest.approx(largest, abs=1e-12)


def test_images_in_another_order_have_the_same_rewards():
    quality, places = rng(0).standard_normal(8), rng(1).permutation(8)
    rates = judged(8, round_robin(8), strict(quality))[-1]
    turned = judged(8, round_robin(8), strict(quality[places]))[-1]
    torch.testing.assert_close(turned, rates[torch.from_numpy(places)], atol=1e-12, rtol=0)


def test_a_judge_that_always_says_the_first():
    """A ramp of the index where the order is fixed; asked twice, all ties, nothing learnt (T5)."""
    n, pairs = 8, round_robin(8)
    ramp = judged(n, pairs, lambda i, j: 1.0)[-1]
    np.testing.assert_allclose(ramp.numpy(), [(n - 1 - i) / (n - 1) for i in range(n)], atol=1e-12)
    sides, answers, points, rates = judged(n, pairs, lambda i, j: 1.0, "swap")
    assert (rates == 0.5).all()
    assert (group_advantages(rates, torch.zeros(n, dtype=torch.long)) == 0).all()
    found = trust(n, pairs, sides, answers, points, rates)
    assert (found.first, found.disagreements, found.ties, found.failed) == (1, 1, 0, 0)
    assert found.spread == 0
    assert found.discriminability < 0


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "back", "tie", "average"),
    [
        (1.0, 0.0, 1.0, 1.0),
        (0.0, 1.0, 0.0, 0.0),
        (1.0, 1.0, 0.5, 0.5),
        (0.9, 0.6, 0.5, 0.65),
        (0.9, 0.2, 0.85, 0.85),
        (0.5, 0.0, 0.75, 0.75),
        (0.5, 0.5, 0.5, 0.5),
        (1.0, NAN, 1.0, 1.0),
        (NAN, 0.0, 1.0, 1.0),
        (NAN, NAN, NAN, NAN),
    ],
)
def test_two_answers_to_one_pair(there, back, tie, average):
    pairs = torch.tensor([[0, 1]])
    sides = shown(pairs, "swap", rng())
    answers = torch.tensor([there, back])
    for rule, expected in (("tie", tie), ("average", average)):
        found = settled(answers, pairs, sides, "swap", rule)
        assert found.tolist() == pytest.approx([expected], nan_ok=True)


def test_one_answer_of_28_fails():
    """The two images it was about have one comparison less, the others' points stay (T7)."""
    quality = rng(5).standard_normal(8)
    pairs = round_robin(8)
    whole = judged(8, pairs, strict(quality))[2]
    broken = whole.clone()
    broken[9] = NAN
    before, after = win_rates(8, pairs, whole), win_rates(8, pairs, broken)
    i, j = pairs[9].tolist()
    others = [p for p in range(8) if p not in (i, j)]
    assert torch.equal(before[others], after[others])
    assert after[i].item() == pytest.approx((7 * before[i].item() - whole[9].item()) / 6)
    group = torch.zeros(8, dtype=torch.long)
    change = group_advantages(after, group) - group_advantages(before, group)
    assert change.abs().max() <= 0.3


def test_where_too_few_comparisons_are_left_nothing_is_known():
    pairs = round_robin(4)
    points = torch.tensor([1.0, NAN, NAN, NAN, 0.0, NAN])
    assert win_rates(4, pairs, points, 0.5).isnan().all()
    # 0 beats 1, and 3 beats 1; 2 met nobody.
    known = win_rates(4, pairs, points, 0.3)
    assert known.tolist() == pytest.approx([1, 0, NAN, 1], nan_ok=True)
    assert win_rates(4, pairs, torch.full((6,), NAN)).isnan().all()
    assert win_rates(1, round_robin(1), torch.zeros(0)).isnan().all()


# --- recovery of a quality ------------------------------------------------------------------------


def groups(n, beta, bias=0.0, order="fixed", schedule=round_robin, identical=False, count=600):
    """Qualities and what a judge of that kind says of them, group by group."""
    source = rng(7)
    for _ in range(count):
        q = np.zeros(n) if identical else source.standard_normal(n)
        pairs = schedule(n)
        sides = shown(pairs, order, source)
        first, second = sides.numpy().T
        logit = np.clip(beta * (q[first] - q[second]) + bias, -50, 50)
        answers = torch.from_numpy(
            (source.random(len(sides)) < 1 / (1 + np.exp(-logit))).astype(float)
        )
        points = settled(answers, pairs, sides, order)
        rates = win_rates(n, pairs, points)
        yield q, rates, (n, pairs, sides, answers, points, rates)


def recovered(*settings, **more):
    """Mean correlation of win rate and quality over 2000 groups."""
    found = [
        np.corrcoef(rates.numpy(), q)[0, 1]
        for q, rates, _ in groups(*settings, **more, count=2000)
        if rates.std() > 0
    ]
    return float(np.mean(found))


def discriminabilities(*settings, **more):
    """Mean over groups, and its standard error."""
    found = [trust(*known).discriminability for *_, known in groups(*settings, **more)]
    return float(np.mean(found)), float(np.std(found) / math.sqrt(len(found)))


def test_a_noisy_judge_recovers_the_quality():
    """T4: better with a sharper judge and with larger groups."""
    found = {beta: recovered(8, beta) for beta in (0.25, 1.0, 2.0)}
    assert found[2.0] >= 0.87
    assert found[1.0] >= 0.74
    assert 0.27 <= found[0.25] <= 0.35
    assert recovered(16, 1.0) > found[1.0] + 0.05


def test_asking_twice_undoes_a_preference_for_a_place():
    """T5: a bias of logit 2 costs most where the order is fixed, least where it is swapped."""
    orders = ("fixed", "random", "swap")
    found = {order: recovered(8, 1.0, bias=2.0, order=order) for order in orders}
    assert found["fixed"] <= 0.47
    assert 0.50 <= found["random"] <= 0.58
    assert found["swap"] >= 0.75


def test_win_rates_are_not_immune_to_a_judge_that_sees_nothing():
    """T11: coins have a spread of 0.20, too, and advantages as large as ever; D tells them."""
    rates = [rates for _, rates, _ in groups(8, 0.0, identical=True, count=2000)]
    spreads = torch.stack(rates).std(dim=1, correction=1)
    assert spreads.square().mean().sqrt().item() == pytest.approx(math.sqrt(8) / 14, abs=0.003)
    assert spreads.mean().item() == pytest.approx(0.197, abs=0.005)
    A = torch.cat([group_advantages(r, torch.zeros(8), ddof=1, epsilon=0.0) for r in rates])
    assert A.square().mean().sqrt().item() == pytest.approx(math.sqrt(7 / 8), abs=0.003)
    found, error = discriminabilities(8, 0.0, identical=True)
    assert abs(found) < 4 * error < 0.1


@pytest.mark.parametrize("k", [2, 4, 6])
@pytest.mark.parametrize("order", ["fixed", "swap"])
def test_discriminability_is_0_for_coins_and_1_for_an_order(k, order):
    """In expectation over groups, whatever the schedule: simulated for coins and strict orders."""
    rest = {"order": order, "schedule": lambda n: circulant(n, k)}
    for expected, beta, identical in ((0.0, 0.0, True), (1.0, 1e6, False)):
        found, error = discriminabilities(8, beta, identical=identical, **rest)
        assert abs(found - expected) < 4 * error < 0.25


def test_discriminability_of_the_published_spread():
    """A spread of 0.30 at G = 8 is 0.60 of the way from coins (0.202) to an order (0.350)."""
    assert discriminability(0.30, 8, 7) == pytest.approx(0.60, abs=0.005)
    assert discriminability(math.sqrt(8) / 14, 8, 7) == pytest.approx(0, abs=1e-12)
    assert discriminability(math.sqrt(8 * 9 / (12 * 49)), 8, 7) == pytest.approx(1, abs=1e-12)


# --- trust ----------------------------------------------------------------------------------------


def brute_force_triads(n, points):
    beats = {}
    for (i, j), p in points.items():
        if p != 0.5:
            beats[i, j], beats[j, i] = p > 0.5, p < 0.5
    decided = circles = 0
    for i, j, k in combinations(range(n), 3):
        if all(pair in beats for pair in ((i, j), (j, k), (i, k))):
            decided += 1
            circles += len({sum(beats[a, b] for b in (i, j, k) if a != b) for a in (i, j, k)}) == 1
    return decided, circles


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 7))
def test_triads_that_go_in_a_circle(data, n):
    pairs = round_robin(n)
    values = st.sampled_from([0.0, 0.5, 1.0, 0.7])
    points = torch.tensor(data.draw(st.lists(values, min_size=len(pairs), max_size=len(pairs))))
    found = trust(n, pairs, pairs, points, points, win_rates(n, pairs, points))
    named = {tuple(pair): p for pair, p in zip(pairs.tolist(), points.tolist(), strict=True)}
    assert (found.triads, found.intransitive) == brute_force_triads(n, named)
    assert found.ties == pytest.approx((points == 0.5).double().mean().item())


def test_shares_count_what_they_say():
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2]])
    sides = shown(pairs, "swap", rng())
    answers = torch.tensor([1.0, 1.0, 0.5, 0.0, 1.0, NAN])
    points = settled(answers, pairs, sides, "swap")
    found = trust(3, pairs, sides, answers, points, win_rates(3, pairs, points))
    assert found.disagreements == pytest.approx(1 / 3)
    assert found.ties == pytest.approx(1 / 3)
    assert found.failed == pytest.approx(1 / 6)
    assert found.first == pytest.approx(3.5 / 5)
