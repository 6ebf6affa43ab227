"""Metrics, ledger, pictures and events of a run."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import entroflow
from entroflow.policies.shapes.policy import ShapesPolicyConfig
from entroflow.runs.files import METRICS
from tiny_run import HERE, ROLLOUTS, PixelPolicy, Shift, brightness, final_tensors, train


class Blind(Shift):
    """Shows no examples."""

    def run(self, policy, **options):
        found = super().run(policy, **options)
        return replace(found, images=found.images[:0], captions=[], passed=[])


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
            if name not in ("iteration", "by_step", "plan", "version", "measure", "selected_by"):
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


def test_tensorboard_shows_what_came_after_a_crash_once(tmp_path, monkeypatch):
    """Iteration 1 had no checkpoint: it is run again, and its first events are hidden."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def reward(images, prompts, metadata):
        nonlocal scored
        scored += len(images)
        if scored > ROLLOUTS + 4:
            raise KeyboardInterrupt
        return brightness(images, prompts, metadata)

    scored = 0
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", reward=reward)
    later = SimpleNamespace(time=lambda: time.time() + 5)
    monkeypatch.setattr("tensorboardX.event_file_writer.time", later)
    scored = -100
    folder = entroflow.resume(tmp_path / "run", policy=PixelPolicy(), reward=reward)
    events = accumulator.EventAccumulator(
        str(folder.tensorboard), size_guidance={"scalars": 0, "images": 0}
    )
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("seconds")] == [0, 1, 2, 3]
    assert [picture.step for picture in events.Images("examples")] == [0, 2, 3]


def test_the_ledger_counts_forward_backward_and_reference_passes(tmp_path):
    """KL asks for the reference at every state, and then its check is free; a pass with gradient
    counts three.
    """
    folder = train(tmp_path / "run", credit={"type": f"{HERE}.RunningScale"})
    forward, trained = ROLLOUTS * 4, ROLLOUTS * 2
    for line in folder.metrics():
        n = line["iteration"]
        assert line["ledger/network_evaluations"] == n * (forward + 2 * trained)
        assert line["ledger/weighted_evaluations"] == n * (forward + trained + 3 * trained)
        assert line["ledger/check_evaluations"] == 0
        assert line["ledger/reward_calls"] == line["ledger/decodes"] == n * ROLLOUTS
        assert line["ledger/optimizer_steps"] == 2 * n
    assert (folder.path / METRICS).read_text().count("\n") == 4


def test_what_was_not_measured_is_null(tmp_path):
    """Groups whose rewards are all equal teach nothing: no pass, no step, and no made-up zeros."""
    folder = train(
        tmp_path / "run", reward=lambda images, *_: [0.5] * len(images), objective={"kl": 0.0}
    )
    for n, line in enumerate(folder.metrics()[1:], start=1):
        for name in ("loss", "ratio_max_deviation", "clip_fraction", "gradient_norm"):
            assert line[f"policy/{name}"] is None
        assert line["by_step"] == {"advantage_size": {"0": 0.0, "1": 0.0}}
        assert line["policy/kl"] == 0
        assert line["policy/skipped"] == line["policy/transitions"] == 2 * ROLLOUTS
        assert line["reward/tied_groups"] == 2
        assert line["ledger/network_evaluations"] == n * 4 * ROLLOUTS
        assert line["ledger/optimizer_steps"] == 0
    live = final_tensors(folder)["live"]["shift"]
    assert torch.equal(live, torch.zeros_like(live))


def test_the_size_of_the_advantage_counts_tied_groups_and_leaves_out_failures(tmp_path):
    """One group is tied; the other has rewards 0, 1, 1: of size sqrt 2, 1 / sqrt 2 twice."""

    def reward(images, prompts, metadata):
        names = sorted(set(prompts))
        values = {names[0]: [0.5] * 4, names[-1]: [0.0, 1.0, 1.0, math.nan]}
        assert len(names) == 2
        return [values[prompt].pop() for prompt in prompts]

    folder = train(
        tmp_path / "run", reward=reward, objective={"kl": 0.0, "minibatches": 1},
        sampling={"batch_size": ROLLOUTS}, credit={"epsilon": 0.0}, run={"iterations": 1},
    )  # fmt: skip
    sizes = folder.metrics()[1]["by_step"]["advantage_size"]
    assert sizes == pytest.approx(dict.fromkeys(("0", "1"), 2 * math.sqrt(2) / 7))


def test_what_evaluations_cost_is_written_where_there_was_one(tmp_path):
    folder = train(
        tmp_path / "run", evaluation={"type": "shapes", "steps": 2, "images": 1},
        policy=ShapesPolicyConfig().build(), run={"evaluate_every": 1}, stop_after=1,
        reward=lambda images, *_: [image.mean().item() for image in images],
    )  # fmt: skip
    lines = folder.metrics()
    assert len(lines) == 2
    for n, line in enumerate(lines, start=1):
        assert line["ledger/held_out_reward_calls"] == n * 6
        assert line["ledger/held_out_network_evaluations"] == n * 6 * 2


def test_an_evaluation_may_have_no_examples(tmp_path):
    folder = train(tmp_path / "run", evaluation={"type": f"{__name__}.Blind"})
    assert folder.metrics()[-1]["iteration"] == 3
    assert (folder.path / "report.html").is_file()
    assert not folder.examples.exists()


def test_a_watcher_sees_every_iteration_with_its_evaluation(tmp_path):
    seen = []
    folder = train(tmp_path / "run", watch=lambda metrics, found: seen.append((metrics, found)))
    assert [json.loads(json.dumps(metrics)) for metrics, _ in seen] == folder.metrics()
    assert [found is not None for _, found in seen] == [True, False, True, True]
