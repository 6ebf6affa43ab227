"""Runs from end to end on tiny budgets: stopping, resuming, one's own parts, and learning."""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import entroflow
from entroflow.checkpoints import CheckpointError, read_tensors
from entroflow.credit.terminal import Terminal
from entroflow.drawing import open_policy
from entroflow.errors import InputError
from entroflow.evaluation.base import Evaluated, SkillScore
from entroflow.objectives import update as update_module
from entroflow.recipe import build_recipe
from entroflow.rewards.base import FunctionReward, Scores, Status
from entroflow.runs import EVALUATION, METRICS, RunFolder
from entroflow.sampling.kernels import log_prob
from entroflow.trainer import Trainer
from gaussian_policy import GaussianPolicy
from random_network import random_weights

HERE = __name__
"""Components of this file are chosen in recipes by their dotted path."""

PROMPTS, GROUP = 2, 4
ROLLOUTS = PROMPTS * GROUP


# --- a policy, an evaluation, a credit and rewards of one's own -----------------------------------


class PixelPolicy(GaussianPolicy):
    """Images of 2 x 2 pixels whose values are those of the latent."""

    def __init__(self, shift=0.0):
        super().__init__(0.5, 0.05, latent_shape=(3, 2, 2))
        with torch.no_grad():
            self.shift.fill_(shift)
        self.weights.keep("reference")

    def decode(self, latents):
        return latents.float()


class Shift:
    """Judges a policy by the mean of its shift, which no noise hides."""

    def run(self, policy, *, seed, batch_size, reward=None, ledger=None):
        score = policy.shift.detach().mean().item()
        overall = SkillScore(score, score, score, score, images=2)
        images = torch.linspace(0, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
        return Evaluated(
            {"overall": overall}, score, {"diversity": 0.5}, images, ["a circle", "a ring"],
            [True, False],
        )  # fmt: skip


class Scripted(Shift):
    """Reports the given rewards one after the other; the scores stay those of the shift."""

    def __init__(self, scores):
        self.scores = iter(scores)

    def run(self, policy, **options):
        return replace(super().run(policy, **options), reward=next(self.scores))


class Blind(Shift):
    """Shows no examples."""

    def run(self, policy, **options):
        found = super().run(policy, **options)
        return replace(found, images=found.images[:0], captions=[], passed=[])


class RunningScale:
    """Terminal credit divided by a running mean of rewards: a component with memory."""

    def __init__(self):
        self.mean = 1.0

    def complete(self, plan):
        return plan

    def advantages(self, rollouts, scores):
        self.mean = 0.7 * self.mean + 0.3 * scores.values.abs().mean().item()
        return Terminal(scale="none").advantages(rollouts, scores) / self.mean

    def state(self):
        return {"mean": self.mean}

    def load_state(self, state):
        self.mean = state["mean"]


def brightness(images, prompts, metadata):
    return images.flatten(1).mean(dim=1).tolist()


SCORED = []


def interrupted_in_iteration_4(images, prompts, metadata):
    SCORED.append(len(images))
    if sum(SCORED) > 3 * ROLLOUTS:
        raise KeyboardInterrupt
    return brightness(images, prompts, metadata)


def recipe(**sections):
    """A tiny recipe for `PixelPolicy`."""
    settings = {
        "prompts": {"per_iteration": PROMPTS},
        "allocation": {"group_size": GROUP},
        "sampling": {"steps": 4, "batch_size": 4},
        "exploration": {"type": "window", "size": 2},
        "objective": {"clip_range": 0.2, "minibatches": 2, "kl": 0.01},
        "optimizer": {"learning_rate": 0.02, "warm_up": 3, "micro_batch": 5, "ema": 0.5},
        "evaluation": {"type": f"{HERE}.Shift"},
        "reward": {"type": f"{HERE}.brightness"},
        "run": {"iterations": 3, "evaluate_every": 2, "checkpoint_every": 2},
    }
    for section, fields in sections.items():
        settings[section] = {**settings.get(section, {}), **fields}
    return build_recipe(settings, "tiny")


def train(folder, stop_after=None, reward=None, watch=None, policy=None, **sections):
    """A run by the tiny recipe, from a file beside the run folder."""
    path = folder.with_suffix(".yaml")
    path.write_text(recipe(**sections).to_yaml(), encoding="utf-8")
    return entroflow.train(
        path, policy=policy or PixelPolicy(), reward=reward, run=folder, stop_after=stop_after,
        watch=watch,
    )  # fmt: skip


def lines(folder):
    """The metrics without their times."""
    found = RunFolder.open(folder.path).metrics()
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def final_tensors(folder):
    latest = folder.latest()
    return {
        part: read_tensors(latest / f"{part}.safetensors") for part in ("live", "ema", "optimizer")
    }


def assert_same_run(one, other):
    assert other.latest().name == one.latest().name
    first, second = final_tensors(one), final_tensors(other)
    for part, tensors in first.items():
        assert tensors
        assert second[part].keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(second[part][key], value), (part, key)
    assert lines(other) == lines(one)
    for folder in ("images", "examples"):
        names = sorted(path.name for path in (one.path / folder).iterdir())
        assert sorted(path.name for path in (other.path / folder).iterdir()) == names


# --- stopping and resuming ------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_stopped_and_resumed_is_one_in_one_go(tmp_path, stop):
    """Weights, average, optimizer state and metrics, at a checkpoint and between two; with memory
    in a component, warm-up, minibatches in random order and KL.
    """
    sections = {"run": {"iterations": 4}, "credit": {"type": f"{HERE}.RunningScale"}}
    whole = train(tmp_path / "whole", **sections)
    parts = train(tmp_path / "parts", stop_after=stop, **sections)
    assert parts.metrics()[-1]["iteration"] == stop
    parts = entroflow.resume(parts.path, policy=PixelPolicy())
    assert_same_run(whole, parts)
    assert final_tensors(whole)["optimizer"]["0.step"].item() == 8
    assert [line["iteration"] for line in lines(whole)] == [0, 1, 2, 3, 4]


def test_a_crash_is_made_good(tmp_path):
    """What was written after the last checkpoint is forgotten and written again."""
    sections = {"run": {"iterations": 5}}
    whole = train(tmp_path / "whole", **sections)
    SCORED.clear()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "crashed", reward=interrupted_in_iteration_4, **sections)
    crashed = RunFolder.open(tmp_path / "crashed")
    assert crashed.latest().name == "00000002"
    assert crashed.metrics()[-1]["iteration"] == 3
    crashed = entroflow.resume(crashed.path, policy=PixelPolicy(), reward=brightness)
    assert_same_run(whole, crashed)


def test_an_error_of_the_watcher_leaves_the_iteration_saved(tmp_path):
    def watch(metrics, evaluated):
        if metrics["iteration"] == 1:
            raise KeyError("watcher")

    with pytest.raises(KeyError, match="watcher"):
        train(tmp_path / "run", watch=watch)
    folder = RunFolder.open(tmp_path / "run")
    assert folder.latest().name == "00000001"
    folder = entroflow.resume(folder.path, policy=PixelPolicy())
    assert_same_run(train(tmp_path / "whole"), folder)


def test_a_run_resumed_from_its_start_is_one_in_one_go(tmp_path):
    """The first checkpoint is that of iteration 0; a crash before the second goes back to it."""
    whole = train(tmp_path / "whole")
    parts = train(tmp_path / "parts", stop_after=0)
    parts = entroflow.resume(parts.path, policy=PixelPolicy())
    assert_same_run(whole, parts)


def test_a_crash_between_checkpoint_and_metrics_loses_no_line(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    append = RunFolder.append_metrics

    def crash(self, line):
        if line["iteration"] == 2:
            raise KeyboardInterrupt
        append(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", crash)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "crashed")
    crashed = entroflow.resume(tmp_path / "crashed", policy=PixelPolicy())
    assert [line["iteration"] for line in lines(crashed)] == [0, 1, 2, 3]
    assert_same_run(whole, crashed)


def test_the_embedded_model_resumes_bit_equal(tmp_path):
    """The quickstart recipe in bfloat16, with its own evaluation and the final comparison."""
    save_file(random_weights(), tmp_path / "base.safetensors")
    tiny = [
        f"policy.weights={tmp_path / 'base.safetensors'}",
        f"prompts.per_iteration={PROMPTS}", f"allocation.group_size={GROUP}", "sampling.steps=3",
        "exploration.size=1", "evaluation.images_per_skill=2", "evaluation.test_images_per_skill=1",
        "evaluation.steps=1", "run.iterations=2", "run.evaluate_every=2", "run.checkpoint_every=5",
        "run.keep_checkpoints=1", "reward.credit=graded",
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
    assert (parts.path / EVALUATION).read_text() == (whole.path / EVALUATION).read_text()
    base = read_tensors(tmp_path / "base.safetensors")
    assert any(not torch.equal(first["live"][key], base[key]) for key in base)


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path):
    one, two = train(tmp_path / "one"), train(tmp_path / "two")
    assert_same_run(one, two)
    other = train(tmp_path / "other", run={"seed": 1})
    for mine, theirs in zip(lines(one)[1:], lines(other)[1:], strict=True):
        assert mine["reward/mean"] != theirs["reward/mean"]
    live = (final_tensors(run)["live"]["shift"] for run in (one, other))
    assert not torch.equal(*live)


def test_a_resumed_run_may_become_longer(tmp_path):
    """Only `run` may change, and the change is written down."""
    short = train(tmp_path / "short", run={"iterations": 2})
    longer = entroflow.resume(short.path, ["run.iterations=4"], policy=PixelPolicy())
    assert_same_run(train(tmp_path / "whole", run={"iterations": 4}), longer)
    assert "iterations: 4" in (longer.path / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    "override",
    ["optimizer.learning_rate=1", "objective.kl=1", "run.seed=1", "kernel.type=ode", "running=1"],
)
def test_resume_refuses_what_would_be_another_run(tmp_path, override):
    folder = train(tmp_path / "run", stop_after=1)
    before = {path: path.read_bytes() for path in folder.path.glob("*.*")}
    with pytest.raises(InputError, match="a resumed run can change keys of 'run' except the seed"):
        entroflow.resume(folder.path, [override], policy=PixelPolicy())
    assert {path: path.read_bytes() for path in folder.path.glob("*.*")} == before


def test_resume_refuses_other_base_weights(tmp_path):
    folder = train(tmp_path / "run", stop_after=1)
    with pytest.raises(CheckpointError, match="other base weights"):
        entroflow.resume(folder.path, policy=PixelPolicy(shift=0.1))
    assert folder.metrics()[-1]["iteration"] == 1


def test_resume_refuses_a_folder_without_a_run_or_checkpoint(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        entroflow.resume(tmp_path)
    folder = RunFolder.create(tmp_path / "run", recipe().to_yaml())
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        entroflow.resume(folder.path, policy=PixelPolicy())


# --- checkpoints that stay ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "scores", "best"),
    [
        (1, [0.1, 0.9, 0.5, 0.4, 0.3, 0.2], 1),
        (2, [0.1, 0.2, 0.9, 0.4, 0.3, 0.2], 2),
        (3, [0.9, 0.1, 0.2, 0.3, 0.4, 0.9], 0),
        (9, [0.1, 0.2, 0.3, 0.4, 0.5, 0.4], 4),
    ],
)
def test_the_latest_checkpoints_and_the_best_stay(tmp_path, keep, scores, best):
    """A tie is no improvement."""
    folder = train(
        tmp_path / "run",
        run={
            "iterations": 5, "evaluate_every": 1, "checkpoint_every": 1, "keep_checkpoints": keep
        },
        evaluation={"type": f"{HERE}.Scripted", "scores": scores},
    )  # fmt: skip
    kept = {int(path.name) for path in folder.all_checkpoints()}
    assert kept == set(range(max(0, 6 - keep), 6)) | {best}
    assert int(folder.best().name) == best
    assert json.loads((folder.checkpoints / "best.json").read_text())["score"] == scores[best]


def test_an_outdated_best_goes_when_the_last_iteration_is_the_best(tmp_path):
    folder = train(
        tmp_path / "run",
        run={"iterations": 2, "evaluate_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1},
        evaluation={"type": f"{HERE}.Scripted", "scores": [0.1, 0.2, 0.3]},
    )
    assert [path.name for path in folder.all_checkpoints()] == ["00000002"]


def test_the_best_is_remembered_over_a_pause(tmp_path):
    """A worse score after resuming does not become the best."""
    scores = [0.1, 0.9, 0.5, 0.4, 0.3, 0.2]
    settings = {"iterations": 5, "evaluate_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1}
    evaluation = {"type": f"{HERE}.Scripted", "scores": scores}
    folder = train(tmp_path / "run", stop_after=2, run=settings, evaluation=evaluation)
    folder = entroflow.resume(folder.path, policy=PixelPolicy())
    assert int(folder.best().name) == 1
    assert {int(path.name) for path in folder.all_checkpoints()} == {1, 5}


def test_the_average_follows_the_weights_and_is_what_is_evaluated(tmp_path):
    """ema <- d ema + (1 - d) live after every iteration, from checkpoints of all of them."""
    folder = train(
        tmp_path / "run",
        run={
            "iterations": 4, "evaluate_every": 1, "checkpoint_every": 1, "keep_checkpoints": 9
        },
    )  # fmt: skip
    average = torch.zeros(3, 2, 2, dtype=torch.float64)
    for n, line in enumerate(folder.metrics()):
        checkpoint = folder.checkpoints / f"{n:08d}"
        live = read_tensors(checkpoint / "live.safetensors")["shift"]
        average = 0.5 * average + 0.5 * live
        ema = read_tensors(checkpoint / "ema.safetensors")["shift"]
        torch.testing.assert_close(ema, average, rtol=0, atol=1e-15)
        assert line["eval/score"] == pytest.approx(average.mean().item(), abs=1e-15)
    assert average.abs().min() > 0


# --- rewards of one's own -------------------------------------------------------------------------


def test_a_function_is_a_reward(tmp_path):
    """Called with images, prompts and metadata of equal length; its mean is what is reported."""
    prompts = tmp_path / "prompts.jsonl"
    records = [{"prompt": f"prompt {n}", "level": n} for n in range(PROMPTS)]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    seen = []

    def reward(images, texts, metadata):
        values = [
            image.mean().item() + entry["level"]
            for image, entry in zip(images, metadata, strict=True)
        ]
        seen.extend(zip(texts, (entry["level"] for entry in metadata), values, strict=True))
        metadata[0].clear()
        images.zero_()
        return np.array(values)

    folder = train(
        tmp_path / "run", reward=reward, prompts={"type": "jsonl", "path": str(prompts)},
        run={"iterations": 2},
    )  # fmt: skip
    assert Counter(text for text, _, _ in seen) == {f"prompt {n}": 2 * GROUP for n in range(2)}
    assert all(text == f"prompt {level}" for text, level, _ in seen)
    for n, line in enumerate(folder.metrics()[1:]):
        values = [value for _, _, value in seen[n * ROLLOUTS : (n + 1) * ROLLOUTS]]
        assert line["reward/mean"] == pytest.approx(np.mean(values), rel=1e-12)
        assert line["reward/failed"] == 0


def sampled(reward, **sections):
    """One iteration up to the advantages: scores, advantages of the rows, and the trainer."""
    trainer = Trainer(recipe(**sections), PixelPolicy(), FunctionReward(reward))
    rollouts, scores = trainer._roll_out(trainer.recipe.prompts.batch(0, 0))
    return trainer, scores, trainer.recipe.credit.advantages(rollouts, scores)[:, 0]


@pytest.mark.parametrize("failure", ["raises", math.nan, math.inf, -math.inf])
def test_failed_rewards_are_masked_and_counted(failure, caplog):
    """Whether a call of four images raises or an image has no finite value: the others are scored
    as ever, and advantages come from them alone.
    """
    calls = []

    def reward(images, prompts, metadata):
        calls.append(len(images))
        if failure == "raises" and len(calls) == 2:
            raise ZeroDivisionError("of all things")
        values = brightness(images, prompts, metadata)
        return [failure, *values[1:]] if failure != "raises" else values

    _, fine, _ = sampled(brightness)
    calls.clear()
    trainer, scores, advantages = sampled(reward)
    failed = [4, 5, 6, 7] if failure == "raises" else [0, 4]
    assert calls == [4, 4]
    assert [row for row, status in enumerate(scores.statuses) if status != "ok"] == failed
    assert {scores.statuses[row] for row in failed} == {
        "error" if failure == "raises" else "unparsed"
    }
    kept = [row for row in range(ROLLOUTS) if row not in failed]
    assert scores.values[failed].isnan().all()
    assert torch.equal(scores.values[kept], fine.values[kept])
    assert advantages[failed].isnan().all()
    for group in (kept[: len(kept) // 2], kept[len(kept) // 2 :]) if len(failed) == 2 else (kept,):
        values = fine.values[group].numpy()
        wanted = (values - values.mean()) / (values.std() + 1e-4)
        np.testing.assert_allclose(advantages[group].numpy(), wanted, rtol=0, atol=1e-12)
    calls.clear()
    metrics = trainer.step()
    assert metrics["reward/failed"] == len(failed)
    assert metrics["reward/mean"] == pytest.approx(fine.values[kept].mean().item(), rel=1e-12)
    assert ("of all things" in caplog.text) == (failure == "raises")


def test_a_run_goes_on_with_failures(tmp_path):
    def reward(images, prompts, metadata):
        return [math.nan, *brightness(images[1:], prompts, metadata)]

    folder = train(tmp_path / "run", reward=reward)
    assert [line["reward/failed"] for line in folder.metrics()[1:]] == [2, 2, 2]
    assert all(math.isfinite(line["reward/mean"]) for line in folder.metrics()[1:])
    assert final_tensors(folder)["live"]["shift"].isfinite().all()


def test_a_reward_that_always_fails_ends_the_run_loudly(tmp_path, caplog):
    def reward(images, prompts, metadata):
        raise ConnectionError("the judge is away")

    with pytest.raises(InputError, match="every reward of iteration 1 failed"):
        train(tmp_path / "run", reward=reward)
    assert "the judge is away" in caplog.text
    folder = RunFolder.open(tmp_path / "run")
    assert [line["iteration"] for line in folder.metrics()] == [0]
    assert folder.latest().name == "00000000"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda images: [1.0], lambda images: [1.0] * (len(images) + 1), lambda images: 1.0,
        lambda images: torch.ones(len(images), 1), lambda images: [],
    ],
)  # fmt: skip
def test_the_wrong_number_of_values_is_wrong_input(tmp_path, wrong):
    def reward(images, prompts, metadata):
        return wrong(images)

    with pytest.raises(InputError, match=r"must return one number per image: 4 images.* shape"):
        train(tmp_path / "run", reward=reward)


@pytest.mark.parametrize("returned", [None, "good", [None] * 4, ["good"] * 4])
def test_values_that_are_no_numbers_are_wrong_input(returned):
    with pytest.raises(InputError, match="number"):
        sampled(lambda images, prompts, metadata: returned)


def test_a_reward_of_a_network_needs_no_no_grad():
    """Its parameters want gradients of their own; the update must not run back into them."""
    judge = torch.nn.Linear(12, 1)
    trainer, scores, advantages = sampled(lambda images, *_: judge(images.flatten(1))[:, 0])
    assert not scores.values.requires_grad
    assert not advantages.requires_grad
    trainer.step()
    assert judge.weight.grad is None


class Brightness:
    def score(self, images, prompts):
        values = images.double().flatten(1).mean(dim=1)
        return Scores(values, (Status.OK,) * len(images))


def test_an_object_with_a_score_is_a_reward(tmp_path):
    """The same as the function; it is named in the recipe by its class."""
    folder = train(tmp_path / "run", reward=Brightness(), run={"iterations": 1})
    (line,), (same,) = (
        lines(run)[1:] for run in (folder, train(tmp_path / "same", run={"iterations": 1}))
    )
    assert line["reward/mean"] == pytest.approx(same["reward/mean"], rel=1e-6)
    assert f"type: {HERE}.Brightness" in (folder.path / "recipe.yaml").read_text()


# --- what a run leaves behind of parts that were passed in ----------------------------------------


class NeedsShift(PixelPolicy):
    def __init__(self, shift):
        super().__init__(shift)


@pytest.mark.parametrize("own", ["lambda", "closure", "policy with arguments"])
def test_a_run_of_passed_parts_resumes_with_passed_parts(tmp_path, own):
    """Their names in recipe.yaml need not lead anywhere: the objects are passed again."""

    def closure(images, prompts, metadata):
        return brightness(images, prompts, metadata)

    rewards = {"lambda": lambda images, *_: images.flatten(1).mean(1), "closure": closure}
    parts = {"reward": rewards.get(own, brightness)}

    def policy():
        return NeedsShift(0.0) if own == "policy with arguments" else PixelPolicy()

    folder = train(tmp_path / "run", stop_after=1, policy=policy(), **parts)
    folder = entroflow.resume(folder.path, policy=policy(), **parts)
    assert folder.metrics()[-1]["iteration"] == 3


def test_a_run_does_not_resume_with_another_reward_or_policy(tmp_path):
    folder = train(tmp_path / "run", stop_after=1)
    own = rf"policy {HERE}.PixelPolicy, not {HERE}.NeedsShift"
    with pytest.raises(InputError, match=own):
        entroflow.resume(folder.path, policy=NeedsShift(0.0), reward=brightness)
    own = rf"reward {HERE}.brightness, not {HERE}.Brightness"
    with pytest.raises(InputError, match=own):
        entroflow.resume(folder.path, policy=PixelPolicy(), reward=Brightness())
    assert folder.metrics()[-1]["iteration"] == 1


def test_a_passed_policy_can_not_be_opened_from_the_command_line(tmp_path):
    """It is no settings to build a policy from, and the message says so."""
    folder = train(tmp_path / "run", stop_after=1)
    with pytest.raises(InputError, match="trained with a policy object from Python"):
        open_policy(folder.path, "ema")


def test_a_run_with_a_component_beside_its_recipe_resumes(tmp_path, monkeypatch):
    """In another process, which knows the run folder only."""
    name = "reward_beside_the_recipe"
    (tmp_path / f"{name}.py").write_text("def score(images, *_): return [0.5] * len(images)\n")
    text = recipe().to_yaml().replace(f"{HERE}.brightness", f"{name}.score")
    (tmp_path / "mine.yaml").write_text(text)
    with monkeypatch.context() as process:
        process.setattr(sys, "path", [*sys.path])
        folder = entroflow.train(
            tmp_path / "mine.yaml", policy=PixelPolicy(), run=tmp_path / "runs" / "one",
            stop_after=1,
        )  # fmt: skip
    del sys.modules[name]
    importlib.invalidate_caches()
    folder = entroflow.resume(folder.path, policy=PixelPolicy())
    assert folder.metrics()[-1]["iteration"] == 3


class Reinforce:
    """The least that `objectives.base.Objective` asks for."""

    needs_old_mean = needs_reference = False
    skips_zero_advantage = True
    minibatches = epochs = 1

    def clip(self, dimensions):
        return 1e-3

    def terms(self, transitions, log_prob, mean, reference_mean):
        return {"loss": -transitions.advantage.to(log_prob) * log_prob}


def test_an_objective_of_ones_own_needs_only_what_the_protocol_says(tmp_path):
    """On policy its gradient is that of the clipped objective, and so is the run."""
    mine = Trainer(replace(recipe(), objective=Reinforce()), PixelPolicy())
    clipped = Trainer(recipe(objective={"minibatches": 1, "kl": 0.0}), PixelPolicy())
    for trainer in (mine, clipped):
        trainer.step()
    torch.testing.assert_close(mine.policy.shift, clipped.policy.shift, rtol=1e-6, atol=1e-9)


def test_a_plan_without_noise_is_wrong_input(tmp_path):
    """With the ODE there is nothing to train on."""
    with pytest.raises(InputError, match="no step of the plan is stochastic"):
        train(tmp_path / "run", kernel={"type": "ode"})


def test_learning_rate_warms_up_linearly():
    trainer = Trainer(recipe(optimizer={"learning_rate": 0.04, "warm_up": 4}), PixelPolicy())
    rates = []
    for _ in range(6):
        trainer.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.04, 0.04])


# --- run-time checks ------------------------------------------------------------------------------

NAMED = ("dtype", "guidance", "grid", "batch shape", "grad mode")


@pytest.mark.parametrize(("share", "warns"), [(0.05, False), (0.2, True), (-0.2, True)])
def test_the_ratio_check_warns_beyond_a_tenth_of_the_clip_range(monkeypatch, caplog, share, warns):
    """log_prob of the update is off by a share of the clip range; a warning says what to check."""
    clip = 1e-2
    monkeypatch.setattr(update_module, "log_prob", lambda *given: log_prob(*given) + share * clip)
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
    Trainer(recipe(objective={"clip_range": 1e-3}), policy).step()
    assert any("policy ratio is off" in record.getMessage() for record in caplog.records)
    assert any("KL to the reference" in record.getMessage() for record in caplog.records)


def test_the_kl_check_sees_another_reference(caplog):
    """Only in the first iteration: later the weights have moved."""
    trainer = Trainer(recipe(), PixelPolicy())
    trainer.policy.weights.keep("reference", {"shift": torch.full((3, 2, 2), 2.0)})
    trainer.step()
    assert ["KL to the reference" in record.getMessage() for record in caplog.records] == [True]
    trainer.step()
    assert len(caplog.records) == 1


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
    monkeypatch.setattr(update_module, "log_prob", lambda *given: log_prob(*given) * torch.inf)
    with pytest.raises(InputError, match="gradient of iteration .* is not finite"):
        trainer.step()
    assert torch.equal(trainer.policy.shift.detach(), torch.zeros(3, 2, 2, dtype=torch.float64))


# --- TensorBoard ----------------------------------------------------------------------------------


def test_tensorboard_reads_every_number_and_picture(tmp_path, monkeypatch):
    """The real reader finds what metrics.jsonl and images/ hold, each once, also over a pause."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = train(tmp_path / "run", stop_after=1)
    # Event files are named by the second, and this pause is shorter.
    later = SimpleNamespace(time=lambda: time.time() + 5)
    monkeypatch.setattr("tensorboardX.event_file_writer.time", later)
    folder = entroflow.resume(folder.path, policy=PixelPolicy())
    events = accumulator.EventAccumulator(
        str(folder.tensorboard), size_guidance={"scalars": 0, "images": 0}
    )
    events.Reload()
    wanted = {}
    for line in folder.metrics():
        for name, value in line.items():
            if name not in ("iteration", "by_step"):
                wanted.setdefault(name, []).append((line["iteration"], value))
    assert set(events.Tags()["scalars"]) == set(wanted)
    for name, points in wanted.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in points]
        assert [v for _, v in found] == pytest.approx([v for _, v in points], rel=1e-6, abs=1e-12)
    pictures = events.Images("examples")
    assert [picture.step for picture in pictures] == [0, 2, 3]
    for picture in pictures:
        path = folder.images / f"{picture.step:08d}.png"
        shown = tmp_path / "shown.png"
        shown.write_bytes(picture.encoded_image_string)
        with Image.open(path) as one, Image.open(shown) as other:
            assert np.array_equal(np.asarray(one), np.asarray(other))


# --- the ledger of a run --------------------------------------------------------------------------


def test_the_ledger_counts_forward_backward_and_reference_passes(tmp_path):
    """KL asks for the reference at every state; a pass with gradient counts three."""
    folder = train(tmp_path / "run", credit={"type": f"{HERE}.RunningScale"})
    forward, trained = ROLLOUTS * 4, ROLLOUTS * 2
    for line in folder.metrics():
        n = line["iteration"]
        assert line["ledger/network_evaluations"] == n * (forward + 2 * trained)
        assert line["ledger/weighted_evaluations"] == n * (forward + trained + 3 * trained)
        assert line["ledger/monitor_evaluations"] == 0
        assert line["ledger/reward_calls"] == line["ledger/decodes"] == n * ROLLOUTS
        assert line["ledger/optimizer_steps"] == 2 * n
    assert (folder.path / METRICS).read_text().count("\n") == 4


def test_an_evaluation_may_have_no_examples(tmp_path):
    folder = train(tmp_path / "run", evaluation={"type": f"{HERE}.Blind"})
    assert folder.metrics()[-1]["iteration"] == 3
    assert (folder.path / "report.html").is_file()
    assert not folder.examples.exists()


def test_a_watcher_sees_every_iteration_with_its_evaluation(tmp_path):
    seen = []
    folder = train(tmp_path / "run", watch=lambda metrics, found: seen.append((metrics, found)))
    assert [json.loads(json.dumps(metrics)) for metrics, _ in seen] == folder.metrics()
    assert [found is not None for _, found in seen] == [True, False, True, True]
