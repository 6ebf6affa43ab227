"""What the sentinel sees, against numbers that can be worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy import stats

from entroflow.evaluation.sentinel import Sentinel, drift, moved_surely

LOW = torch.linspace(0.0, 0.2, 50)
HIGH = LOW + 0.5
NAN = torch.full((50,), torch.nan)


def test_drift_is_in_standard_deviations_of_the_bases_images():
    base = torch.tensor([0.3, 0.7, torch.nan])
    deviation = 0.4 / math.sqrt(2)
    assert drift(base, torch.tensor([0.9])) == pytest.approx(0.4 / deviation)
    assert drift(base, torch.tensor([0.1, torch.nan])) == pytest.approx(-0.4 / deviation)
    assert drift(base, torch.tensor([torch.nan])) is None
    assert drift(base[1:], base) is None


def test_where_the_bases_images_are_alike_a_change_counts_by_what_can_be_seen():
    still = torch.full((10,), 0.2)
    assert drift(still, still) == 0
    assert drift(still, still + 0.02) == pytest.approx(2)
    assert drift(still, still - 0.0001) == pytest.approx(-0.01, rel=1e-3)


@pytest.mark.parametrize("apart", [0.0, 0.01, 0.02, 0.05, -0.05])
def test_a_mean_has_moved_where_a_paired_test_says_so(apart):
    """However much images differ from each other; with thousands of values t is normal."""
    source = torch.Generator().manual_seed(0)
    one = 10 * torch.randn(3000, generator=source, dtype=torch.float64)
    other = one + apart + 0.4 * torch.randn(3000, generator=source, dtype=torch.float64)
    p = stats.ttest_rel(one, other).pvalue
    assert abs(p - 0.05) > 0.003, "too near the edge to tell"
    expected = 0 if p > 0.05 else (1 if other.mean() > one.mean() else -1)
    assert moved_surely(one, other) == expected
    assert moved_surely(other, one) == -expected
    one[::2] = torch.nan
    assert moved_surely(one, other) == moved_surely(one[1::2], other[1::2])


def test_what_can_not_be_compared_has_not_moved():
    assert moved_surely(LOW, HIGH[:10]) == 0
    assert moved_surely(LOW[:1], HIGH[:1]) == 0
    assert moved_surely(NAN, HIGH) == 0


def test_nothing_is_hacked_at_first_nor_while_the_reward_does_not_rise():
    sentinel = Sentinel(band=1.0)
    assert not sentinel.look(LOW, {"brightness": LOW}, {}, first=True).alarms
    found = sentinel.look(LOW, {"brightness": HIGH}, {})
    assert found.drifts["brightness"] == pytest.approx(0.5 / LOW.double().std().item())
    assert not found.alarms
    assert not sentinel.look(NAN, {"brightness": HIGH}, {}).alarms


@pytest.mark.parametrize("now", [LOW - 0.5, LOW + 0.5])
def test_a_statistic_that_leaves_its_band_either_way_is_an_alarm(now):
    far = abs((now - LOW).mean().item()) / LOW.std().item()
    for band, alarm in ((1.01 * far, False), (0.99 * far, True)):
        sentinel = Sentinel(band)
        sentinel.look(LOW, {"brightness": LOW, "edges": LOW}, {}, first=True)
        found = sentinel.look(HIGH, {"brightness": now, "edges": LOW}, {})
        assert set(found.alarms) == ({"brightness"} if alarm else set())
    assert (
        f"{math.copysign(far, now.mean()):+.1f} standard deviations" in found.alarms["brightness"]
    )


@pytest.mark.parametrize(("now", "alarm"), [(LOW, False), (HIGH, False), (LOW - 0.2, True)])
def test_only_a_fall_of_another_reward_is_an_alarm(now, alarm):
    sentinel = Sentinel(band=1.0)
    sentinel.look(LOW, {}, {"taste": LOW}, first=True)
    found = sentinel.look(HIGH, {}, {"taste": now})
    assert found.alarms == ({"taste": "taste has fallen from 0.1 to -0.1"} if alarm else {})
    assert not found.drifts


def test_what_is_no_number_is_left_out():
    sentinel = Sentinel(band=1.0)
    sentinel.look(LOW, {"contrast": LOW, "texture": NAN}, {"taste": LOW}, first=True)
    found = sentinel.look(HIGH, {"contrast": NAN, "texture": HIGH}, {"taste": NAN})
    assert not found.drifts
    assert not found.alarms


def test_what_it_remembers_goes_through_json():
    sentinel = Sentinel(band=1.0)
    sentinel.look(LOW, {"brightness": LOW}, {"taste": LOW}, first=True)
    other = Sentinel(band=1.0)
    other.load_state(json.loads(json.dumps(sentinel.state())))
    now = (HIGH, {"brightness": HIGH}, {"taste": LOW - 1})
    assert other.look(*now) == sentinel.look(*now)
    assert set(other.look(*now).alarms) == {"brightness", "taste"}
    other.forget(["taste"])
    assert set(other.look(*now).alarms) == {"brightness"}


def test_without_the_base_nothing_is_watched():
    """As in a run that an older version began, or for a monitor that came later."""
    found = Sentinel(band=1.0).look(HIGH, {"brightness": HIGH}, {"taste": LOW})
    assert not found.drifts
    assert not found.alarms
