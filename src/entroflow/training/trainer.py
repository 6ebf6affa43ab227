"""The training loop: prompts -> plan -> rollouts -> rewards -> advantages -> update."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from time import perf_counter

import torch
from torch import Tensor

from entroflow.attention.meter import AttentionMeter
from entroflow.credit.base import StepCredit
from entroflow.credit.trace import Trace, Trajectories, trajectories_of
from entroflow.errors import InputError
from entroflow.exploration.base import Request, refuse_undefined
from entroflow.ledger import Ledger
from entroflow.noise import Address
from entroflow.objectives.base import Examples
from entroflow.objectives.update import UpdateStatistics, update
from entroflow.policies.base import Condition, Policy
from entroflow.prompts import Prompt
from entroflow.recipe.load import Recipe
from entroflow.rewards.base import Scores, failures
from entroflow.rewards.combined import Rewards
from entroflow.rewards.scoring import Scoring
from entroflow.runs.folder import spent
from entroflow.sampling.plan import Plan
from entroflow.sampling.rollouts import Rollouts, join_rollouts
from entroflow.sampling.solver import sample
from entroflow.training.held_out import HeldOut
from entroflow.training.metrics import Metrics, iteration_metrics, rated_rollouts
from entroflow.training.named_files import NamedFiles

log = logging.getLogger(__name__)

IDLE = 50
"""Iterations in a row without an update after which a run that only updates end is given up."""


class Trainer:
    """One run: a recipe, the policy it changes, and how far it has come."""

    def __init__(
        self, recipe: Recipe, policy: Policy | None = None, reward: Rewards | None = None
    ) -> None:
        self.recipe = recipe
        self.policy: Policy = recipe.policy.build() if policy is None else policy
        self.reward: Rewards = recipe.reward if reward is None else reward
        self.dimensions = math.prod(self.policy.latent_shape)
        self.base_grid = self.policy.sigmas(recipe.sampling.steps)
        self.iteration = 0
        self.seconds = 0.0
        self.ledger = Ledger()
        self.trajectories: Trajectories | None = None
        self.held_out = HeldOut(recipe, self.policy, self.reward)
        self.named = NamedFiles(recipe, self.reward)
        self.attention = AttentionMeter(recipe.attention, recipe.allocation, recipe.exploration)
        self._idle = 0
        weights = self.policy.weights
        weights.keep_reference()
        weights.keep("ema")
        self.parameters = list(weights.live.values())
        if not self.parameters:
            raise InputError("no weight of the policy is trained, so nothing can be learnt.")
        settings = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )

    @property
    def at_end(self) -> bool:
        """Whether the run is complete: it has come to its end, or was stopped for hacking."""
        return self.share_done >= 1 or self.held_out.stopped

    @property
    def share_done(self) -> float:
        """How much of the run lies behind, between two iterations: in [0, 1], 1 at its end."""
        return self.recipe.run.share_done(spent(self.taken()))

    def step(self) -> Metrics:
        """One iteration: the whole method, a line a stage."""
        start, share_done = perf_counter(), self.share_done
        prompts = self.recipe.prompts.batch(self.recipe.run.seed, self.iteration)
        cond = self.encode(prompts)
        rollouts, scores = self._roll_out(prompts, cond)
        advantages = self._advantages(rollouts, scores)
        examples = self.recipe.objective.examples(rollouts, advantages)
        with self.ledger.timed("update"):
            statistics = self._update(examples, cond, share_done)
        trace = self._trace(rollouts.plan, self.reward.total(scores))
        self.trajectories = None if trace is None else trajectories_of(rollouts, trace)
        self.attention.follow(rollouts)
        self.iteration += 1
        self.seconds += perf_counter() - start
        metrics = iteration_metrics(self.reward, rollouts, scores, advantages, statistics, trace)
        return {**self.taken(), "policy/transitions": len(examples), **metrics}

    def encode(self, prompts: list[Prompt]) -> Condition:
        """The prompts for the network."""
        return self.policy.encode([prompt.text for prompt in prompts])

    def _roll_out(
        self, prompts: list[Prompt], cond: Condition
    ) -> tuple[Rollouts, dict[str, Scores]]:
        """Sample and score, round by round, until the allocation hands out no more."""
        recipe = self.recipe
        rounds: list[Rollouts] = []
        scoring = Scoring(
            self.reward.parts, self.ledger, seed=recipe.run.seed, iteration=self.iteration,
            on_failure=recipe.scoring.on_failure,
        )  # fmt: skip
        spent = torch.zeros(len(prompts), dtype=torch.long)
        while (sizes := recipe.allocation.sizes(len(prompts), rounds)) is not None:
            plan = self.plan(prompts, sizes, spent)
            rollouts = Rollouts.empty(
                plan,
                self.policy.latent_shape,
                getattr(torch, recipe.sampling.state_dtype),
                recipe.objective.keeps,
                self.attention.kept_states(plan, len(rounds)),
            )
            finished = sample(
                self.policy, recipe.kernel, rollouts, cond,
                address=Address(recipe.run.seed, self.iteration),
                guidance=recipe.sampling.guidance, batch_size=recipe.sampling.batch_size,
                probe=self.attention.probe(len(rounds)), ledger=self.ledger,
            )  # fmt: skip
            rounds.append(rollouts)
            sampled_with = self.policy.weights(recipe.objective.sampled_with)
            with self.ledger.timed("rollout"), sampled_with:
                known = getattr(recipe.allocation, "rounds", None)
                scoring.take(rollouts, finished, last=len(rounds) == known)
            self.attention.compare(
                self.policy, rollouts, cond, guidance=recipe.sampling.guidance,
                batch_size=recipe.sampling.batch_size, ledger=self.ledger,
            )  # fmt: skip
            spent = spent + sizes
        return join_rollouts(rounds), scoring.scores()

    def plan(self, prompts: list[Prompt], sizes: Tensor, spent: Tensor) -> Plan:
        """The plan of a round.

        Args:
            sizes, spent: [P] rollouts of every prompt in it, and in those before.

        Raises:
            InputError: nothing could be learnt from it.
        """
        recipe = self.recipe
        entropy = self.attention.entropy_for_plans(
            self.policy, prompts, self.base_grid, seed=recipe.run.seed,
            guidance=recipe.sampling.guidance, batch_size=recipe.sampling.batch_size,
            ledger=self.ledger,
        )  # fmt: skip
        request = Request(
            prompts, sizes, spent, self.base_grid, recipe.kernel, recipe.run.seed, self.iteration,
            entropy,
        )  # fmt: skip
        plan = recipe.credit.complete(recipe.exploration.plan(request))
        refuse_undefined(plan.std, plan.sigmas[:, :-1], plan.sigmas[:, 1:])
        needs_noise = recipe.objective.needs_stochastic_steps
        if needs_noise and plan.rows and not (plan.std > 0).any():
            raise InputError(
                "no step of the plan is stochastic, so there is nothing to learn from; choose "
                "another kernel than ode, or a wider exploration."
            )
        return plan

    def _trace(self, plan: Plan, scores: Scores) -> Trace | None:
        credit = self.recipe.credit
        return credit.trace(plan, scores) if isinstance(credit, StepCredit) else None

    def _advantages(self, rollouts: Rollouts, scores: Mapping[str, Scores]) -> Tensor:
        """[B, S]; all NaN where too many images were masked to learn from the rest.

        Raises:
            InputError: no rollout of the run has ever had a reward; most likely none will.
        """
        plan = rollouts.plan
        summed = self.reward.total(scores)
        failed = summed.values.isnan()
        missing, all_missing = failed[plan.scored], failed[rated_rollouts(plan)].all()
        advantages = self.reward.advantages(self.recipe.credit.advantages, plan, scores)
        if not missing.any():
            return advantages
        if all_missing and self.iteration == 0:
            kinds = ", ".join(f"{n} {kind}" for kind, n in failures(summed.statuses).items())
            raise InputError(
                f"every reward of iteration 1 failed ({kinds}); the warnings say why (mend the "
                "reward, and try it alone with: entroflow reward test)."
            )
        share, most = missing.double().mean().item(), self.recipe.scoring.most_masked
        if share <= most and not all_missing:
            return advantages
        log.warning(
            "iteration %d: %.0f%% of the images have no reward%s, so nothing is learnt from it.",
            self.iteration + 1, 100 * share,
            ", and no rollout has one" if all_missing
            else f", more than scoring.most_masked ({most:g}) allows",
        )  # fmt: skip
        return torch.full_like(advantages, torch.nan)

    def _update(self, examples: Examples, cond: Condition, share_done: float) -> UpdateStatistics:
        recipe, settings = self.recipe, self.recipe.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate_at(self.iteration, share_done)
        at_reference = self.policy.weights.equal("live", "reference")
        statistics = update(
            self.policy, cond, examples, recipe.objective,
            self.optimizer, self.parameters, seed=recipe.run.seed, iteration=self.iteration,
            guidance=recipe.sampling.guidance, micro_batch=settings.micro_batch,
            max_grad_norm=settings.max_grad_norm, ledger=self.ledger,
        )  # fmt: skip
        self.policy.weights.follow("ema", settings.ema)
        faults = recipe.objective.faults(statistics.diagnostics, self.dimensions, at_reference)
        for fault in faults:
            log.warning(
                "iteration %d: %s (policy precision; sampling.state_dtype %s, guidance %g, steps "
                "%d, batch_size %d; optimizer.micro_batch %d).",
                self.iteration + 1, fault, recipe.sampling.state_dtype, recipe.sampling.guidance,
                recipe.sampling.steps, recipe.sampling.batch_size, settings.micro_batch,
            )  # fmt: skip
        self._give_up(statistics)
        return statistics

    def _give_up(self, statistics: UpdateStatistics) -> None:
        """Refuse to go on for ever.

        Raises:
            InputError: only updates end the run, and there have been none for long.
        """
        self._idle = 0 if statistics.gradient_norm else self._idle + 1
        if self._idle >= IDLE and set(self.recipe.run.ends) == {"updates"}:
            raise InputError(
                f"nothing was learnt in the last {IDLE} iterations (images of a prompt all earn "
                "the same, or have no reward), and run.updates alone ends this run: look at the "
                "images and the reward, or set run.iterations, too."
            )

    def taken(self) -> Metrics:
        """What the run has taken so far, as in every line of its metrics."""
        return {
            "iteration": self.iteration,
            "seconds": round(self.seconds, 3),
            **{f"ledger/{name}": count for name, count in self.ledger.counts().items()},
        }
