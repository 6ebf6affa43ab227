"""Entropy of tokens and how updates move it, against closed forms and autograd (B-1 to B-7)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss

from entroflow.llm.token_entropy import entropy_change, token_statistics

V = 50


def drawn(seed=0, positions=7, scale=2.0):
    source = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(positions, V, generator=source, dtype=torch.float64)
    return logits, torch.randint(V, (positions,), generator=source)


def entropy(z):
    """By the definition: [..., V] -> [...]."""
    p = z.softmax(dim=-1)
    return -torch.xlogy(p, p).sum(dim=-1)


def everywhere(z, temperature=1.0):
    """S of every token of one position, and S_bar: [V], []."""
    found = token_statistics(z.expand(V, V), torch.arange(V), temperature)
    return found.discriminator, found.baseline[0]


def close(one, other, within=1e-12):
    torch.testing.assert_close(one, other, rtol=0, atol=within)


# --- B-1: what S is -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_discriminator_in_all_its_forms(seed):
    z = drawn(seed)[0][0].requires_grad_()
    p, H = z.softmax(0), entropy(z)
    (gradient,) = torch.autograd.grad(H, z)
    S, mean = everywhere(z.detach())
    close(S, -gradient)
    close(S, (p * (z - (p * z).sum())).detach())
    close(S.sum(), torch.tensor(0.0, dtype=torch.float64))
    close((p.detach() * (S - mean)).sum(), torch.tensor(0.0, dtype=torch.float64))
    assert torch.equal(S > 0, p > math.exp(-H.item()))
    assert S.min() >= -math.exp(-1 - H.item())


# --- B-2, B-3: first and second order -------------------------------------------------------------

EPSILONS = (0.1, 0.05, 0.025, 0.0125)


def ratios(z, direction, first, second):
    """How the error of both orders shrinks as the step is halved."""
    found = []
    for curvature in (0.0, second):
        errors = [
            (entropy(z + step * direction) - entropy(z) + step * first - step**2 / 2 * curvature)
            .abs().item()
            for step in EPSILONS
        ]  # fmt: skip
        found.append([a / b for a, b in pairwise(errors)])
    return found


def hessian(z):
    return torch.autograd.functional.hessian(entropy, z)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("towards", ["logit", "log-probability"])
def test_errors_fall_by_four_and_by_eight(seed, towards):
    z = drawn(seed)[0][0]
    p = z.softmax(0)
    S, mean = everywhere(z)
    checked = 0
    for k in p.topk(5).indices.tolist():
        unit = torch.nn.functional.one_hot(torch.tensor(k), V).double()
        direction = unit if towards == "logit" else unit - p
        first = S[k] if towards == "logit" else S[k] - mean
        second = direction @ hessian(z) @ direction
        third = abs(float(entropy_third(z, direction)))
        if abs(second) < 0.02 or third < 0.02:
            continue  # Where a coefficient is near 0, the next one shows.
        fours, eights = ratios(z, direction, first, second)
        assert 3.8 < fours[-1] < 4.2, (k, fours)
        assert 7.6 < eights[-1] < 8.4, (k, eights)
        checked += 1
    assert checked


def entropy_third(z, direction):
    """Third derivative along a direction."""
    at = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = entropy(z + at * direction)
    for _ in range(3):
        (value,) = torch.autograd.grad(value, at, create_graph=True)
    return value.detach()


def test_the_hessian_in_closed_form():
    z = drawn(1)[0][0]
    p, (S, _) = z.softmax(0), everywhere(z)
    expected = -(torch.diag(S + p) - torch.outer(S, p) - torch.outer(p, S) - torch.outer(p, p))
    close(hessian(z), expected)
    k = int(p.argmax())
    close(hessian(z)[k, k], -(S[k] * (1 - 2 * p[k]) + p[k] * (1 - p[k])))


# --- B-4: the baseline ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_baseline_in_all_its_forms(seed):
    z = drawn(seed)[0][0]
    p, H = z.softmax(0), entropy(z)
    S, mean = everywhere(z)
    close(mean, (p * S).sum())
    close(mean, H * p.square().sum() + (p.square() * p.log()).sum())
    close(mean, (p * p * z).sum() - p.square().sum() * (p * z).sum())
    escort = p.square() / p.square().sum()
    close(mean, p.square().sum() * ((escort * z).sum() - (p * z).sum()))
    assert mean > 0


def test_uniform_logits_move_nothing():
    S, mean = everywhere(torch.full((V,), 3.0, dtype=torch.float64))
    close(S, torch.zeros(V, dtype=torch.float64))
    assert abs(mean.item()) < 1e-12


@pytest.mark.parametrize("q", [0.1, 0.5, 0.7, 0.99])
def test_two_tokens(q):
    z = torch.tensor([math.log(q), math.log(1 - q)], dtype=torch.float64)
    found = token_statistics(z.expand(2, 2), torch.tensor([0, 1]))
    S = q * (1 - q) * math.log(q / (1 - q))
    assert found.discriminator.tolist() == pytest.approx([S, -S], abs=1e-13)
    assert found.baseline.tolist() == pytest.approx([(2 * q - 1) * S] * 2, abs=1e-13)


# --- B-5: temperature -----------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0.7, 1.0, 1.5])
def test_what_a_temperature_does(T):
    """Of raw logits: a policy-gradient step has 1 / T of its own, and one from the chain rule."""
    z, tokens = drawn()
    found = token_statistics(z, tokens, T)
    close(found.entropy, entropy(z / T))
    step = 1e-5
    p = (z / T).softmax(dim=-1)
    unit = torch.nn.functional.one_hot(tokens, V).double()
    moved = entropy((z + step / T * (unit - p)) / T) - entropy(z / T)
    torch.testing.assert_close(moved, entropy_change(found, step, T), rtol=1e-3, atol=1e-12)
    raised = entropy((z + step * unit) / T) - entropy(z / T)
    torch.testing.assert_close(raised, -step / T * found.discriminator, rtol=1e-3, atol=1e-12)


# --- B-6: on average ------------------------------------------------------------------------------


def test_only_the_covariance_with_the_advantage_moves_entropy_on_average():
    z = drawn(2)[0][0]
    p, (S, mean) = z.softmax(0), everywhere(z)
    advantage = torch.randn(V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    moved = (p * advantage * (S - mean)).sum()
    close(moved, (p * (advantage - (p * advantage).sum()) * S).sum())
    close((p * 1.7 * (S - mean)).sum(), torch.tensor(0.0, dtype=torch.float64))
    old = drawn(3)[0][0].softmax(0)
    close((old * (p / old) * (S - mean)).sum(), torch.tensor(0.0, dtype=torch.float64))


def test_the_mean_over_sampled_tokens_is_0_within_its_error():
    z = drawn(4)[0][0]
    n = 20_000
    tokens = torch.multinomial(z.softmax(0), n, True, generator=torch.Generator().manual_seed(0))
    centred = token_statistics(z.expand(n, V), tokens).centred
    assert centred.mean().abs() < 4 * centred.std() / math.sqrt(n)


# --- B-7: one pass --------------------------------------------------------------------------------

FIELDS = ("log_prob", "entropy", "discriminator", "baseline")


def dense(z, tokens):
    """By the definitions, with all probabilities written out."""
    p = z.softmax(dim=-1)
    S = torch.where(p > 0, p * (entropy(z)[..., None] + p.log().nan_to_num(neginf=0.0)), 0.0)
    own = tokens[..., None]
    log_prob = z.log_softmax(dim=-1).gather(-1, own)[..., 0]
    return log_prob, entropy(z), S.gather(-1, own)[..., 0], (p * S).sum(dim=-1)


@pytest.mark.parametrize("chunk", [1, 7, V, 1000])
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_any_chunking_is_the_dense_computation(chunk, shift):
    z, tokens = drawn()
    found = token_statistics(z + shift, tokens, chunk=chunk)
    for name, expected in zip(FIELDS, dense(z, tokens), strict=True):
        close(getattr(found, name), expected, within=1e-11 if shift else 1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_tokens_that_can_not_be_sampled_are_as_good_as_absent(chunk):
    z, _ = drawn()
    z[:, :10] = -torch.inf
    tokens = torch.arange(10, 17)
    found = token_statistics(z, tokens, chunk=chunk)
    for name, expected in zip(FIELDS, dense(z[:, 10:], tokens - 10), strict=True):
        close(getattr(found, name), expected)
    absent = token_statistics(z, torch.zeros(7, dtype=torch.long), chunk=chunk)
    assert (absent.log_prob == -torch.inf).all()
    assert (absent.discriminator == 0).all()


def test_a_certain_token_moves_nothing():
    z = torch.full((1, V), -torch.inf, dtype=torch.float64)
    z[0, 3] = 0.0
    found = token_statistics(z, torch.tensor([3]), chunk=8)
    for name in FIELDS:
        assert getattr(found, name).item() == 0, name


def test_half_precision_is_computed_in_float32():
    z, tokens = drawn()
    half = z.bfloat16()
    found = token_statistics(half, tokens)
    assert found.entropy.dtype == torch.float32
    for name, expected in zip(FIELDS, dense(half.double(), tokens), strict=True):
        torch.testing.assert_close(getattr(found, name).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [0.0, -1.0])
def test_a_temperature_that_is_none_is_refused(T):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        token_statistics(*drawn(), temperature=T)


# --- G-1: what does not carry over to flow policies -----------------------------------------------


def test_the_entropy_of_a_gaussian_step_knows_nothing_of_its_mean():
    from entroflow.sampling.kernels import entropy as of_step

    mean = torch.zeros(3, requires_grad=True)
    std = torch.tensor(0.3)
    assert not of_step(std).requires_grad
    density = torch.distributions.Normal(mean, std)
    assert density.entropy().grad_fn is None or torch.autograd.grad(
        density.entropy().sum(), mean, allow_unused=True
    ) == (None,)


def test_of_a_learned_spread_the_surprise_decides():
    """dH = alpha sum(u^2 - 1), exactly: the score of log std, in which H is linear."""
    spread = torch.tensor([0.1, -0.4, 0.7], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([2.0, 0.3, -1.1], dtype=torch.float64)
    sample = u * spread.exp().detach()
    density = torch.distributions.Normal(torch.zeros(3, dtype=torch.float64), spread.exp())
    (score,) = torch.autograd.grad(density.log_prob(sample).sum(), spread)
    close(score, u.square() - 1)
    alpha = 0.3
    moved = torch.distributions.Normal(0.0, (spread + alpha * score).exp()).entropy()
    before = torch.distributions.Normal(0.0, spread.exp()).entropy()
    close((moved - before).sum().detach(), alpha * (u.square() - 1).sum())
    # Without advantages it moves nothing on average: E[u^2 - 1] = 0.
    nodes, weights = map(torch.from_numpy, hermegauss(4))
    close((weights * (nodes.square() - 1)).sum() / weights.sum(), torch.zeros(()).double())


# --- G-2: of what noise makes of a distribution of states, the entropy does move ----------------


@pytest.mark.parametrize(("k", "tau", "s"), [(0.7, 1.3, 0.4), (-1.1, 0.5, 1.0)])
def test_the_entropy_of_next_states_moves_with_the_mean(k, tau, s):
    """x' = k x + s eps, x ~ N(0, tau^2): dh = -E[<grad log p'(x'), d mu>]; not 0, unlike a step's.

    Expectations over x and eps are exact by Gauss-Hermite quadrature.
    """
    nodes, weights = (torch.tensor(part) for part in hermegauss(20))
    weights = weights / weights.sum()
    x, eps = tau * nodes[:, None], nodes[None]
    V = k**2 * tau**2 + s**2
    score = -(k * x + s * eps) / V

    def mean(values):
        return (weights[:, None] * weights[None] * values).sum().item()

    slope = torch.tensor(k, requires_grad=True, dtype=torch.float64)
    entropy = 0.5 * torch.log(2 * math.pi * math.e * (slope**2 * tau**2 + s**2))
    (rise,) = torch.autograd.grad(entropy, slope)
    assert rise.item() == pytest.approx(k * tau**2 / V, abs=1e-12)
    assert -mean(score * x) == pytest.approx(rise.item(), abs=1e-12)
    # And the sample's discriminator is not centred, as that of a softmax is.
    assert mean(score * eps / s) == pytest.approx(-1 / V, abs=1e-12)
