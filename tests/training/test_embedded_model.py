"""The shipped recipes on the embedded model, on tiny budgets."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import entroflow
from entroflow.checkpoints import read_tensors
from entroflow.policies.shapes.policy import WEIGHTS
from entroflow.runs.folder import EVALUATION
from random_network import random_weights
from tiny_run import GROUP, PROMPTS, ROLLOUTS, brightness, final_tensors, lines


def test_flow_grpo_runs_as_shipped(tmp_path):
    """The recipe but for its budget, from the shipped weights: KL and two minibatches included."""
    tiny = [
        f"prompts.per_iteration={PROMPTS}", f"allocation.group_size={GROUP}", "sampling.steps=4",
        "evaluation.images=2", "evaluation.test_images=1", "evaluation.steps=2",
        "run.iterations=2", "run.evaluate_every=2", "reward.value=graded",
    ]  # fmt: skip
    folder = entroflow.train("flow_grpo", tiny, run=tmp_path / "run")
    clip, trained = 6.6 / 3072, 3 * ROLLOUTS
    found = folder.metrics()
    assert [line["iteration"] for line in found] == [0, 1, 2]
    assert found[0]["policy/clip_range"] == pytest.approx(clip, rel=1e-12)
    for n, line in enumerate(found):
        # Four steps of sampling; at three the reference, and a pass forward and backward.
        assert line["ledger/network_evaluations"] == n * (4 * ROLLOUTS + 2 * trained)
        assert line["ledger/weighted_evaluations"] == n * (4 * ROLLOUTS + trained + 3 * trained)
        assert line["ledger/reward_calls"] == n * ROLLOUTS
        assert line["ledger/optimizer_steps"] == 2 * n
    for line in found[1:]:
        assert line["policy/transitions"] == trained
        assert line["policy/skipped"] == 0
        assert line["by_step"]["loss"].keys() == {"0", "1", "2"}
        assert 0 < line["reward/std"] < 1
        assert line["policy/ratio_max_deviation"] < 0.1 * clip
        assert line["policy/gradient_norm"] > 0
    assert found[1]["policy/kl"] == 0
    assert found[2]["policy/kl"] > 0
    assert "eval/score" in found[0]
    assert "eval/score" in found[2]
    assert (folder.path / EVALUATION).exists()
    base, tensors = read_tensors(WEIGHTS), final_tensors(folder)
    for part in ("live", "ema"):
        assert tensors[part].keys() == base.keys()
        assert all(value.isfinite().all() for value in tensors[part].values())
        assert any(not torch.equal(tensors[part][key], base[key].float()) for key in base)


def test_the_embedded_model_resumes_bit_equal(tmp_path):
    """The quickstart recipe in bfloat16, with its own evaluation and the final comparison."""
    save_file(random_weights(), tmp_path / "base.safetensors")
    tiny = [
        f"policy.weights={tmp_path / 'base.safetensors'}",
        f"prompts.per_iteration={PROMPTS}", f"allocation.group_size={GROUP}", "sampling.steps=3",
        "exploration.size=1", "evaluation.images=2", "evaluation.test_images=1",
        "evaluation.steps=1", "run.iterations=2", "run.evaluate_every=2", "run.checkpoint_every=5",
        "run.keep_checkpoints=1", "reward.value=graded",
    ]  # fmt: skip
    whole = entroflow.train("quickstart", tiny, run=tmp_path / "whole")
    parts = entroflow.train("quickstart", tiny, run=tmp_path / "parts", stop_after=1)
    assert not (parts.path / EVALUATION).exists()
    parts = entroflow.resume(parts.path)
    first, second = final_tensors(whole), final_tensors(parts)
    for part, tensors in first.items():
        assert second[part].keys() == tensors.keys()
        assert all(torch.equal(second[part][key], value) for key, value in tensors.items())
    # NaN, where there was nothing to measure, equals NaN here.
    assert json.dumps(lines(parts)) == json.dumps(lines(whole))
    one, other = (json.loads((run.path / EVALUATION).read_text()) for run in (whole, parts))
    assert one["cost"].pop("seconds").keys() == other["cost"].pop("seconds").keys()
    assert one == other
    base = read_tensors(tmp_path / "base.safetensors")
    assert any(not torch.equal(first["live"][key], base[key]) for key in base)


@pytest.mark.slow
@pytest.mark.parametrize("hacked", [True, False])
def test_a_hackable_reward_trips_the_sentinel_and_the_default_run_does_not(tmp_path, hacked):
    """Quickstart for a few iterations, and with nothing but brightness as its reward."""
    short = ["run.iterations=8", "run.evaluate_every=4", "evaluation.test_images=2"]
    faster = ["optimizer.learning_rate=2e-3", "prompts.per_iteration=6", "evaluation.images=16"]
    folder = entroflow.train(
        "quickstart", short + faster * hacked, reward=brightness if hacked else None,
        run=tmp_path / "run",
    )  # fmt: skip
    found = [line for line in folder.metrics() if "eval/score" in line]
    if hacked:
        assert found[-1]["eval/reward"] > found[0]["eval/reward"]
        assert "brightness" in found[-1]["hacking"]
        assert found[-1]["drift/brightness"] > 1.5
    else:
        assert max(abs(found[-1][key]) for key in found[-1] if key.startswith("drift/")) < 1
        assert not any("hacking" in line for line in found)
