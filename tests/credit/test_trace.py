"""What a credit saw of the trajectories: counted by hand, and shown as the images they are."""

from __future__ import annotations

import json
import math

import pytest
import torch

import entroflow
from entroflow.credit.terminal import Terminal
from entroflow.credit.trace import trace_metrics
from entroflow.credit.turning_points import TurningPoints
from entroflow.rewards.combined import as_rewards
from entroflow.runs.folder import RunFolder
from entroflow.training.trainer import Trainer
from tiny_run import HERE, PROMPTS, ROLLOUTS, PixelPolicy, assert_same_run, recipe, train

STEPS = {"exploration": {"type": "every_step"}, "sampling": {"steps": 6}}
TURNING = {**STEPS, "credit": {"type": "turning_points"}}
NAN = math.nan


def traced(R, **settings):
    R = torch.tensor(R, dtype=torch.float64)
    row = torch.zeros(R.shape, dtype=torch.long)
    step = torch.arange(2, 1 + R.shape[1]).expand(len(R), -1)
    prompt = torch.zeros(len(R), dtype=torch.long)
    return TurningPoints(**settings).traced(row, step, R, prompt)


# plain {1, 3} and consistent {1}; plain {0, 2} and none; nothing turns; not known.
REWARDS = [[0, -1, 2, 1, 3], [0, 10, 8, 9, 1], [5, 5, 5, 5, 5], [0, 1, 2, 3, NAN]]


def test_what_is_counted_by_hand():
    """The fourth trajectory has no end and counts nowhere; the third has nothing to disagree on."""
    plain = trace_metrics(traced(REWARDS, constraint="plain", balance="off"))
    assert plain["credit/turning_points"] == pytest.approx(4 / 3)
    assert plain["credit/dropped"] == 0
    assert plain["credit/disagreement"] == 1
    third = pytest.approx(1 / 3)
    assert plain["by_step"]["turning_points"] == {"2": third, "3": third, "4": third, "5": third}
    assert plain["by_step"]["increment"] == {
        "2": pytest.approx(11 / 3), "3": pytest.approx(5 / 3), "4": pytest.approx(2 / 3),
        "5": pytest.approx(10 / 3),
    }  # fmt: skip
    consistent = trace_metrics(traced(REWARDS, balance="off"))
    assert consistent["credit/turning_points"] == pytest.approx(1 / 3)
    assert consistent["by_step"]["turning_points"] == {"2": 0, "3": third, "4": 0, "5": 0}
    agreed = trace_metrics(traced([[0, 1, 2, 3]]))
    assert agreed["credit/disagreement"] == 0


def test_what_balancing_drops_is_counted():
    """R_n - R_k at plain turning points: +4, +2, +1 and -7; the gain of 4 stays with the loss."""
    metrics = trace_metrics(traced(REWARDS, constraint="plain"))
    assert metrics["credit/turning_points"] == pytest.approx(2 / 3)
    assert metrics["credit/dropped"] == pytest.approx(2 / 3)


def test_a_failed_increment_is_left_out_of_its_mean():
    metrics = trace_metrics(traced([[0, NAN, 2, 3], [0, 1, 3, 3]]))
    assert metrics["by_step"]["increment"] == {"2": 1, "3": 2, "4": 0.5}


def test_where_nothing_is_known_there_is_nothing_to_count():
    metrics = trace_metrics(traced([[NAN, 1, 2]]))
    flat = {key: value for key, value in metrics.items() if key != "by_step"}
    assert set(flat.values()) == {None}
    json.dumps(metrics, allow_nan=False)


# --- in a run -------------------------------------------------------------------------------------


def red(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2)).tolist()


def test_the_images_are_those_that_were_scored():
    """Each reward is a mean over its image, up to the rounding of bytes."""
    trainer = Trainer(recipe(**TURNING, reward={"type": f"{__name__}.red"}), PixelPolicy())
    metrics = trainer.step()
    shown = trainer.trajectories
    assert len(shown.known["trajectories"]) == 4
    for images, known in zip(shown.images, shown.known["trajectories"], strict=True):
        assert images.shape == (6, 3, 2, 2)
        means = (images[:, 0].double() / 255).mean(dim=(1, 2))
        rewards = torch.tensor(known["rewards"]).double()
        assert ((rewards > 0) & (rewards < 1)).all()
        torch.testing.assert_close(means, rewards, atol=1 / 255, rtol=0)
        assert known["steps"] == [0, 1, 2, 3, 4]
        worth = known["rewards"][-1] - torch.tensor(known["rewards"][:-1])
        steps = torch.tensor(known["rewards"]).diff()
        turns = torch.tensor(known["turns"])
        torch.testing.assert_close(torch.tensor(known["earned"]), torch.where(turns, worth, steps))
    everywhere = shown.known["map"]
    assert everywhere["prompt"] == sorted(everywhere["prompt"])
    assert len(everywhere["turns"]) == ROLLOUTS
    turning = sum(abs(turn) == 2 for turns in everywhere["turns"] for turn in turns)
    assert metrics["credit/turning_points"] == turning / ROLLOUTS
    assert turning > 0
    assert len(shown.known["prompts"]) == PROMPTS


@pytest.mark.parametrize(
    ("sides", "shown"), [((256, 64), (256, 64)), ((512, 128), (256, 64)), ((32, 1024), (8, 256))]
)
def test_large_images_are_shown_reduced(monkeypatch, sides, shown):
    """A sheet of thirty steps would be too large to be read again: each pixel is a mean of many."""
    monkeypatch.setattr(PixelPolicy, "decode", lambda self, x: grown(x, sides))
    trainer = Trainer(recipe(**TURNING, reward={"type": f"{__name__}.red"}), PixelPolicy())
    trainer.step()
    images, known = trainer.trajectories.images, trainer.trajectories.known["trajectories"]
    assert images.shape[-2:] == shown
    rewards = torch.tensor([row["rewards"] for row in known]).double()
    means = (images[:, :, 0].double() / 255).mean(dim=(-2, -1))
    torch.testing.assert_close(means, rewards, atol=1 / 255, rtol=0)


def grown(latents, sides):
    """Each pixel of 2 x 2 images as a rectangle."""
    small = latents.clamp(0, 1)
    for dim, side in zip((-2, -1), sides, strict=True):
        small = small.repeat_interleave(side // 2, dim=dim)
    return small


def test_failed_completions_are_counted():
    """One image in each iteration has no reward, and it is a completion."""
    calls = []

    def failing(images, prompts, metadata):
        calls.append(len(images))
        values = red(images, prompts, metadata)
        first = sum(calls) - len(images) < ROLLOUTS <= sum(calls)
        return [NAN, *values[1:]] if not first and len(calls) == 6 else values

    trainer = Trainer(recipe(**TURNING), PixelPolicy(), as_rewards(failing))
    metrics = trainer.step()
    assert sum(calls) == ROLLOUTS * 6
    assert metrics["reward/failed"] == 1
    assert metrics["policy/transitions"] == ROLLOUTS * 5


def test_credit_that_looks_at_the_end_alone_shows_nothing():
    trainer = Trainer(recipe(), PixelPolicy())
    metrics = trainer.step()
    assert isinstance(trainer.recipe.credit, Terminal)
    assert trainer.trajectories is None
    assert not [key for key in metrics if key.startswith("credit/")]


def test_a_run_stopped_and_resumed_shows_the_same(tmp_path):
    """At the first iteration and every evaluation; what was written too far is forgotten."""
    sections = {**TURNING, "run": {"iterations": 4}, "evaluation": {"type": f"{HERE}.Shift"}}
    whole = train(tmp_path / "whole", **sections)
    parts = train(tmp_path / "parts", stop_after=3, **sections)
    left_over = parts.trajectories / "00000009.json"
    left_over.write_text("{}")
    entroflow.resume(parts.path, policy=PixelPolicy())
    assert_same_run(whole, RunFolder.open(parts.path))
    names = sorted(path.name for path in whole.trajectories.iterdir())
    assert names == [f"0000000{n}.{kind}" for n in (1, 2, 4) for kind in ("json", "png")]
    for name in names:
        assert (parts.trajectories / name).read_bytes() == (whole.trajectories / name).read_bytes()
    assert not left_over.exists()
