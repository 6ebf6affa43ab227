"""Rewards that nothing trains on, and what happens when the trained one is hacked."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import entroflow
from entroflow.errors import InputError, RecipeError
from entroflow.evaluation.reward import RewardEvaluation
from entroflow.recipe.load import build_recipe
from entroflow.rewards.pairwise import Pairwise
from entroflow.runs.folder import RunFolder
from entroflow.training.launch import resume
from tiny_run import (
    ByBrightness,
    PixelPolicy,
    brightness,
    final_tensors,
    lines,
    recipe,
    train,
)


def darkness(images, prompts, metadata):
    return [-value for value in brightness(images, prompts, metadata)]


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text("\n".join(f"word {number}" for number in range(8)))
    return {"type": "reward", "path": str(path), "images": 16, "test_images": 16, "steps": 4}


def hacked(folder, held_out, **monitors):
    """A run that makes its images ever brighter."""
    return train(
        folder, reward=brightness, evaluation=held_out, monitors=monitors,
        optimizer={"learning_rate": 0.05}, run={"iterations": 6, "evaluate_every": 1},
    )  # fmt: skip


def test_a_reward_that_is_hacked_is_seen(tmp_path, held_out, caplog):
    folder = hacked(tmp_path / "run", held_out)
    found = lines(folder)
    rewards = [line["eval/reward"] for line in found]
    assert rewards[-1] > rewards[0] + 0.1
    assert found[0]["drift/brightness"] == 0
    assert found[-1]["drift/brightness"] > 1.5
    assert "brightness" in found[-1]["hacking"]
    assert "hacking" not in found[0]
    assert len(found) == 7, "a warning does not end the run"
    assert "the reward rises, but brightness is +" in caplog.text
    report = (folder.path / "report.html").read_text()
    assert "The reward rises, but brightness is +" in report
    assert "How far the images have moved" in report


class Darkness(RewardEvaluation):
    """Its score is the opposite of the reward."""

    def judged(self, drawn):
        return replace(super().judged(drawn), by_image=-drawn.rewards)


def test_a_score_that_falls_while_the_reward_rises_is_seen(tmp_path, held_out, caplog):
    other = held_out | {"type": f"{__name__}.Darkness"}
    found = lines(hacked(tmp_path / "run", other, band=100.0))
    (first, *_) = [line for line in found if "hacking" in line]
    assert [*first["hacking"]] == ["score"]
    assert first["eval/reward"] > found[0]["eval/reward"]
    assert "the reward rises, but score has fallen from " in caplog.text
    assert not any(
        "hacking" in line for line in lines(hacked(tmp_path / "b", held_out, band=100.0))
    )


def test_it_ends_the_run_where_it_is_to(tmp_path, held_out, caplog):
    folder = hacked(tmp_path / "run", held_out, on_hacking="stop")
    found = lines(folder)
    assert [("hacking" in line) for line in found] == [False] * (len(found) - 1) + [True]
    assert len(found) < 7
    assert "the run stops here (monitors.on_hacking)" in caplog.text
    # As after any end: the comparison with the base, and a report that says so.
    assert json.loads((folder.path / "evaluation.json").read_text())["iteration"] == len(found) - 1
    assert (
        f"The run was stopped at iteration {len(found) - 1}."
        in (folder.path / "report.html").read_text()
    )
    # It does not go on by itself, but when asked to.
    objects = {"policy": PixelPolicy(), "reward": brightness}
    assert len(lines(resume(folder.path, **objects))) == len(found)
    resume(folder.path, ["monitors.on_hacking=warn"], **objects)
    assert len(lines(folder)) == 7
    assert all("hacking" in line for line in lines(folder)[len(found) - 1 :])


def test_the_best_checkpoint_may_be_that_of_a_monitor(tmp_path, held_out):
    """The brighter the images, the worse for the monitor: the untrained weights stay the best."""
    rewards = {"gloom": {"type": f"{__name__}.darkness"}}
    chosen = {"rewards": rewards, "best": "gloom"}
    by_monitor = hacked(tmp_path / "one", held_out, **chosen)
    assert by_monitor.best().name == "00000000"
    assert by_monitor.best_score("gloom") == lines(by_monitor)[0]["eval/gloom"]
    assert "gloom has fallen" in " ".join(lines(by_monitor)[-1]["hacking"].values())
    by_reward = hacked(tmp_path / "other", held_out, rewards=rewards)
    assert by_reward.best().name == "00000006"
    # Watching changes nothing of what is learnt.
    alone = hacked(tmp_path / "alone", held_out)
    for part, tensors in final_tensors(alone).items():
        for key, value in tensors.items():
            assert torch.equal(final_tensors(by_monitor)[part][key], value)
    assert "Monitor: gloom" in (by_reward.path / "report.html").read_text()


def test_a_run_that_is_resumed_compares_with_the_same_base(tmp_path, held_out):
    """As if it had never stopped: drifts, and win rates over the base's images."""
    sections = {
        "reward": Pairwise().model_copy(update={"judge": ByBrightness()}),
        "evaluation": held_out,
        "optimizer": {"learning_rate": 0.05},
        "run": {"iterations": 4, "evaluate_every": 1},
    }
    whole = lines(train(tmp_path / "whole", **sections))
    train(tmp_path / "parts", stop_after=2, **sections)
    parts = lines(resume(tmp_path / "parts", policy=PixelPolicy(), reward=sections["reward"]))
    for line in [*whole, *parts]:
        line.pop("judge/reward/seconds", None)
    assert parts == whole
    assert whole[0]["eval/win_rate"] == 0.5
    assert whole[-1]["eval/win_rate"] > 0.9
    best = max(line["eval/win_rate"] for line in whole)
    assert RunFolder.open(tmp_path / "whole").best_score() == best


@pytest.mark.parametrize(
    ("monitors", "said"),
    [
        ({"best": "beauty"}, "best is 'beauty', which is none of: score, size"),
        ({"rewards": {"score": {"type": "jpeg_size"}}}, "rewards.score: the name is taken"),
        ({"rewards": {"score/a": {"type": "jpeg_size"}}}, "rewards.score/a: the name is taken, or"),
        ({"rewards": {"win_rates": {"type": "jpeg_size"}}}, "rewards.win_rates: the name is taken"),
        ({"rewards": {" ": {"type": "jpeg_size"}}}, "rewards holds one without a name"),
        ({"rewards": {"size": {"type": "jpg_size"}}}, "'jpg_size'; did you mean 'jpeg_size'"),
        ({"rewards": {"both": {"type": "mixture", "rewards": {"a": {}}}}}, "is a mixture"),
        ({"band": 0}, "band"),
        ({"on_hacking": "panic"}, "on_hacking"),
    ],
)
def test_wrong_monitors_are_refused(monitors, said):
    usual = {"rewards": {"size": {"type": "jpeg_size"}}}
    with pytest.raises(RecipeError, match=said):
        recipe(monitors=usual | monitors)


@pytest.mark.parametrize(
    ("evaluation", "name"), [("shapes", "brightness"), ("shapes", "texture"), ("own", "diversity")]
)
def test_a_monitor_named_like_what_is_measured_anyway_is_refused_when_read(
    evaluation, name, held_out
):
    chosen = {"type": "shapes"} if evaluation == "shapes" else held_out
    monitors = {"rewards": {name: {"type": "jpeg_size"}}}
    with pytest.raises(RecipeError, match=rf"monitors\.rewards\.{name}: the evaluation has one of"):
        build_recipe({"evaluation": chosen, "monitors": monitors}, "mine")


def test_monitors_are_no_setting_of_the_training():
    """A recipe without them has the hash it had before there were any."""
    plain = entroflow.recipe.load.load_recipe("quickstart")
    assert plain.hash == entroflow.recipe.load.load_recipe("quickstart", ["monitors.band=1.5"]).hash
    watched = entroflow.recipe.load.load_recipe("quickstart", ["monitors.on_hacking=stop"])
    assert watched.hash != plain.hash


def test_an_own_evaluation_needs_to_say_what_it_drew(tmp_path):
    with pytest.raises(InputError, match="does not return what it has drawn, so that size can't"):
        train(tmp_path / "run", monitors={"rewards": {"size": {"type": "jpeg_size"}}})


def test_a_stop_needs_to_see_the_images(tmp_path):
    with pytest.raises(InputError, match="on_hacking is stop, but the evaluation does not return"):
        train(tmp_path / "run", monitors={"on_hacking": "stop"})


def test_another_criterion_chooses_among_the_checkpoints_that_are_there(tmp_path, held_out):
    """The best by reward says nothing of the best by a monitor on another scale."""
    rewards = {"gloom": {"type": f"{__name__}.darkness"}}
    folder = hacked(tmp_path / "run", held_out, rewards=rewards)
    assert folder.best_score("reward") > 0
    kept = [int(checkpoint.name) for checkpoint in folder.all_checkpoints()]
    assert len(kept) == 2
    objects = {"policy": PixelPolicy(), "reward": brightness}
    resume(folder.path, ["run.iterations=8", "monitors.best=gloom"], **objects)
    there = [line for line in lines(folder) if line["iteration"] in (*kept, 7, 8)]
    assert folder.best_score("gloom") == max(line["eval/gloom"] for line in there)
    assert folder.best_score("reward") == -math.inf


def test_what_is_no_reward_is_refused(tmp_path):
    class Half:
        def score_group(self, images, prompt, source): ...

    with pytest.raises(InputError, match="Half is no reward: it has neither score nor both"):
        train(tmp_path / "run", reward=Half())
