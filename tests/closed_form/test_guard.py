"""GRPO-Guard: the centred and rescaled ratio, and the weight of a step.

With x' = mu_old + s eps the log-ratio per dimension is mean [(mu - mu_old) eps] / s - b, where
b = mean (mu - mu_old)^2 / (2 s^2), so (log-ratio + b) s = mean [(mu - mu_old) eps] (2510.22319).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from entroflow.objectives import clipped, guard
from entroflow.objectives.clipped import Clipped
from entroflow.objectives.guard import Guard
from entroflow.objectives.transitions import Transitions
from entroflow.sampling.kernels import log_prob
from experience import experience, log_prob_by_shift, steps_of, updated

N, D = 7, 40
LOOSE = {"clip_range": 1e3}


class MeanItself:
    """A kernel of which a velocity is the mean."""

    def mean(self, x, v, *_):
        return v


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def drawn(eps, spread=0.3):
    """Transitions [N] that were drawn with the given noise, the mean now, and their s and |dt|."""
    old, now = normal(N, D, seed=1), normal(N, D, seed=1) + spread * normal(N, D, seed=2)
    s = torch.linspace(0.05, 1.2, N, dtype=torch.float64)
    t = torch.linspace(1.0, 0.3, N, dtype=torch.float64)
    length = torch.linspace(0.02, 0.2, N, dtype=torch.float64)
    reached = old + s[:, None] * eps
    index, zero = torch.arange(N), torch.zeros(N, dtype=torch.long)
    table = Transitions(
        kernel=MeanItself(), idle=torch.zeros(N, dtype=torch.bool),
        states=reached, state=index, next_state=index, sigma=t, sigma_next=t - length, std=s,
        log_prob=log_prob(reached, old, s), row=index, step=index, prompt=zero, group=zero,
        advantage=torch.linspace(-1.5, 2, N, dtype=torch.float64),
        weight=torch.full((N,), 1 / N, dtype=torch.float64), old_mean=old,
    )  # fmt: skip
    return table, now, s, length


def log_ratio(objective, eps):
    table, now, _, _ = drawn(eps)
    return objective.terms(table, now, {})["ratio"].log()


def check_identity() -> None:
    eps = normal(N, D, seed=3)
    table, now, _, _ = drawn(eps)
    wanted = ((now - table.old_mean) * eps).mean(dim=1)
    assert wanted.abs().min() > 1e-4
    torch.testing.assert_close(log_ratio(Guard(**LOOSE), eps), wanted, rtol=0, atol=1e-10)


def test_log_ratio_is_the_product_of_shift_and_noise():
    """(log-ratio + b) s = mean [(mu - mu_old) eps], each with its own b and s."""
    check_identity()


def test_log_ratio_is_centred_and_the_plain_one_is_not():
    """Averaged over eps and -eps: exactly 0, against -mean (mu - mu_old)^2 / (2 s^2)."""
    eps = normal(N, D, seed=3)
    table, now, s, _ = drawn(eps)
    centred, plain = (
        (log_ratio(objective, eps) + log_ratio(objective, -eps)) / 2
        for objective in (Guard(**LOOSE), Clipped(**LOOSE))
    )
    torch.testing.assert_close(centred, torch.zeros_like(centred), rtol=0, atol=1e-12)
    wanted = -(now - table.old_mean).square().mean(dim=1) / (2 * s**2)
    assert (wanted < -0.01).all()
    torch.testing.assert_close(plain, wanted, rtol=1e-10, atol=0)


def check_gradient_away_from_the_start() -> None:
    eps = normal(N, D, seed=3)
    table, now, _, _ = drawn(eps)
    now = now.requires_grad_()
    objective = Guard(**LOOSE)
    ratio = objective.terms(table, now, {})["ratio"]
    (found,) = torch.autograd.grad(ratio.log().sum(), now)
    torch.testing.assert_close(found, eps / D, rtol=0, atol=1e-12)


def test_the_gradient_of_the_log_ratio_is_the_noise_wherever_the_mean_has_moved():
    """d(log rho) / d(mu) = eps / D, which takes the gradient of the centre as well."""
    check_gradient_away_from_the_start()


def check_loss() -> None:
    eps, clip = normal(N, D, seed=3), 0.01
    table, now, _, length = drawn(eps)
    found = Guard(clip_range=clip).terms(table, now, {})
    rho = np.exp(((now - table.old_mean) * eps).mean(dim=1).numpy())
    A = table.advantage.numpy()
    assert ((np.abs(rho - 1) > clip).sum(), (np.abs(rho - 1) < clip).sum()) >= (1, 1)
    wanted = np.maximum(-A * rho, -A * np.clip(rho, 1 - clip, 1 + clip)) / length.numpy()
    np.testing.assert_allclose(found["loss"], wanted, rtol=1e-10)
    np.testing.assert_array_equal(found["clipped"], np.abs(rho - 1) > clip)


def test_loss_is_the_clipped_one_over_the_length_of_the_step():
    check_loss()


def gradient(objective):
    """Of one update at the weights that sampled, and what the closed forms need."""
    seen = experience()
    updated(seen, objective, learning_rate=1.0)
    steps = steps_of(experience())
    return -seen.policy.shift.detach().flatten().numpy(), steps, seen


def test_gradient_while_the_weights_are_those_that_sampled():
    """-(1/n) sum A s / |dt| dlog_prob, times D as every update; that of Clipped is without it."""
    found, steps, seen = gradient(Guard(clip_range=0.1))
    by_shift = log_prob_by_shift(seen.policy.__class__(0.3, 0.5, (3, 2), 3.0), **steps)
    A = seen.transitions.advantage.numpy()[:, None]
    weight = steps["s"] / (steps["t"] - steps["t_next"])
    wanted = -6 * (A * weight * by_shift).mean(axis=0)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weight", ["uniform", "variance"])
def test_the_weight_of_a_step_in_the_clipped_objective(weight):
    """variance: the published density of CPS has a gradient of 2 s^2 times the true one."""
    found, steps, seen = gradient(Clipped(clip_range=0.1, weight=weight))
    by_shift = log_prob_by_shift(seen.policy.__class__(0.3, 0.5, (3, 2), 3.0), **steps)
    A = seen.transitions.advantage.numpy()[:, None]
    factor = 2 * steps["s"] ** 2 if weight == "variance" else 1.0
    wanted = -6 * (A * factor * by_shift).mean(axis=0)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_the_weight_changes_neither_ratio_nor_clip_fraction_nor_kl():
    eps = normal(N, D, seed=3)
    table, now, s, _ = drawn(eps)
    others = {"reference": normal(N, D, seed=5)}
    plain, weighted = (
        Clipped(clip_range=0.1, kl=0.5, weight=weight).terms(table, now, others)
        for weight in ("uniform", "variance")
    )
    for name in ("ratio", "clipped", "kl"):
        assert torch.equal(plain[name], weighted[name])
    pull = 0.5 * plain["kl"]
    wanted = (plain["loss"] - pull) * 2 * s**2
    torch.testing.assert_close(weighted["loss"] - pull, wanted, rtol=1e-10, atol=1e-12)


def test_on_policy_the_ratio_is_one_to_the_bit():
    assert updated(experience(), Guard(clip_range=1e-4)).terms["ratio"] == 1


# --- mutations ------------------------------------------------------------------------------------


def with_one_centre_for_the_batch(monkeypatch):
    """The published code averages b over the batch as well."""
    right = guard.kl_divergence
    monkeypatch.setattr(guard, "kl_divergence", lambda *given: right(*given).mean())


def with_the_centre_subtracted(monkeypatch):
    right = guard.kl_divergence
    monkeypatch.setattr(guard, "kl_divergence", lambda *given: -right(*given))


def with_a_constant_centre(monkeypatch):
    right = guard.kl_divergence
    monkeypatch.setattr(guard, "kl_divergence", lambda *given: right(*given).detach())


def with_the_length_multiplied(monkeypatch):
    right = Guard._step_weight
    monkeypatch.setattr(Guard, "_step_weight", lambda *given: 1 / right(*given))


def with_the_optimistic_bound(monkeypatch):
    monkeypatch.setattr(clipped.torch, "maximum", torch.minimum)


@pytest.mark.parametrize(
    ("check", "mutate"),
    [
        (check_identity, with_one_centre_for_the_batch),
        (check_identity, with_the_centre_subtracted),
        (check_gradient_away_from_the_start, with_a_constant_centre),
        (check_loss, with_the_length_multiplied),
        (check_loss, with_the_optimistic_bound),
    ],
)
def test_checks_reject_a_wrong_guard(check, mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()
