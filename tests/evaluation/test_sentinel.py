"""What the sentinel sees, against numbers that can be worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy import stats

from entroflow.evaluation.sentinel import Reading, Sentinel, drift, moved_surely

LOW = torch.linspace(0.0, 0.2, 50)
HIGH = LOW + 0.5
NAN = torch.full((50,), torch.nan)


def test_a_reading_is_of_the_numbers_there_are():
    values = torch.tensor([1.0, 2.0, torch.nan, 6.0])
    assert Reading.of(values) == Reading(3.0, pytest.approx(math.sqrt(7)), 3)
    assert Reading.of(torch.tensor([1.0, torch.nan])) is None


def test_drift_is_in_standard_deviations_of_the_bases_images():
    base = Reading(0.5, 0.2, 10)
    assert drift(base, Reading(0.9, 9.0, 3)) == pytest.approx(2)
    assert drift(base, Reading(0.1, 9.0, 3)) == pytest.approx(-2)


def test_where_the_bases_images_are_alike_a_change_counts_by_what_can_be_seen():
    still = Reading(0.2, 0.0, 10)
    assert drift(still, still) == 0
    assert drift(still, Reading(0.22, 0.1, 10)) == pytest.approx(2)
    assert drift(still, Reading(0.1999, 0.1, 10)) == pytest.approx(-0.01)


@pytest.mark.parametrize("apart", [0.0, 0.05, 0.1, 0.2, 0.3])
def test_a_mean_has_moved_where_welchs_test_says_so(apart):
    """With thousands of values the t of Welch's test is normal."""
    source = torch.Generator().manual_seed(0)
    one = torch.randn(2000, generator=source, dtype=torch.float64)
    other = 2 * torch.randn(3000, generator=source, dtype=torch.float64) + apart
    p = stats.ttest_ind(one, other, equal_var=False).pvalue
    if abs(p - 0.05) < 0.005:
        pytest.skip("on the edge, where t and normal differ")
    expected = 0 if p > 0.05 else (1 if other.mean() > one.mean() else -1)
    assert moved_surely(Reading.of(one), Reading.of(other)) == expected
    assert moved_surely(Reading.of(other), Reading.of(one)) == -expected


def test_nothing_is_hacked_at_first_nor_while_the_reward_does_not_rise():
    sentinel = Sentinel(band=1.0)
    assert not sentinel.look(LOW, {"brightness": LOW}, {}).alarms
    found = sentinel.look(LOW, {"brightness": HIGH}, {})
    assert found.drifts["brightness"] == pytest.approx(0.5 / LOW.double().std().item())
    assert not found.alarms
    assert not sentinel.look(NAN, {"brightness": HIGH}, {}).alarms


@pytest.mark.parametrize("now", [LOW - 0.5, LOW + 0.5])
def test_a_statistic_that_leaves_its_band_either_way_is_an_alarm(now):
    far = abs((now - LOW).mean().item()) / LOW.std().item()
    for band, alarm in ((1.01 * far, False), (0.99 * far, True)):
        sentinel = Sentinel(band)
        sentinel.look(LOW, {"brightness": LOW, "edges": LOW}, {})
        found = sentinel.look(HIGH, {"brightness": now, "edges": LOW}, {})
        assert set(found.alarms) == ({"brightness"} if alarm else set())
    assert (
        f"{math.copysign(far, now.mean()):+.1f} standard deviations" in found.alarms["brightness"]
    )


@pytest.mark.parametrize(("now", "alarm"), [(LOW, False), (HIGH, False), (LOW - 0.2, True)])
def test_only_a_fall_of_another_reward_is_an_alarm(now, alarm):
    sentinel = Sentinel(band=1.0)
    sentinel.look(LOW, {}, {"taste": LOW})
    found = sentinel.look(HIGH, {}, {"taste": now})
    assert found.alarms == ({"taste": "taste has fallen from 0.1 to -0.1"} if alarm else {})
    assert not found.drifts


def test_what_is_no_number_is_left_out():
    sentinel = Sentinel(band=1.0)
    sentinel.look(LOW, {"contrast": LOW, "texture": NAN}, {"taste": LOW})
    found = sentinel.look(HIGH, {"contrast": NAN, "texture": HIGH}, {"taste": NAN})
    assert found.drifts == {"texture": 0.0}, "its first reading is its base"
    assert not found.alarms


def test_what_it_remembers_goes_through_json():
    sentinel = Sentinel(band=1.0)
    sentinel.look(LOW, {"brightness": LOW}, {"taste": LOW})
    other = Sentinel(band=1.0)
    other.load_state(json.loads(json.dumps(sentinel.state())))
    now = (HIGH, {"brightness": HIGH}, {"taste": LOW - 1})
    assert other.look(*now) == sentinel.look(*now)
    assert set(other.look(*now).alarms) == {"brightness", "taste"}
