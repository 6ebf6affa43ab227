import math

import pytest

from entroflow.wording import Interval, count, duration, number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (9_500, "9,500"),
        (9_999, "9,999"),
        (10_000, "10.0k"),
        (352_000, "352.0k"),
        (999_949, "999.9k"),
        (999_960, "1.0M"),
        (1_234_567, "1.2M"),
        (2_500_000_000, "2.5G"),
    ],
)
def test_counts(value, text):
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (4.21, "4.2 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (500, "8 min 20 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_an_interval_stands_in_brackets_and_a_difference_has_signs():
    assert str(Interval(0.53, 0.494, 0.566)) == "0.53 [0.49, 0.57]"
    assert Interval(0.33, 0.28, 0.38).signed == "+0.33 [+0.28, +0.38]"
    assert Interval(-0.004, -0.02, 0.01).signed == "+0.00 [−0.02, +0.01]"


def test_an_interval_of_huge_numbers_stays_short():
    """As of a reward without a scale; its half width may be beyond what a float can hold."""
    assert str(Interval(1e300, -1.5e308, 1.5e308)) == "1e+300 [−1.5e+308, 1.5e+308]"
    assert Interval(-2e9, -math.inf, math.inf).signed == "−2e+09 [−inf, +inf]"
    assert str(Interval(2e8, 1e8, 3e8)) == "200000000 [100000000, 300000000]"


def test_numbers_keep_three_digits():
    assert number(0.2) == "0.200"
    assert number(27) == "27.0"
    assert number(-0.00123456) == "−0.00123"
