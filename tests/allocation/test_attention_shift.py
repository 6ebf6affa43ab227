"""Who gets how many rollouts (A-6)."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entroflow.allocation.attention_shift import AttentionShift, median_split, water_filled
from entroflow.errors import RecipeError
from entroflow.recipe.load import load_recipe

SHIFTS = st.lists(
    st.floats(0, 1, allow_subnormal=False) | st.sampled_from([0.0, 0.25, 0.5]),
    min_size=1, max_size=9,
)  # fmt: skip


def sizes_of(shifts, low=8, high=16, temperature=None):
    shift = torch.tensor(shifts, dtype=torch.float64)
    if temperature is None:
        return median_split(shift, low, high).tolist()
    return water_filled(shift, low, high, temperature).tolist()


@given(SHIFTS)
def test_the_median_splits_the_budget_exactly(shifts):
    found = sizes_of(shifts)
    assert sum(found) == 12 * len(shifts)
    if max(shifts) - min(shifts) <= 1e-8:
        assert set(found) == {12}
        return
    assert [found.count(16), found.count(8), found.count(12)] == [
        len(shifts) // 2, len(shifts) // 2, len(shifts) % 2
    ]  # fmt: skip
    assert_monotone(shifts, found)


def assert_monotone(shifts, found):
    for (a, x), (b, y) in itertools.permutations(zip(shifts, found, strict=True), 2):
        if a > b:
            assert x >= y, (shifts, found)


def test_of_equal_shifts_the_earlier_prompt_is_first():
    assert sizes_of([0.1, 0.1, 0.1, 0.0]) == [16, 16, 8, 8]
    assert sizes_of([0.0, 0.1, 0.1]) == [8, 16, 12]


@given(SHIFTS, st.sampled_from([1e-3, 0.1, 0.5, 1.0, 3.0]), st.sampled_from([(8, 16), (2, 20)]))
def test_proportional_keeps_sum_bounds_and_order(shifts, temperature, bounds):
    low, high = bounds
    found = sizes_of(shifts, low, high, temperature)
    assert sum(found) == (low + high) // 2 * len(shifts)
    assert all(low <= size <= high for size in found)
    if max(shifts) - min(shifts) > 1e-8:
        assert_monotone(shifts, found)


@given(SHIFTS)
def test_a_high_temperature_is_uniform_and_a_low_one_all_or_nothing(shifts):
    assert set(sizes_of(shifts, temperature=1e9)) == {12}
    apart = [0.1 * place + 0.01 * shift for place, shift in enumerate(sorted(shifts))]
    if len(apart) > 1:
        found = sizes_of(apart, temperature=1e-4)
        assert found == sorted(found)
        assert [found.count(8), found.count(16)] == [len(apart) // 2] * 2


def test_what_two_prompts_share():
    """Shifts 0 and s are 0 and 2 standard deviations up: e^2 to 1 of the 8 that are left."""
    share = 8 * math.exp(2) / (1 + math.exp(2))
    assert sizes_of([0.0, 0.3], temperature=1.0) == [16 - round(share), 8 + round(share)]


def test_who_would_get_more_than_the_cap_leaves_it_to_the_others():
    """Of 24 the first would take 24 e^2.83 / (e^2.83 + ...) > 8; 16 are left, by e^1 to 1 to 1."""
    shifts = torch.tensor([4.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    z = (shifts / shifts.std(correction=0)).tolist()
    assert 24 * math.exp(z[0]) / sum(map(math.exp, z)) > 8
    rest = [16 * math.exp(value) / sum(map(math.exp, z[1:])) for value in z[1:]]
    found = sizes_of(shifts.tolist(), temperature=1.0)
    assert found[0] == 16
    assert all(abs(size - 8 - share) < 1 for size, share in zip(found[1:], rest, strict=True))


@pytest.mark.parametrize("split", ["median", "proportional"])
def test_two_rounds_the_second_by_what_the_first_showed(split):
    allocation = AttentionShift(low=2, high=6, split=split)
    assert (allocation.rounds, allocation.needs_attention) == (2, True)
    assert [sizes.sum() for sizes in allocation.typical(4)] == [8, 8]
    assert allocation.sizes(4, []).tolist() == [2] * 4
    first = SimpleNamespace(
        prompt_measurements={"attention_shift": torch.tensor([0.0, 0.9, 0.0, 0.8])}
    )
    more = allocation.sizes(4, [first])
    assert more.sum() == 8
    assert more[1] == more.max()
    assert allocation.sizes(4, [first, None]) is None


def test_equal_bounds_are_one_round_of_that_size():
    allocation = AttentionShift(low=5, high=5)
    assert (allocation.rounds, allocation.needs_attention) == (1, False)
    assert allocation.sizes(3, []).tolist() == [5] * 3
    assert allocation.sizes(3, [None]) is None
    (only,) = allocation.typical(3)
    assert only.tolist() == [5] * 3


@pytest.mark.parametrize("split", ["median", "proportional"])
def test_a_shift_that_overflowed_gets_least_and_breaks_no_budget(split):
    allocation = AttentionShift(low=2, high=6, split=split)
    for shift in ([math.nan, 0.9, 0.1, 0.8], [math.inf, math.nan, 0.1, 0.8], [math.nan] * 4):
        more = allocation.sizes(
            4, [SimpleNamespace(prompt_measurements={"attention_shift": torch.tensor(shift)})]
        )
        assert more.sum() == 8
        assert (more >= 0).all()
        assert (more <= 4).all()
        if not all(map(math.isnan, shift)):
            assert more[shift.index(next(s for s in shift if math.isnan(s)))] == more.min()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["low=20"], r"low is 20, but must not be more than high \(16\)"),
        (["low=7"], r"low \+ high is 23, but must be even"),
        (["low=1"], r"allocation\.low"),
        (["split=mean"], r"allocation\.split"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(changes, said):
    with pytest.raises(RecipeError, match=said) as error:
        load_recipe("flow_grpo", ["allocation.type=attention_shift",
                                  *[f"allocation.{change}" for change in changes]])  # fmt: skip
    assert "\n" not in str(error.value)
