"""Which tokens Clip_B and Clip_V leave out (B-8, B-9), by the definitions written out."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entroflow.llm.clips import clip_b, clip_v
from entroflow.llm.processes import Alone, spread_of
from entroflow.llm.token_entropy import TokenStatistics, entropy_change, token_statistics

ROWS, LENGTH, V = 6, 9, 40


def batch(seed=0, scale=3.0):
    """Statistics of tokens drawn from their own softmax, advantages and lengths of six rows."""
    source = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(ROWS, LENGTH, V, generator=source, dtype=torch.float64)
    drawn = torch.multinomial(logits.softmax(-1).view(-1, V), 1, generator=source)
    tokens = token_statistics(logits, drawn.view(ROWS, LENGTH))
    advantages = torch.randn(ROWS, 1, generator=source)
    lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=source)
    return tokens, advantages, torch.arange(LENGTH) < lengths


def flat(tokens, advantages, valid):
    """(S, D, A) of every valid token, as plain numbers."""
    A = advantages.expand(valid.shape)
    D = tokens.baseline - tokens.discriminator
    return [*zip(*(x[valid].tolist() for x in (tokens.discriminator, D, A)), strict=True)]


def population(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


@given(st.integers(0, 300), st.sampled_from([0.0, 0.5, 1.0, 2.5]), st.sampled_from(["one", "two"]))
@settings(max_examples=60, deadline=None)
def test_clip_b_by_its_definition(seed, mu, sides):
    tokens, advantages, valid = batch(seed)
    found = clip_b(tokens, advantages, valid, mu=mu, sides=sides)
    mean, std = population([S for S, _, _ in flat(tokens, advantages, valid)])
    expected = []
    for S, _, A in flat(tokens, advantages, valid):
        if sides == "one":
            expected.append(A >= 0 or S - mean >= -mu * std)
        else:
            expected.append(abs(S - mean) <= mu * std)
    assert found.keep[valid].tolist() == expected
    assert found.keep[~valid].all()
    assert (found.spread.mean, found.spread.std) == pytest.approx((mean, std), abs=1e-12)


@given(st.integers(0, 300), st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.sampled_from(["one", "two"]))
@settings(max_examples=60, deadline=None)
def test_clip_v_by_its_definition(seed, mu, sides):
    """Without its cap; the threshold is on D itself."""
    tokens, advantages, valid = batch(seed)
    found = clip_v(tokens, advantages, valid, mu=mu, sides=sides, most=1.0)
    _, std = population([D for _, D, _ in flat(tokens, advantages, valid)])
    expected = []
    for _, D, A in flat(tokens, advantages, valid):
        if sides == "one":
            expected.append(A > 0 or mu * std >= D)
        else:
            expected.append(abs(D) <= mu * std)
    assert found.keep[valid].tolist() == expected
    assert found.keep[~valid].all()


@given(st.integers(0, 300), st.sampled_from([1e-4, 0.03, 0.1, 0.3]))
@settings(max_examples=60, deadline=None)
def test_of_too_many_clip_v_leaves_out_the_farthest(seed, most):
    tokens, advantages, valid = batch(seed)
    advantages[0] = 0.0
    found = clip_v(tokens, advantages, valid, mu=0.2, most=most)
    known = flat(tokens, advantages, valid)
    _, std = population([D for _, D, _ in known])
    over = [place for place, (_, D, A) in enumerate(known) if A <= 0 and 0.2 * std < D]
    allowed = max(int(most * len(known)), 1)
    if len(over) > allowed:
        over = sorted((p for p in over if known[p][2] < 0), key=lambda p: -known[p][1])[:allowed]
    assert (~found.keep[valid]).nonzero()[:, 0].tolist() == sorted(over)


@pytest.mark.parametrize(
    ("D", "A", "left_out"),
    [
        # Two beyond the threshold, two allowed: the one without an advantage is left out, too.
        ([9, 8, 0, 0], [-1, 0, -1, -1], [0, 1]),
        # Three: it stays, though it is farther than one that is left out.
        ([9, 8, 7, 0], [-1, 0, -1, -1], [0, 2]),
        # Only such ones, and more than two: all stay.
        ([9, 8, 7, 0], [0, 0, 0, -1], []),
        # Three penalised ones: the two farthest.
        ([7, 9, 8, 0], [-1, -1, -1, -1], [1, 2]),
        # The second and the third are as far: neither, so one less than allowed.
        ([9, 8, 8, 0], [-1, -1, -1, -1], [0]),
        ([8, 8, 8, 0], [-1, -1, -1, -1], []),
    ],
)
def test_the_cap_of_clip_v(D, A, left_out):
    """Of 20 tokens a share of 0.1, which is two, may be left out: D > 0.5 std(D) are too many."""
    distance = torch.tensor([[float(d) for d in D] + [0.0] * 16])
    nothing = torch.zeros_like(distance)
    tokens = TokenStatistics(nothing, nothing, -distance, nothing)
    assert torch.equal(tokens.baseline - tokens.discriminator, distance)
    advantages = torch.tensor([[float(a) for a in A] + [-1.0] * 16])
    valid = torch.ones_like(distance, dtype=torch.bool)
    keep = clip_v(tokens, advantages, valid, mu=0.5, most=0.1).keep
    assert (~keep[0]).nonzero()[:, 0].tolist() == left_out


@pytest.mark.parametrize("clip", [clip_b, clip_v])
@pytest.mark.parametrize("sides", ["one", "two"])
def test_an_infinite_threshold_keeps_all(clip, sides):
    assert clip(*batch(), mu=math.inf, sides=sides).keep.all()


@pytest.mark.parametrize("clip", [clip_b, clip_v])
def test_what_is_rewarded_is_kept(clip):
    tokens, advantages, valid = batch()
    assert clip(tokens, advantages.abs(), valid, mu=0.0).keep.all()


@pytest.mark.parametrize("clip", [clip_b, clip_v])
def test_tokens_that_are_all_alike_are_kept(clip):
    tokens, advantages, valid = batch()
    alike = replace(tokens, discriminator=torch.full_like(tokens.discriminator, -0.3),
                    baseline=torch.full_like(tokens.baseline, 0.1))  # fmt: skip
    assert clip(alike, -advantages.abs(), valid, mu=0.0).keep.all()


def all_of_v(*given, **named):
    """Clip_V without its cap."""
    return clip_v(*given, **named, most=1.0)


def some_of_v(*given, **named):
    """Clip_V with a cap of more than one token."""
    return clip_v(*given, **named, most=0.2)


CLIPS = [clip_b, clip_v, all_of_v, some_of_v]


@pytest.mark.parametrize("clip", CLIPS)
def test_padding_has_no_influence_and_rows_no_order(clip):
    tokens, advantages, valid = batch(seed=3)
    assert not valid.all()
    found = clip(tokens, advantages, valid, mu=0.5).keep
    assert not found.all()
    other = TokenStatistics(*(torch.where(valid, x, torch.nan) for x in vars(tokens).values()))
    assert torch.equal(clip(other, advantages, valid, mu=0.5).keep, found)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    turned = TokenStatistics(*(x[order] for x in vars(tokens).values()))
    assert torch.equal(clip(turned, advantages[order], valid[order], mu=0.5).keep, found[order])
    wide = advantages.expand(valid.shape)
    assert torch.equal(clip(tokens, wide, valid, mu=0.5).keep, found)


def test_nothing_at_all():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    tokens = TokenStatistics(*(torch.full((2, 3), torch.nan) for _ in range(4)))
    for clip in (clip_b, clip_v):
        found = clip(tokens, -torch.ones(2, 1), nothing)
        assert found.keep.all()
        assert found.spread.count == 0


# --- what it does to the entropy ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("clip", CLIPS)
def test_what_is_left_out_would_have_lowered_the_entropy(seed, clip):
    """Always of Clip_V; of Clip_B while mean(S) <= mu std(S)."""
    tokens, advantages, valid = batch(seed)
    found = clip(tokens, advantages, valid, mu=1.0)
    change = entropy_change(tokens, advantages)
    dropped = change[valid & ~found.keep]
    if clip is not clip_b or found.spread.mean <= found.spread.std:
        assert (dropped < 0).all()
        assert change[valid & found.keep].sum() >= change[valid].sum()


# --- several processes ----------------------------------------------------------------------------


class Threads:
    """Two processes, as threads that wait for each other."""

    def __init__(self, number, shared, barrier):
        self.number, self.shared, self.barrier = number, shared, barrier

    def _both(self, values):
        self.shared[self.number] = values
        self.barrier.wait()
        found = list(self.shared)
        self.barrier.wait()
        return found

    def sum(self, values):
        return sum(self._both(values))

    def gather(self, values):
        return torch.cat(self._both(values))


def by_two(function):
    """The results of a function of (number, processes), each in a thread of its own."""
    shared, barrier, results = [None, None], threading.Barrier(2, timeout=20), [None, None]

    def run(number):
        results[number] = function(number, Threads(number, shared, barrier))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_two_processes_leave_out_what_one_does(clip, cut):
    for seed in range(5):
        tokens, advantages, valid = batch(seed)
        whole = clip(tokens, advantages, valid, mu=0.3)
        parts = [slice(0, cut), slice(cut, None)]

        def of(number, processes, tokens=tokens, advantages=advantages, valid=valid, parts=parts):
            rows = parts[number]
            mine = TokenStatistics(*(x[rows] for x in vars(tokens).values()))
            return clip(mine, advantages[rows], valid[rows], mu=0.3, processes=processes)

        found = by_two(of)
        assert torch.equal(torch.cat([one.keep for one in found]), whole.keep)
        for one in found:
            assert one.spread.count == whole.spread.count
            assert one.spread.mean == pytest.approx(whole.spread.mean, abs=1e-13)
            assert one.spread.std == pytest.approx(whole.spread.std, abs=1e-13)


def test_a_spread_far_from_zero_loses_no_digits():
    """Two passes: a sum of squares would have none left at 1e9."""
    values = 1e9 + torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    found = spread_of(values, torch.ones(4, dtype=torch.bool), Alone())
    assert found.std == pytest.approx(math.sqrt(1.25), abs=1e-9)
