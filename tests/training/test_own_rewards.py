"""Rewards of one's own, and rewards that fail."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from entroflow.errors import InputError
from entroflow.rewards.combined import as_rewards
from entroflow.runs.folder import RunFolder
from entroflow.training.trainer import Trainer
from tiny_run import (
    GROUP,
    HERE,
    PROMPTS,
    ROLLOUTS,
    Brightness,
    PixelPolicy,
    brightness,
    final_tensors,
    lines,
    recipe,
    train,
)


def sampled(reward, **sections):
    """One iteration up to the advantages: scores, advantages of the rows, and the trainer."""
    trainer = Trainer(recipe(**sections), PixelPolicy(), as_rewards(reward))
    prompts = trainer.recipe.prompts.batch(0, 0)
    rollouts, found = trainer._roll_out(prompts, trainer._encode(prompts))
    (scores,) = found.values()
    return trainer, scores, trainer.recipe.credit.advantages(rollouts, scores)[:, 0]


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


@pytest.mark.parametrize("failure", ["raises", math.nan, math.inf, -math.inf, None, 1e300])
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


@pytest.mark.parametrize("returned", [None, "good", b"good", ["good"] * 4, dict.fromkeys("good")])
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


def test_what_a_reward_does_to_the_process_changes_no_run(tmp_path):
    """Noise has an address, and what is set for all of torch is set back: the same to the bit."""

    def meddling(images, prompts, metadata):
        values = brightness(images, prompts, metadata)
        images.fill_(7)
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        torch.set_default_dtype(torch.bfloat16)
        torch.set_grad_enabled(False)
        return values

    plain, other = (
        train(tmp_path / name, reward=reward)
        for name, reward in (("plain", brightness), ("other", meddling))
    )
    assert lines(plain) == lines(other)
    for part, tensors in final_tensors(plain).items():
        assert all(torch.equal(t, final_tensors(other)[part][name]) for name, t in tensors.items())


class Painter:
    """A monitor that paints over what it has scored, and over what it was told of it."""

    def score(self, images, prompts):
        values = images.double().flatten(1).mean(dim=1)
        images.fill_(0.123)
        for prompt in prompts:
            prompt.metadata.get("parts", []).append("paint")
        return values


def test_what_a_reward_paints_over_no_other_sees(tmp_path):
    """Neither other rewards and monitors, nor the pictures that are kept."""
    prompts = tmp_path / "prompts.jsonl"
    told = [{"prompt": f"prompt {n}", "parts": ["a"]} for n in range(8)]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in told))
    seen = []

    def reward(images, texts, metadata):
        seen.extend(str(entry["parts"]) for entry in metadata)
        metadata[0]["parts"].append("mine")
        return brightness(images, texts, metadata)

    painters = {"one": {"type": f"{__name__}.Painter"}, "two": {"type": f"{__name__}.Painter"}}
    folders = [
        train(
            tmp_path / name,
            reward=reward,
            run={"iterations": 1},
            prompts={"type": "jsonl", "path": str(prompts)},
            evaluation={
                "type": "reward",
                "path": str(prompts),
                "images": 8,
                "test_images": 8,
                "steps": 2,
                "guidance_tried": [1.0],
            },
            monitors={"rewards": monitors},
        )
        for name, monitors in (("plain", {}), ("painted", painters))
    ]
    assert {*seen} == {"['a']"}
    plain, painted = (lines(folder)[-1] for folder in folders)
    assert painted["eval/one"] == painted["eval/two"]
    calls = "ledger/held_out_reward_calls"
    assert painted.pop(calls) == 3 * plain.pop(calls)
    assert {key: painted[key] for key in plain} == plain
    kept = [[p.read_bytes() for p in sorted(f.path.rglob("*.png"))] for f in folders]
    assert kept[0]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("failure", [SystemExit(0), GeneratorExit()])
def test_a_reward_that_wants_to_end_the_program_does_not(failure, caplog):
    """Nor does it end with success: such an image is one that failed."""
    calls = []

    def reward(images, prompts, metadata):
        calls.append(len(images))
        if len(calls) == 2:
            raise failure
        return brightness(images, prompts, metadata)

    metrics = Trainer(recipe(), PixelPolicy(), as_rewards(reward)).step()
    assert metrics["reward/failed"] == 4
    assert f"{type(failure).__name__}" in caplog.text


async def later_brightness(images, prompts, metadata):
    await asyncio.sleep(0)
    return brightness(images, prompts, metadata)


def test_an_async_function_by_its_path_is_a_reward(tmp_path):
    one = train(tmp_path / "one", run={"iterations": 1})
    chosen = recipe(reward={"type": f"{__name__}.later_brightness"}).reward
    other = train(tmp_path / "other", reward=chosen, run={"iterations": 1})
    assert lines(one)[1:] == lines(other)[1:]


def test_an_object_with_a_score_is_a_reward(tmp_path):
    """The same as the function; it is named in the recipe by its class."""
    folder = train(tmp_path / "run", reward=Brightness(), run={"iterations": 1})
    (line,), (same,) = (
        lines(run)[1:] for run in (folder, train(tmp_path / "same", run={"iterations": 1}))
    )
    assert line["reward/mean"] == pytest.approx(same["reward/mean"], rel=1e-6)
    assert f"type: {HERE}.Brightness" in (folder.path / "recipe.yaml").read_text()


@pytest.mark.parametrize(("share", "learns"), [(0.5, True), (0.75, False)])
def test_of_an_iteration_with_too_many_failures_nothing_is_learnt(share, learns, caplog):
    """scoring.most_masked is a half by default; the run goes on either way."""
    count = iter(range(10_000))

    def reward(images, prompts, metadata):
        levels = brightness(images, prompts, metadata)
        return [math.nan if next(count) % 4 < 4 * share else level for level in levels]

    trainer = Trainer(recipe(), PixelPolicy(), as_rewards(reward))
    metrics = trainer.step()
    assert metrics["reward/failed"] == share * ROLLOUTS
    assert bool(trainer.policy.shift.detach().any()) == learns
    assert ("scoring.most_masked (0.5) allows" in caplog.text) == (not learns)
    assert trainer.step()["iteration"] == 2


def test_a_reward_that_breaks_down_later_does_not_end_the_run(caplog):
    """Every image of the second iteration fails: no update, and on it goes."""
    calls = []

    def reward(images, prompts, metadata):
        calls.append(len(images))
        if ROLLOUTS < sum(calls) <= 2 * ROLLOUTS:
            raise ConnectionError("the judge is down")
        return brightness(images, prompts, metadata)

    trainer = Trainer(recipe(), PixelPolicy(), as_rewards(reward))
    first, second, third = trainer.step(), trainer.step(), trainer.step()
    assert second["reward/failed"] == ROLLOUTS
    assert second["reward/mean"] is None
    assert second["ledger/optimizer_steps"] == first["ledger/optimizer_steps"] == 2
    assert third["ledger/optimizer_steps"] == 4
    assert "ConnectionError: the judge is down" in caplog.text
    json.dumps(second, allow_nan=False)


def test_raise_stops_at_the_first_failure():
    def reward(images, prompts, metadata):
        raise ConnectionError("the judge is down")

    trainer = Trainer(recipe(scoring={"on_failure": "raise"}), PixelPolicy(), as_rewards(reward))
    with pytest.raises(InputError, match=r"ConnectionError: the judge is down .scoring.on_failure"):
        trainer.step()
