"""Attention entropy against closed forms and the dense computation in float64 (A-1 to A-3)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from entroflow.attention.entropy import attention_entropy, normalised


def drawn(keys=13, queries=5, width=4, seed=0, scale=2.0):
    source = torch.Generator().manual_seed(seed)
    q = scale * torch.randn(2, 3, queries, width, generator=source, dtype=torch.float64)
    k = scale * torch.randn(2, 3, keys, width, generator=source, dtype=torch.float64)
    return q, k


def dense(q, k, keep=None):
    """By the definition, with the probabilities written out."""
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    if keep is not None:
        logits = logits.masked_fill(~keep[..., None, :], -torch.inf)
    p = logits.softmax(dim=-1)
    return -torch.xlogy(p, p).sum(dim=-1)


def of_logits(logits, **options):
    """Entropy of one query with given logits: width 1, where the query is 1."""
    keys = torch.as_tensor(logits, dtype=torch.float64)[:, None]
    return attention_entropy(torch.ones(1, 1, dtype=torch.float64), keys, **options).item()


@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 100])
def test_any_chunking_is_the_dense_computation(chunk):
    q, k = drawn()
    torch.testing.assert_close(
        attention_entropy(q, k, chunk=chunk), dense(q, k), rtol=0, atol=1e-12
    )


def test_it_is_what_fused_kernels_can_tell():
    """H = LSE - E_p[s]: the mean logit by attention to the keys themselves, and the log-sum-exp
    by a key of zeros, whose share is 1 / (1 + e^LSE)."""
    q, k = drawn()
    scale = 1 / math.sqrt(q.shape[-1])
    mean = scale * (q * scaled_dot_product_attention(q, k, k)).sum(dim=-1)
    ghost = torch.nn.functional.pad(k, (0, 0, 0, 1))
    which = torch.zeros(*ghost.shape[:-1], 1, dtype=torch.float64)
    which[..., -1, :] = 1
    share = scaled_dot_product_attention(q, ghost, which)[..., 0]
    expected = ((1 - share) / share).log() - mean
    torch.testing.assert_close(attention_entropy(q, k, chunk=4), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_masked_keys_are_as_good_as_absent(chunk):
    q, k = drawn()
    keep = torch.rand(2, 1, 13, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[:, :, 0] = False
    found = attention_entropy(q, k, keep, chunk)
    torch.testing.assert_close(found, dense(q, k, keep.expand(2, 3, 13)), rtol=0, atol=1e-12)
    for row in range(2):
        left = k[row][:, keep[row, 0]]
        torch.testing.assert_close(found[row], attention_entropy(q[row], left), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_without_any_key_there_is_no_entropy(chunk):
    q, k = drawn()
    found = attention_entropy(q, k, torch.zeros(2, 1, 13, dtype=torch.bool), chunk)
    assert torch.equal(found, torch.zeros_like(found))


@given(st.integers(1, 40), st.integers(0, 1000), st.floats(0, 50), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_it_lies_between_0_and_log_k(keys, seed, scale, chunk):
    q, k = drawn(keys, seed=seed, scale=scale)
    found = attention_entropy(q, k, chunk=chunk)
    assert (found > -1e-9).all()
    assert (found < math.log(keys) + 1e-9).all()
    share = normalised(found, keys)
    assert ((share > -1e-9) & (share < 1 + 1e-9)).all()


def test_extremes():
    """All alike: log K. One key: 0. A scale that grows leaves log of how many share the largest."""
    assert of_logits([0.7] * 9) == pytest.approx(math.log(9), abs=1e-12)
    assert of_logits([3.0]) == 0
    assert normalised(torch.tensor(0.0), 1).item() == 0
    ties = torch.tensor([1.0, 1.0, 1.0, 0.5, -2.0], dtype=torch.float64)
    assert of_logits(1e-9 * ties) == pytest.approx(math.log(5), abs=1e-9)
    assert of_logits(1e4 * ties) == pytest.approx(math.log(3), abs=1e-12)


@pytest.mark.parametrize("gap", [0.0, 0.3, 2.0, 30.0, 800.0])
def test_two_keys(gap):
    expected = math.log1p(math.exp(-gap)) + (gap * math.exp(-gap) / (1 + math.exp(-gap)))
    for chunk in (1, 2):
        assert of_logits([gap, 0.0], chunk=chunk) == pytest.approx(expected, abs=1e-13)
        assert of_logits([0.0, gap], chunk=chunk) == pytest.approx(expected, abs=1e-13)


def test_it_falls_with_the_scale_by_the_variance_of_the_logits():
    """dH / d scale = -scale * Var_p(s), by finite differences."""
    s = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scale in (0.5, 1.0, 3.0):
        p = (scale * s).softmax(0)
        variance = (p * s.square()).sum() - (p * s).sum().square()
        slope = (of_logits((scale + 1e-5) * s) - of_logits((scale - 1e-5) * s)) / 2e-5
        assert slope == pytest.approx(-scale * variance.item(), rel=1e-6)


def test_what_changes_nothing_and_what_adds_log_2():
    q, k = drawn()
    before = attention_entropy(q, k)
    turned = attention_entropy(q, k[..., torch.randperm(13), :], chunk=4)
    torch.testing.assert_close(turned, before, rtol=0, atol=1e-12)
    twice = attention_entropy(q, torch.cat([k, k], dim=-2), chunk=7)
    torch.testing.assert_close(twice, before + math.log(2), rtol=0, atol=1e-12)
    logits = torch.linspace(-3, 3, 11)
    for shift in (1e4, -1e4):
        assert of_logits(logits + shift, chunk=4) == pytest.approx(of_logits(logits), abs=1e-3)


def test_half_precision_is_computed_in_float32():
    q, k = (x.to(torch.bfloat16) for x in drawn())
    found = attention_entropy(q, k)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dense(q.double(), k.double()), rtol=0, atol=1e-5)
