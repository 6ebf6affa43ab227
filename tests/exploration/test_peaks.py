"""Which steps of a curve are chosen (A-7)."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entroflow.exploration.peaks import highest, prominent

CURVES = st.lists(st.integers(0, 4), min_size=1, max_size=8)


def curve(values):
    return torch.tensor(values, dtype=torch.float64)


def everywhere(values, but=()):
    return torch.tensor([step not in but for step in range(len(values))])


def prominence_by_definition(values, peak):
    """Height over the higher of two valleys, each the lowest place before the curve rises above.

    On a side where it never does, the valley is the outside of the grid, infinitely deep.
    """
    valleys = []
    for side in (range(peak - 1, -1, -1), range(peak + 1, len(values))):
        lowest = values[peak]
        for place in side:
            if values[place] > values[peak]:
                break
            lowest = min(lowest, values[place])
        else:
            lowest = float("-inf")
        valleys.append(lowest)
    return values[peak] - max(valleys)


def maxima_by_definition(values):
    """First places of plateaus above what lies on either side of them."""
    found, first = [], 0
    for _, plateau in itertools.groupby(values):
        last = first + len(list(plateau))
        rises = first == 0 or values[first - 1] < values[first]
        falls = last == len(values) or values[last] < values[first]
        if rises and falls:
            found.append(first)
        first = last
    return found


@given(CURVES, st.integers(1, 9), st.data())
def test_highest_are_the_first_of_those_sorted_by_height_and_time(values, count, data):
    but = data.draw(st.sets(st.integers(0, len(values) - 1)))
    best = sorted((step for step in range(len(values)) if step not in but),
                  key=lambda step: (-values[step], step))  # fmt: skip
    found = highest(curve(values), everywhere(values, but), count)
    assert found.tolist() == sorted(best[:count])


@given(CURVES, st.integers(1, 9), st.integers(1, 4), st.data())
def test_prominent_are_those_of_the_definition_then_the_highest(values, count, separation, data):
    but = data.draw(st.sets(st.integers(0, len(values) - 1)))

    def better(peak):
        return -prominence_by_definition(values, peak), -values[peak], peak

    peaks = sorted(maxima_by_definition(values), key=better)
    others = sorted({*range(len(values))} - {*peaks}, key=lambda step: (-values[step], step))
    allowed = [step for step in [*peaks, *others] if step not in but]
    expected = []
    for step in allowed:
        if all(abs(step - other) >= separation for other in expected):
            expected.append(step)
    # What is too near to others comes last: only where the distance can't be kept.
    expected = [*expected, *(step for step in allowed if step not in expected)][:count]
    found = prominent(curve(values), everywhere(values, but), count, separation)
    assert found.tolist() == sorted(expected)
    assert len(found) == min(count, len(values) - len(but))


def test_planted_peaks_are_found():
    values = [0.1] * 12
    values[2], values[5], values[9] = 0.5, 0.9, 0.7
    for choose in (highest, prominent):
        assert choose(curve(values), everywhere(values), 3).tolist() == [2, 5, 9]
        assert choose(curve(values), everywhere(values), 2).tolist() == [5, 9]


def test_a_shoulder_is_high_but_no_peak():
    """At 0.8 beside the peak, where the lone hill of 0.5 stands out more."""
    values = [0.0, 0.8, 0.9, 0.0, 0.5, 0.0]
    assert highest(curve(values), everywhere(values), 2).tolist() == [1, 2]
    assert prominent(curve(values), everywhere(values), 2).tolist() == [2, 4]


@pytest.mark.parametrize(("sign", "best"), [(1, [4, 5]), (-1, [0, 1])])
def test_of_a_monotone_curve_it_is_the_high_end(sign, best):
    values = [sign * step for step in range(6)]
    for choose in (highest, prominent):
        assert choose(curve(values), everywhere(values), 2).tolist() == best


def test_a_peak_too_near_to_a_better_one_is_passed_over():
    values = [0.0, 1.0, 0.2, 0.9, 0.0, 0.3, 0.0]
    assert prominent(curve(values), everywhere(values), 2, 1).tolist() == [1, 3]
    assert prominent(curve(values), everywhere(values), 2, 3).tolist() == [1, 5]


def test_of_equal_steps_the_earlier_are_chosen():
    values = [0.5] * 6
    for choose in (highest, prominent):
        assert choose(curve(values), everywhere(values, but={0}), 2).tolist() in ([1, 2],)
