"""Held-out prompts during a run: evaluation, what it shows of hacking, and the best checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from entroflow.errors import InputError
from entroflow.evaluation.base import Drawn, Evaluated
from entroflow.evaluation.sentinel import Sentinel
from entroflow.evaluation.watching import watched
from entroflow.ledger import Ledger
from entroflow.policies.base import Policy
from entroflow.recipe.load import Recipe
from entroflow.rewards.combined import Rewards, as_rewards
from entroflow.training.metrics import Metrics

log = logging.getLogger(__name__)


class HeldOut:
    """Evaluates a policy on held-out prompts, and watches what its reward does not see.

    Attributes:
        ledger: what evaluations have cost, apart from the cost of training.
        stopped: whether hacking was seen, and is to end the run.
    """

    def __init__(self, recipe: Recipe, policy: Policy, reward: Rewards) -> None:
        self.recipe, self.policy, self.reward = recipe, policy, reward
        self.ledger = Ledger()
        self.sentinel = Sentinel(recipe.monitors.band)
        self.stopped = False
        self._base: Drawn | None = None

    def evaluate(self) -> Evaluated:
        """Evaluate the moving average of the weights."""
        monitors = self.recipe.monitors.rewards
        with self.ledger.timed("evaluate"):
            found = self._evaluated("ema", self.reward, self.ledger)
            if self.recipe.monitors.on_hacking == "stop" and found.drawn is None:
                raise InputError(
                    "monitors.on_hacking is stop, but the evaluation does not return what it has "
                    "drawn, so hacking can't be seen."
                )
            base = found.drawn
            watching = (*self.reward.parts.values(), *monitors.values())
            if base is not None and any(part.compares for part in watching):
                base = self._base_of(base)
            return watched(
                self.recipe.evaluation, found, self.reward, monitors, base,
                seed=self.recipe.run.seed, batch_size=self.recipe.sampling.batch_size,
                ledger=self.ledger,
            )  # fmt: skip

    def _base_of(self, drawn: Drawn) -> Drawn:
        """What the reference weights draw of the held-out prompts: `drawn` itself, if they did."""
        if self._base is None:
            weights = self.policy.weights
            if weights.digest("ema") == weights.digest("reference"):
                self._base = drawn
            else:
                # Not counted: a run that is resumed has to draw them again, and spends the same.
                nothing = as_rewards(lambda images, *_: [0.0] * len(images))
                self._base = self._evaluated("reference", nothing, None).drawn
        assert self._base is not None
        return self._base

    def _evaluated(self, weights: str, reward: Rewards, ledger: Ledger | None) -> Evaluated:
        recipe = self.recipe
        with self.policy.weights(weights):
            return recipe.evaluation.run(
                self.policy, seed=recipe.run.seed, batch_size=recipe.sampling.batch_size,
                reward=reward, ledger=ledger,
            )  # fmt: skip

    def watch(self, found: Evaluated, iteration: int) -> Metrics:
        """What the sentinel says of an evaluation: it warns, and asks for an end if it is to.

        Args:
            iteration: of the evaluation.
        """
        settings = self.recipe.monitors
        vectors = {n: v for n, v in found.monitors.items() if isinstance(v, Tensor) and v.ndim}
        sighting = self.sentinel.look(
            torch.full((1,), torch.nan) if found.drawn is None else found.drawn.rewards,
            {name: values for name, values in vectors.items() if name not in settings.rewards},
            {name: v for name, v in vectors.items() if name in settings.rewards}
            | ({} if found.by_image is None else {"score": found.by_image}),
            first=iteration == 0,
        )
        drifts = {f"drift/{name}": moved for name, moved in sighting.drifts.items()}
        if not sighting.alarms:
            return drifts
        self.stopped = settings.on_hacking == "stop"
        log.warning(
            "iteration %d: the reward rises, but %s. Look at the images: the policy may cheat its "
            "reward%s.",
            iteration, " and ".join(sighting.alarms.values()),
            "; the run stops here (monitors.on_hacking)" if self.stopped else "",
        )  # fmt: skip
        return {**drifts, "hacking": sighting.alarms}

    def criterion(self, metrics: Metrics) -> str:
        """Which of `eval/...` the best checkpoint is chosen by.

        What `monitors.best` says; else the held-out reward. Where rewards only compare, and the
        evaluation does not return the images that they could look at, its score.
        """
        known = self.reward.pointwise or any(key.startswith("eval/win_rate") for key in metrics)
        return self.recipe.monitors.best or ("reward" if known else "score")

    def standing(self, metrics: Metrics) -> float:
        """What the best checkpoint is chosen by; -inf if that is no number."""
        found = metrics.get(f"eval/{self.criterion(metrics)}")
        return float(found) if found is not None and math.isfinite(found) else -math.inf

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "evaluation_ledger": self.ledger.state(),
            "sentinel": self.sentinel.state(),
            "monitors": self.recipe.resolved["monitors"]["rewards"],
            "stopped": self.stopped,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`; the monitors may have been changed since."""
        self.ledger.load_state(state["evaluation_ledger"])
        self.sentinel.load_state(state.get("sentinel", {}))
        # What was measured of a monitor says nothing of another one with its name.
        before, now = state.get("monitors", {}), self.recipe.resolved["monitors"]["rewards"]
        self.sentinel.forget([name for name in before if before[name] != now.get(name)])
        self.stopped = state.get("stopped", False) and self.recipe.monitors.on_hacking == "stop"
