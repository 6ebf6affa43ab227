"""What a run checks of itself, warns of, or refuses."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from entroflow.errors import InputError
from entroflow.objectives import transitions as transitions_module
from entroflow.sampling.kernels import log_prob
from entroflow.training.trainer import Trainer
from tiny_run import PixelPolicy, recipe, train

NAMED = ("dtype", "guidance", "grid", "batch shape", "grad mode")


def test_a_plan_without_noise_is_wrong_input(tmp_path):
    """With the ODE there is nothing to train on, and that shows before anything is sampled."""
    with pytest.raises(InputError, match="no step of the plan is stochastic"):
        train(tmp_path / "run", kernel={"type": "ode"})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("share", "warns"), [(0.05, False), (0.2, True), (-0.2, True)])
def test_the_ratio_check_warns_beyond_a_tenth_of_the_clip_range(monkeypatch, caplog, share, warns):
    """log_prob of the update is off by a share of the clip range; a warning says what to check."""
    clip = 1e-2
    monkeypatch.setattr(
        transitions_module, "log_prob", lambda *given: log_prob(*given) + share * clip
    )
    trainer = Trainer(recipe(objective={"clip_range": clip}), PixelPolicy())
    with caplog.at_level(logging.WARNING):
        metrics = trainer.step()
    deviation = abs(math.expm1(share * clip))
    assert metrics["policy/ratio_max_deviation"] == pytest.approx(deviation, rel=1e-3)
    assert bool(caplog.records) == warns
    if warns:
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        message = record.getMessage()
        assert "iteration 1" in message
        assert all(name in message for name in NAMED)


def test_the_ratio_check_sees_a_network_that_changes_with_grad_mode(caplog):
    """As one with dropout or another kernel under autograd would."""
    policy = PixelPolicy()
    velocity = policy.velocity
    policy.velocity = lambda *given: velocity(*given) + 0.3 * torch.is_grad_enabled()
    Trainer(recipe(objective={"clip_range": 1e-3, "kl": 0.0}), policy).step()
    assert ["policy ratio is off" in record.getMessage() for record in caplog.records] == [True]


def test_the_kl_check_sees_a_policy_that_computes_otherwise_as_the_reference(caplog):
    """While the weights are the same: once they have moved, the KL is no fault."""
    policy = PixelPolicy()
    velocity = policy.velocity
    policy.velocity = lambda *given: velocity(*given) + (policy.weights._active == "reference")
    trainer = Trainer(recipe(), policy)
    trainer.step()
    assert ["KL to the reference" in record.getMessage() for record in caplog.records] == [True]
    trainer.step()
    assert len(caplog.records) == 1


def test_a_policy_may_come_with_another_reference(caplog):
    """The KL is what it is from the start, and no fault."""
    policy = PixelPolicy()
    policy.weights.keep("reference", {"shift": torch.full((3, 2, 2), 2.0)})
    trainer = Trainer(recipe(), policy)
    assert trainer.step()["policy/kl"] > trainer.recipe.objective.clip(trainer.dimensions)
    assert not caplog.records


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_checks_are_silent_where_nothing_is_wrong(caplog, dtype):
    settings = {"sampling": {"state_dtype": dtype}, "objective": {"clip_range": 1e-4}}
    trainer = Trainer(recipe(**settings), PixelPolicy())
    for _ in range(3):
        assert trainer.step()["policy/ratio_max_deviation"] == 0
    assert not caplog.records


def test_weights_that_are_not_finite_stop_the_run(monkeypatch):
    """A gradient that is not finite is not applied."""
    trainer = Trainer(recipe(), PixelPolicy())
    monkeypatch.setattr(transitions_module, "log_prob", lambda *given: log_prob(*given) * torch.inf)
    with pytest.raises(InputError, match=r"gradient of iteration .* is not finite"):
        trainer.step()
    assert torch.equal(trainer.policy.shift.detach(), torch.zeros(3, 2, 2, dtype=torch.float64))
