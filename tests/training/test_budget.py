"""A run that ends with a budget of weighted evaluations."""

from __future__ import annotations

import pytest

import entroflow
from entroflow.errors import InputError
from entroflow.recipe.load import build_recipe, load_recipe
from entroflow.settings import Run
from entroflow.training import trainer
from entroflow.training.trainer import Trainer
from tiny_run import PixelPolicy, assert_same_run, lines, recipe, train

FULL = 8 * 4 + 8 * 2 * (3 + 1)
"""Weighted evaluations of an iteration: 8 rollouts of 4 steps, 2 trained and held to the base."""


def spent(folder):
    return [line["ledger/weighted_evaluations"] for line in lines(folder)]


@pytest.mark.parametrize(
    ("settings", "taken", "share"),
    [
        ({"iterations": 10}, {"iterations": 0}, 0.0),
        ({"iterations": 10}, {"iterations": 4, "budget": 1e9, "minutes": 1e9}, 0.4),
        ({"iterations": 10}, {"iterations": 12}, 1.0),
        ({"iterations": 0}, {"iterations": 0}, 1.0),
        ({"iterations": None, "budget": 1000}, {"iterations": 0}, 0.0),
        ({"iterations": None, "budget": 1000}, {"iterations": 3, "budget": 300}, 0.3),
        # Stops where half an iteration more would be past the budget, and never before the first.
        ({"iterations": None, "budget": 1000}, {"iterations": 9, "budget": 945}, 0.945),
        ({"iterations": None, "budget": 1000}, {"iterations": 9, "budget": 950}, 1.0),
        ({"iterations": None, "budget": 1000}, {"iterations": 1, "budget": 5000}, 1.0),
        ({"iterations": None, "updates": 100}, {"iterations": 6, "updates": 24}, 0.24),
        ({"iterations": None, "minutes": 4}, {"iterations": 6, "minutes": 3}, 0.75),
        ({"iterations": 10, "budget": 1000}, {"iterations": 5, "budget": 100}, 0.5),
        ({"iterations": 10, "budget": 1000}, {"iterations": 5, "budget": 800}, 0.8),
    ],
)  # fmt: skip
def test_the_share_of_a_run_that_is_done_is_that_of_what_ends_it_first(settings, taken, share):
    nothing = {"iterations": 0, "budget": 0, "updates": 0, "minutes": 0}
    assert Run(**settings).share_done(nothing | taken) == share


def test_a_run_ends_with_its_updates(tmp_path):
    """Two an iteration: 4 and 6 are as near to 5, and the first of them ends it."""
    folder = train(tmp_path / "run", run={"iterations": None, "updates": 5})
    assert lines(folder)[-1]["ledger/optimizer_steps"] == 4


def test_a_run_ends_with_its_minutes(tmp_path):
    folder = train(tmp_path / "run", run={"iterations": None, "minutes": 1e-9})
    assert lines(folder)[-1]["iteration"] == 1


@pytest.mark.parametrize("times", [0.4, 1.0, 2.4, 2.6])
def test_a_run_ends_with_the_iteration_nearest_to_its_budget(tmp_path, times):
    """But after one at least."""
    budget = round(times * FULL)
    folder = train(tmp_path / "run", run={"iterations": None, "budget": budget})
    assert spent(folder)[1] == FULL
    assert len(spent(folder)) - 1 == max(1, round(times))
    assert "eval/score" in lines(folder)[-1]


def test_what_is_skipped_leaves_room_for_more_iterations(tmp_path):
    """Equal rewards leave no transition: an iteration costs its rollouts alone."""
    folder = train(
        tmp_path / "run",
        run={"iterations": None, "budget": 4 * FULL},
        objective={"kl": 0.0},
        reward=lambda images, *_: [1.0] * len(images),
    )
    assert spent(folder)[-1] == 4 * FULL
    assert lines(folder)[-1]["iteration"] == 4 * FULL // (8 * 4)


def test_the_learning_rate_cools_down_by_the_budget():
    """Of 8 iterations' budget the last half cools down, by what is spent before each of them."""
    made = recipe(
        run={"iterations": None, "budget": 8 * FULL},
        optimizer={"learning_rate": 0.04, "warm_up": 0, "cool_down_share": 0.5},
    )
    trainer, rates = Trainer(made, PixelPolicy()), []
    while trainer.share_done < 1:
        trainer.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.04] * 5 + [0.03, 0.02, 0.01])


def test_a_run_with_a_budget_is_resumed_to_the_same_end(tmp_path):
    settings = {"iterations": None, "budget": 3 * FULL}
    whole = train(tmp_path / "whole", run=settings)
    part = train(tmp_path / "part", run=settings, stop_after=1)
    assert_same_run(whole, entroflow.resume(part.path, policy=PixelPolicy()))
    longer = entroflow.resume(part.path, [f"run.budget={5 * FULL}"], policy=PixelPolicy())
    assert lines(longer)[-1]["iteration"] == 5


def test_the_end_is_part_of_the_hash_and_no_budget_changes_none():
    def hashed(*overrides):
        return load_recipe("quickstart", overrides).hash

    assert hashed("run.budget=null") == hashed()
    assert hashed("run.budget=1k") == hashed("run.budget=1000") == hashed("run.budget=1e3")
    assert len({hashed(), hashed("run.budget=1000"), hashed("run.budget=2000")}) == 3


def test_a_run_without_an_end_is_refused():
    with pytest.raises(InputError, match=r"run: give iterations, budget, updates or minutes"):
        load_recipe("quickstart", ["run.iterations=null"])
    with pytest.raises(InputError, match=r"run\.budget"):
        build_recipe({"run": {"budget": 0}})


def test_a_run_that_only_updates_end_gives_up_where_there_are_none(tmp_path, monkeypatch):
    """All rewards are the same, so no iteration makes an update; with another end it goes on."""
    monkeypatch.setattr(trainer, "IDLE", 4)
    endless = {"iterations": None, "updates": 5, "evaluate_every": 100}
    settings = {"reward": lambda images, *_: [1.0] * len(images), "objective": {"kl": 0.0}}
    with pytest.raises(InputError, match="nothing was learnt in the last 4 iterations"):
        train(tmp_path / "endless", run=endless, **settings)
    folder = train(tmp_path / "ends", run=endless | {"iterations": 6}, **settings)
    assert folder.metrics()[-1]["iteration"] == 6
