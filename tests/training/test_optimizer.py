"""The learning rate over a run, and the moving average of the weights."""

from __future__ import annotations

import pytest
import torch

from entroflow.checkpoints import read_tensors
from entroflow.settings import Optimizer
from entroflow.training.trainer import Trainer
from tiny_run import PixelPolicy, recipe, train


def test_learning_rate_warms_up_linearly():
    trainer = Trainer(recipe(optimizer={"learning_rate": 0.04, "warm_up": 4}), PixelPolicy())
    rates = []
    for _ in range(6):
        trainer.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.04, 0.04])


def test_learning_rate_cools_down_linearly():
    """The last iteration still learns; warm-up and cool-down may meet."""
    for shape, expected in (
        ({"cool_down_share": 0.5}, [6, 6, 6, 6, 4, 2]),
        ({"cool_down_share": 1.0}, [6, 5, 4, 3, 2, 1]),
        ({"warm_up": 6, "cool_down_share": 1.0}, [1, 2, 3, 3, 2, 1]),
    ):
        settings = {"learning_rate": 6.0, **shape}
        rates = [Optimizer(**settings).rate_at(iteration, iteration / 6) for iteration in range(6)]
        assert rates == pytest.approx(expected)
    trainer = Trainer(
        recipe(
            optimizer={"learning_rate": 0.06, "warm_up": 0, "cool_down_share": 2 / 3},
            run={"iterations": 3},
        ),
        PixelPolicy(),
    )
    rates = []
    for _ in range(3):
        trainer.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.06, 0.06, 0.03])


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
