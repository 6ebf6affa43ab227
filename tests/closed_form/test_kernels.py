"""Kernel algebra: standard deviation, mean, log-density, KL and entropy against closed forms.

t and t' are sigma before and after a step, dt = t' - t < 0, a the noise level of Flow-GRPO
(2505.05470, eq. 12) and s the standard deviation of a step.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from entroflow.noise import Address, Stream, gaussian
from entroflow.policies.grid import shifted_grid
from entroflow.sampling import kernels
from entroflow.sampling.kernels import CPS, ODE, DanceSDE, FlowSDE, VarianceMatched
from entroflow.sampling.solver import integrate
from gaussian_policy import GaussianPolicy

NOISE_LEVELS = (0.3, 0.7, 1.0)
GRIDS = [(steps, shift) for steps in (1, 4, 10, 16) for shift in (0.5, 1.0, 3.0)]


in_both_precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)]
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def moves_of(grid: Tensor) -> list[tuple[int, int]]:
    """Every pair of points i < j: single steps and merged ones."""
    return list(itertools.combinations(range(len(grid)), 2))


def expected_std(a: float, t: float, t_next: float, second_point: float) -> float:
    """a sqrt(t / (1 - t)) sqrt(|dt|), where 1 - t is 1 - sigma_1 at t = 1."""
    return a * math.sqrt(t / (1 - (second_point if t == 1 else t))) * math.sqrt(t - t_next)


def expected_mean(x: Tensor, v: Tensor, t: float, t_next: float, s: float) -> np.ndarray:
    """x (1 + d dt / 2t) + v (1 + d (1 - t) / 2t) dt with the squared diffusion d = s^2 / |dt|."""
    dt, diffusion = t_next - t, s**2 / (t - t_next)
    from_state = x.double().numpy() * (1 + diffusion * dt / (2 * t))
    return from_state + v.double().numpy() * (1 + diffusion * (1 - t) / (2 * t)) * dt


def single_steps(a: float, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t, t' and s of the steps after the first, where no clamp acts."""
    t, t_next = grid[1:-1], grid[2:]
    return t, t_next, FlowSDE(noise_level=a).std(t, t_next, grid)


def check_standard_deviations() -> None:
    for a in NOISE_LEVELS:
        for steps, shift in GRIDS:
            grid = shifted_grid(steps, shift)
            for i, j in moves_of(grid):
                s = FlowSDE(noise_level=a).std(grid[i], grid[j], grid).item()
                wanted = expected_std(a, grid[i].item(), grid[j].item(), grid[1].item())
                assert s == pytest.approx(wanted, rel=1e-12)


def check_means(dtype: torch.dtype = torch.float64, tolerance: float = 1e-12) -> None:
    grid = shifted_grid(10, 3.0)
    for a in NOISE_LEVELS:
        kernel = FlowSDE(noise_level=a)
        for i, j in moves_of(grid):
            t, t_next = grid[i].expand(4), grid[j].expand(4)
            s = kernel.std(t, t_next, grid)
            x, v = normal(4, 2, 3, dtype=dtype), normal(4, 2, 3, seed=1, dtype=dtype)
            mean = kernel.mean(x, v, t, t_next, s)
            assert mean.dtype == dtype
            wanted = expected_mean(x, v, grid[i].item(), grid[j].item(), s[0].item())
            np.testing.assert_allclose(mean.numpy(), wanted, rtol=0, atol=tolerance)


def check_log_density() -> None:
    x_next, mean = normal(5, 3, 4), normal(5, 3, 4, seed=1)
    s = torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    density = kernels.log_prob(x_next, mean, s)
    per_value = scipy.stats.norm.logpdf(x_next, mean, s[:, None, None])
    np.testing.assert_allclose(density, per_value.mean(axis=(1, 2)), rtol=1e-12)


def check_kl() -> None:
    mean, other = normal(5, 3, 4), normal(5, 3, 4, seed=1)
    s = torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    first, second = (torch.distributions.Normal(m, s[:, None, None]) for m in (mean, other))
    wanted = torch.distributions.kl_divergence(first, second).mean(dim=(1, 2))
    torch.testing.assert_close(kernels.kl_divergence(mean, other, s), wanted, rtol=1e-12, atol=0)


def test_std_is_the_diffusion_times_the_root_of_the_step():
    """s^2 = a^2 t |dt| / (1 - t), for merged steps too (Flow-GRPO 2505.05470, eq. 12)."""
    check_standard_deviations()


@pytest.mark.parametrize(("steps", "shift"), GRIDS)
@pytest.mark.parametrize("a", NOISE_LEVELS)
def test_first_step_has_std_equal_to_the_noise_level(a, steps, shift):
    """At t = 1 with 1 - t replaced by 1 - sigma_1, s = a bit for bit on every grid (Flow-GRPO)."""
    for dtype in (torch.float64, torch.float32):
        grid = shifted_grid(steps, shift).to(dtype)
        assert FlowSDE(noise_level=a).std(grid[:1], grid[1:2], grid).item() == torch.tensor(
            a, dtype=dtype
        )


def check_clamp_beside_one() -> None:
    grid = shifted_grid(10, 3.0)
    grid[0] = 0.99999994
    std = FlowSDE(noise_level=0.7).std(grid[:1], grid[1:2], grid).item()
    assert std == pytest.approx(0.7, rel=1e-6)


def test_a_grid_that_begins_just_below_one_has_no_giant_step():
    """float32 schedules start at 0.99999994, where 1 - t alone would make s thousands."""
    check_clamp_beside_one()


@pytest.mark.parametrize("a", NOISE_LEVELS)
def test_first_step_has_a_simple_mean(a):
    """At t = 1 the mean is (1 - a^2 / 2) x + (sigma_1 - 1) v (Flow-GRPO)."""
    for steps, shift in GRIDS:
        grid = shifted_grid(steps, shift)
        x, v = normal(3, 4), normal(3, 4, seed=1)
        kernel, t, t_next = FlowSDE(noise_level=a), grid[0].expand(3), grid[1].expand(3)
        mean = kernel.mean(x, v, t, t_next, kernel.std(t, t_next, grid))
        wanted = (1 - a**2 / 2) * x + (grid[1] - 1) * v
        torch.testing.assert_close(mean, wanted, rtol=0, atol=1e-12)


@in_both_precisions
def test_mean_is_one_euler_maruyama_step(dtype, tolerance):
    """x (1 + d dt / 2t) + v (1 + d (1 - t) / 2t) dt with d = s^2 / |dt| (Flow-GRPO, eq. 12)."""
    check_means(dtype, tolerance)


def test_drift_beyond_the_ode_is_half_the_variance_times_the_score():
    """mean = x + dt v + s^2 / 2 score, with the score of the known marginal (2011.13456)."""
    policy, grid = GaussianPolicy(0.7, 0.49, latent_shape=(4,)), shifted_grid(10, 3.0)
    t, t_next = grid[:-1], grid[1:]
    x, kernel = normal(len(t), 4), FlowSDE()
    s = kernel.std(t, t_next, grid)
    v = policy.velocity(x, t, policy.encode(["p"] * len(t)), 1.0).detach()
    score = -(x - (1 - t[:, None]) * 0.7) / ((1 - t) ** 2 * 0.49 + t**2)[:, None]
    wanted = x + (t_next - t)[:, None] * v + s[:, None] ** 2 / 2 * score
    torch.testing.assert_close(kernel.mean(x, v, t, t_next, s), wanted, rtol=0, atol=1e-12)


def check_dance_sde(dtype: torch.dtype = torch.float64, tolerance: float = 1e-12) -> None:
    for eta, (steps, shift) in itertools.product((0.1, 0.3, 1.0), GRIDS):
        grid = shifted_grid(steps, shift)
        t, t_next = grid[:-1], grid[1:]
        kernel = DanceSDE(noise_level=eta)
        s = kernel.std(t, t_next, grid)
        np.testing.assert_allclose(s, eta * np.sqrt((t - t_next).numpy()), rtol=1e-14)
        x, v = normal(len(t), 4, dtype=dtype), normal(len(t), 4, seed=1, dtype=dtype)
        dt, score = (t_next - t)[:, None], -(x + (1 - t[:, None]) * v) / t[:, None]
        wanted = x + dt * (v - eta**2 / 2 * score)
        found = kernel.mean(x, v, t, t_next, s)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=0, atol=tolerance)


@in_both_precisions
def test_dance_sde_has_a_constant_diffusion(dtype, tolerance):
    """s = eta sqrt(|dt|), mean = x + dt [v - eta^2 / 2 score] (DanceGRPO 2505.07818)."""
    check_dance_sde(dtype, tolerance)


def test_dance_sde_is_flow_sde_with_a_constant_diffusion():
    """With a^2 t / (1 - t) = eta^2 the two kernels give the same Gaussian."""
    grid = shifted_grid(10, 3.0)
    for i in range(1, 10):
        t, t_next = grid[i : i + 1], grid[i + 1 : i + 2]
        a = 0.3 * math.sqrt((1 - t.item()) / t.item())
        flow, dance = FlowSDE(noise_level=a), DanceSDE(noise_level=0.3)
        s = flow.std(t, t_next, grid)
        torch.testing.assert_close(s, dance.std(t, t_next, grid), rtol=1e-12, atol=0)
        x, v = normal(1, 4), normal(1, 4, seed=1)
        assert torch.equal(flow.mean(x, v, t, t_next, s), dance.mean(x, v, t, t_next, s))


def check_cps(dtype: torch.dtype = torch.float64, tolerance: float = 1e-12) -> None:
    for eta, (steps, shift) in itertools.product((0.1, 0.7, 0.8, 1.0), GRIDS):
        grid = shifted_grid(steps, shift)
        kernel = CPS(noise_level=eta, floor=0)
        for i, j in moves_of(grid):
            t, t_next = grid[i].expand(3), grid[j].expand(3)
            s = kernel.std(t, t_next, grid)
            wanted = grid[j].item() * math.sin(eta * math.pi / 2)
            np.testing.assert_allclose(s, wanted, rtol=1e-14, atol=0)
            x, v = normal(3, 4, dtype=dtype), normal(3, 4, seed=1, dtype=dtype)
            data, noise = (part.double() for part in (x - grid[i] * v, x + (1 - grid[i]) * v))
            kept = grid[j] * math.cos(eta * math.pi / 2)
            wanted = (1 - grid[j]) * data + kept * noise
            found = kernel.mean(x, v, t, t_next, s)
            assert found.dtype == dtype
            np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=0, atol=tolerance)


@in_both_precisions
def test_cps_keeps_the_noise_at_sigma(dtype, tolerance):
    """s = t' sin(eta pi / 2), mean = (1 - t') x0 + t' cos(eta pi / 2) x1, whose square and s^2 are
    t'^2 together (Flow-CPS 2509.05952); eta = 1 draws all noise anew, and t' = 0 none.
    """
    check_cps(dtype, tolerance)


def test_cps_refuses_steps_that_end_below_its_floor():
    """Their density is nearly singular; the last step, to 0, is deterministic."""
    grid = torch.tensor([1.0, 0.5, 0.1, 0.04, 0.01, 0.0], dtype=torch.float64)
    std = CPS(noise_level=1.0, floor=0.05).std(grid[:-1], grid[1:], grid)
    assert std.isnan().tolist() == [False, False, True, True, False]
    assert std[-1] == 0
    assert not CPS(floor=0).std(grid[:-1], grid[1:], grid).isnan().any()


def check_variance_matched(dtype: torch.dtype = torch.float64, tolerance: float = 1e-12) -> None:
    grid = shifted_grid(16, 3.0)
    kernel, flow = VarianceMatched(noise_level=0.7), FlowSDE(noise_level=0.7)
    for i, j in moves_of(grid):
        t, t_next = grid[i].expand(3), grid[j].expand(3)
        s = kernel.std(t, t_next, grid)
        wanted = min(flow.std(t, t_next, grid)[0].item(), grid[j].item())
        np.testing.assert_allclose(s, wanted, rtol=1e-14)
        x, v = normal(3, 4, dtype=dtype), normal(3, 4, seed=1, dtype=dtype)
        data, noise = (part.double() for part in (x - grid[i] * v, x + (1 - grid[i]) * v))
        wanted = (1 - grid[j]) * data + math.sqrt(grid[j].item() ** 2 - wanted**2) * noise
        found = kernel.mean(x, v, t, t_next, s)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=0, atol=tolerance)


@in_both_precisions
def test_variance_matched_has_the_entropy_of_flow_sde_and_the_mean_of_cps(dtype, tolerance):
    """(1 - t') x0 + sqrt(t'^2 - s^2) x1 with Flow-SDE's s, at most t' (derived)."""
    check_variance_matched(dtype, tolerance)


def test_without_noise_every_kernel_is_the_euler_step():
    """s = 0 gives x + dt v bit for bit, and the ODE's s is 0 (probability-flow ODE, 2011.13456)."""
    grid = shifted_grid(8, 3.0)
    t, t_next = grid[:-1], grid[1:]
    x, v = normal(len(t), 4), normal(len(t), 4, seed=1)
    euler = x + (t_next - t)[:, None] * v
    assert torch.equal(ODE().std(t, t_next, grid), torch.zeros_like(t))
    for kernel in (ODE(), FlowSDE(), DanceSDE(), CPS(), VarianceMatched()):
        assert torch.equal(kernel.mean(x, v, t, t_next, torch.zeros_like(t)), euler)


@pytest.mark.parametrize("kernel", [ODE(), FlowSDE(), DanceSDE(), CPS(), VarianceMatched()])
def test_deterministic_steps_draw_no_noise(kernel):
    """A run with s = 0 throughout is the composition of Euler steps, and asks for no noise."""

    def no_noise(row: Tensor, step: Tensor) -> Tensor:
        raise RuntimeError("noise was asked for")

    policy, grid, x = (
        GaussianPolicy(0.7, 0.49, latent_shape=(4,)),
        shifted_grid(8, 3.0),
        normal(3, 4),
    )
    with torch.no_grad():
        *_, last = integrate(
            policy, kernel, x, policy.encode(["p"]), torch.zeros(3, dtype=torch.long),
            grid.expand(3, -1), torch.zeros(3, 8, dtype=torch.float64), noise=no_noise,
        )  # fmt: skip
        euler = x
        for t, t_next in itertools.pairwise(grid):
            v = policy.velocity(euler, t.expand(3), policy.encode(["p"] * 3), 1.0)
            euler = euler + (t_next - t) * v
    assert torch.equal(last.state, euler)
    assert torch.equal(last.log_prob, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("a", NOISE_LEVELS)
def test_sensitivity_of_the_mean_to_the_velocity(a):
    """dmean/dv = dt (1 + d (1 - t) / 2t) = -s sqrt(|dt| (1 - t) / t) (1/a + a/2) (derived)."""
    t, t_next, s = single_steps(a, shifted_grid(16, 3.0))
    x, v = normal(len(t), 1), normal(len(t), 1, seed=1).requires_grad_()
    FlowSDE(noise_level=a).mean(x, v, t, t_next, s).sum().backward()
    sensitivity, dt = v.grad[:, 0], t_next - t
    diffusion = a**2 * t / (1 - t)
    wanted = dt * (1 + diffusion * (1 - t) / (2 * t))
    torch.testing.assert_close(sensitivity, wanted, rtol=1e-12, atol=0)
    in_stds = (-dt * (1 - t) / t).sqrt() * (1 / a + a / 2)
    torch.testing.assert_close(sensitivity.abs() / s, in_stds, rtol=1e-12, atol=0)


def test_sensitivity_of_the_mean_of_cps_to_the_velocity():
    """dmean/dv = -(1 - t') t + t' cos(eta pi / 2) (1 - t), and that over s (derived)."""
    grid, eta = shifted_grid(16, 3.0), 0.8
    t, t_next, kernel = grid[1:-2], grid[2:-1], CPS(noise_level=eta)
    s = kernel.std(t, t_next, grid)
    x, v = normal(len(t), 1), normal(len(t), 1, seed=1).requires_grad_()
    kernel.mean(x, v, t, t_next, s).sum().backward()
    wanted = -(1 - t_next) * t + t_next * math.cos(eta * math.pi / 2) * (1 - t)
    torch.testing.assert_close(v.grad[:, 0], wanted, rtol=1e-12, atol=1e-14)


def test_the_published_density_of_cps_is_the_true_one_times_twice_the_variance():
    """Up to what the policy can't move: d / dv of -mean (x' - mean)^2 is 2 (x' - mean) c / D, which
    is 2 s^2 times the gradient of the density (Flow-CPS 2509.05952).
    """
    grid, eta, D = shifted_grid(16, 3.0), 0.8, 6
    t, t_next, kernel = grid[1:-2], grid[2:-1], CPS(noise_level=eta)
    s = kernel.std(t, t_next, grid)
    x, x_next = normal(len(t), D), normal(len(t), D, seed=2)
    v = normal(len(t), D, seed=1).requires_grad_()
    mean = kernel.mean(x, v, t, t_next, s)
    (2 * s**2 * kernels.log_prob(x_next, mean, s)).sum().backward()
    c = -(1 - t_next) * t + t_next * math.cos(eta * math.pi / 2) * (1 - t)
    wanted = 2 * (x_next - mean.detach()) * (c / D)[:, None]
    torch.testing.assert_close(v.grad, wanted, rtol=1e-10, atol=1e-12)


def test_log_density_is_that_of_a_gaussian_per_dimension():
    """log_prob is the mean over D of log N(x'; mean, s^2) (Flow-GRPO 2505.05470)."""
    check_log_density()


def test_log_density_at_the_mean():
    """At x' = mean it is -log s - log(2 pi) / 2."""
    s = torch.tensor([0.01, 0.3, 1.0, 2.0], dtype=torch.float64)
    at_mean = kernels.log_prob(normal(4, 7), normal(4, 7), s)
    torch.testing.assert_close(at_mean, -s.log() - 0.5 * math.log(2 * math.pi), rtol=0, atol=1e-12)


@pytest.mark.parametrize("s", [0.05, 0.7])
def test_mean_negative_log_density_is_the_entropy(s):
    """E[-log_prob] = log(2 pi e s^2) / 2 = entropy, to 4 standard errors 1 / sqrt(2 D n)."""
    n, D = 400, 50
    numbers = torch.arange(n)
    eps = gaussian(
        (D,), Address(0), Stream.STEP, torch.zeros(n, dtype=torch.long), numbers, numbers
    )
    mean, std = normal(n, D), torch.full((n,), s, dtype=torch.float64)
    average = -kernels.log_prob(mean + s * eps.double(), mean, std).mean().item()
    closed_form = 0.5 * math.log(2 * math.pi * math.e * s**2)
    assert average == pytest.approx(closed_form, abs=4 / math.sqrt(2 * D * n))
    entropy = kernels.entropy(std[:1]).item()
    assert entropy == pytest.approx(closed_form, abs=1e-12)
    assert entropy == pytest.approx(scipy.stats.norm(scale=s).entropy(), abs=1e-12)


def test_gradient_of_the_log_density():
    """d log_prob / dv = (x' - mean) c / (s^2 D) with c = dmean/dv (Flow-SDE, derived)."""
    D, a = 6, 0.7
    t, t_next, s = single_steps(a, shifted_grid(10, 3.0))
    x, x_next = normal(len(t), D), normal(len(t), D, seed=2)
    v = normal(len(t), D, seed=1).requires_grad_()
    mean = FlowSDE(noise_level=a).mean(x, v, t, t_next, s)
    kernels.log_prob(x_next, mean, s).sum().backward()
    c = (t_next - t) * (1 + a**2 / 2)
    wanted = (x_next - mean.detach()) * (c / s**2 / D)[:, None]
    torch.testing.assert_close(v.grad, wanted, rtol=1e-11, atol=1e-12)


def test_log_density_and_kl_are_means_over_the_latent():
    """Repeating the latent leaves log_prob and KL unchanged; a sum over D would double them."""
    x_next, mean, other = normal(3, 4), normal(3, 4, seed=1), normal(3, 4, seed=2)
    s = torch.full((3,), 0.3, dtype=torch.float64)
    twice = [tensor.repeat(1, 2) for tensor in (x_next, mean, other)]
    for once, doubled in (
        (kernels.log_prob(x_next, mean, s), kernels.log_prob(twice[0], twice[1], s)),
        (kernels.kl_divergence(mean, other, s), kernels.kl_divergence(twice[1], twice[2], s)),
    ):
        torch.testing.assert_close(doubled, once, rtol=1e-12, atol=0)


def test_kl_is_that_of_two_gaussians_per_dimension():
    """KL = mean over D of (mean - mean')^2 / (2 s^2), as torch.distributions has it."""
    check_kl()


def clamped_one_point_late(kernel: FlowSDE, t: Tensor, t_next: Tensor, base_grid: Tensor) -> Tensor:
    padded = torch.cat([base_grid, base_grid[-1:]])
    return FLOW_SDE_STD(kernel, t, t_next, padded[1:])


def clamped_at_one_alone(kernel: FlowSDE, t: Tensor, t_next: Tensor, base_grid: Tensor) -> Tensor:
    room = torch.where(t == 1, 1 - base_grid[1], 1 - t)
    return kernel.noise_level * torch.sqrt(t * (t - t_next) / room)


def opposite_score(
    kernel: FlowSDE, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, s: Tensor
) -> Tensor:
    return 2 * ODE().mean(x, v, t, t_next, s) - FLOW_SDE_MEAN(kernel, x, v, t, t_next, s)


def with_another_sine(kernel: CPS, t: Tensor, t_next: Tensor, base_grid: Tensor) -> Tensor:
    return CPS_STD(kernel, t, t_next, base_grid) * 1.01


def less_noise_kept(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, s: Tensor) -> Tensor:
    return PRESERVING(x, v, t, t_next, 1.1 * s)


def twice_the_correction(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, s: Tensor) -> Tensor:
    return CORRECTED(x, v, t, t_next, math.sqrt(2) * s)


def summed(x_next: Tensor, mean: Tensor, s: Tensor) -> Tensor:
    return LOG_PROB(x_next, mean, s) * mean[0].numel()


def without_the_half(mean: Tensor, other: Tensor, s: Tensor) -> Tensor:
    return 2 * KL(mean, other, s)


FLOW_SDE_STD, FLOW_SDE_MEAN = FlowSDE.std, FlowSDE.mean
LOG_PROB, KL = kernels.log_prob, kernels.kl_divergence
CPS_STD, PRESERVING, CORRECTED = CPS.std, kernels.coefficient_preserving, kernels.score_corrected


@pytest.mark.parametrize(
    ("check", "owner", "name", "mutant"),
    [
        (check_standard_deviations, FlowSDE, "std", clamped_one_point_late),
        (check_clamp_beside_one, FlowSDE, "std", clamped_at_one_alone),
        (check_means, FlowSDE, "mean", opposite_score),
        (check_cps, CPS, "std", with_another_sine),
        (check_cps, kernels, "coefficient_preserving", less_noise_kept),
        (check_variance_matched, kernels, "coefficient_preserving", less_noise_kept),
        (check_dance_sde, kernels, "score_corrected", twice_the_correction),
        (check_log_density, kernels, "log_prob", summed),
        (check_kl, kernels, "kl_divergence", without_the_half),
    ],
)
def test_checks_reject_a_wrong_kernel(check, owner, name, mutant, monkeypatch):
    """Each check of this file fails on code with one deliberate error."""
    monkeypatch.setattr(owner, name, mutant)
    with pytest.raises(AssertionError):
        check()
