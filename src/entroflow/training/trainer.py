"""The training loop: prompts -> plan -> rollouts -> rewards -> advantages -> update."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from entroflow.attention.meter import AttentionMeter
from entroflow.attention.probe import compared_states, entropy_by_step, probe_of
from entroflow.checkpoints import (
    CheckpointError,
    check_reference,
    load_optimizer_tensors,
    optimizer_tensors,
    read_run_state,
    read_tensors,
)
from entroflow.credit.base import StepCredit
from entroflow.credit.trace import Trace, Trajectories, trajectories_of
from entroflow.errors import InputError
from entroflow.evaluation.base import Drawn, Evaluated, measure_of
from entroflow.evaluation.prompt_checks import remarks_on_prompts
from entroflow.evaluation.sentinel import Sentinel
from entroflow.evaluation.watching import watched
from entroflow.exploration.base import Request, refuse_undefined
from entroflow.exploration.summary import summary_of
from entroflow.ledger import Ledger
from entroflow.noise import Address
from entroflow.objectives.base import Examples
from entroflow.objectives.update import UpdateStatistics, update
from entroflow.places import paths_in
from entroflow.policies.base import Condition, Policy
from entroflow.prompts import ListedSource, Prompt
from entroflow.recipe.identity import identity_of, warn_of_another_recipe
from entroflow.recipe.load import Recipe
from entroflow.recipe.registry import SECTIONS
from entroflow.rewards.base import Scores, failures
from entroflow.rewards.combined import AnyReward, Rewards, as_rewards
from entroflow.rewards.scoring import Scoring
from entroflow.runs.folder import spent
from entroflow.runs.inputs import (
    Inputs,
    check_inputs,
    check_parts,
    code_of,
    digest_of_prompts,
    files_of,
    held_out_of,
    warn_of_changed_code,
)
from entroflow.sampling.plan import Plan, join
from entroflow.sampling.rollouts import Rollouts, join_rollouts
from entroflow.sampling.solver import sample
from entroflow.training.metrics import Metrics, iteration_metrics, rated_rollouts
from entroflow.version import package_version

log = logging.getLogger(__name__)

IDLE = 50
"""Iterations in a row without an update after which a run that only updates end is given up."""


class Trainer:
    """One run: a recipe, the policy it changes, and how far it has come."""

    def __init__(
        self, recipe: Recipe, policy: Policy | None = None, reward: AnyReward | None = None
    ) -> None:
        self.recipe = recipe
        self.policy: Policy = recipe.policy.build() if policy is None else policy
        self.reward = as_rewards(recipe.reward if reward is None else reward)
        self.dimensions = math.prod(self.policy.latent_shape)
        self.base_grid = self.policy.sigmas(recipe.sampling.steps)
        self.iteration = 0
        self.seconds = 0.0
        self.ledger, self.evaluation_ledger = Ledger(), Ledger()
        self.trajectories: Trajectories | None = None
        self.sentinel = Sentinel(recipe.monitors.band)
        self.attention = AttentionMeter(recipe.attention, recipe.allocation, recipe.exploration)
        self.stopped = False
        self._idle = 0
        self._base: Drawn | None = None
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
        return self.share_done >= 1 or self.stopped

    @property
    def share_done(self) -> float:
        """How much of the run lies behind, between two iterations: in [0, 1], 1 at its end."""
        return self.recipe.run.share_done(spent(self.taken()))

    def try_inputs(self) -> list[str]:
        """Plan the first iteration, encode its prompts, look at all others, and read what the parts
        will need, so that wrong input shows at once.

        Returns:
            What is odd about the prompts; see `remarks_on_prompts`.

        Raises:
            InputError: a prompt file, a caption, a range of steps or a file that a part names is
                wrong, or attention is to be measured that the policy does not show.
        """
        prompts = self.recipe.prompts.batch(self.recipe.run.seed, self.iteration)
        self._encode(prompts)
        self.attention.try_out(
            self.policy, prompts, self.base_grid[:1], self.recipe.sampling.guidance
        )
        self.expected()
        self.check_parts()
        return remarks_on_prompts(self.recipe.prompts, self.recipe.evaluation, self.policy)

    def check_parts(self) -> None:
        """Let all parts of the recipe read what they will need; see `Component.check`.

        Raises:
            InputError: a file is missing or wrong.
        """
        for section in SECTIONS:
            if section == "reward":
                for part in self.reward.parts.values():
                    check_parts(part.reward, part.key)
            else:
                check_parts(getattr(self.recipe, section), section)

    @cached_property
    def inputs(self) -> Inputs:
        """What the recipe names and the run reads beside the policy, by content."""
        source = self.recipe.prompts
        found: dict[str, Mapping[str, str]] = {}
        for part in self.reward.parts.values():
            found |= files_of(part.reward, part.key)
        found |= held_out_of(self.recipe.evaluation)
        if isinstance(source, ListedSource):
            named = self.recipe.resolved["prompts"]
            of = named.get("path") or named.get("name") or named["type"]
            found["prompts"] = {"of": of, "digest": digest_of_prompts(source.listed())}
        return found

    @cached_property
    def code(self) -> Inputs:
        """The modules of the user's that the recipe names, by content."""
        return code_of(self.recipe.resolved)

    @cached_property
    def unverified(self) -> list[tuple[str, str]]:
        """Key and path of what the recipe names by path, where no digest tells what it holds.

        What a policy reads is part of the digest of its weights, and no cache changes a result.
        """
        verified = {"policy", *(key.partition(",")[0] for key in self.inputs)}
        return [
            (key, path)
            for key, path in paths_in(self.recipe.resolved)
            if not {key, key.partition(".")[0]} & verified and not key.endswith(".cache")
        ]

    def step(self) -> Metrics:
        """One iteration: the whole method, a line a stage."""
        start, share_done = perf_counter(), self.share_done
        prompts = self.recipe.prompts.batch(self.recipe.run.seed, self.iteration)
        cond = self._encode(prompts)
        rollouts, scores = self._roll_out(prompts, cond)
        advantages = self._advantages(rollouts, scores)
        examples = self.recipe.objective.examples(rollouts, advantages)
        with self.ledger.timed("update"):
            statistics = self._update(examples, cond, share_done)
        trace = self._trace(rollouts.plan, self.reward.total(scores))
        self.trajectories = None if trace is None else trajectories_of(rollouts, trace)
        if rollouts.attention_shift is not None:
            self.attention.curve.follow(entropy_by_step(rollouts))
        self.iteration += 1
        self.seconds += perf_counter() - start
        metrics = iteration_metrics(self.reward, rollouts, scores, advantages, statistics, trace)
        return {**self.taken(), "policy/transitions": len(examples), **metrics}

    def _encode(self, prompts: list[Prompt]) -> Condition:
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
            plan = self._plan(prompts, sizes, spent)
            attention = self.attention.in_round(len(rounds))
            rollouts = Rollouts.empty(
                plan,
                self.policy.latent_shape,
                getattr(torch, recipe.sampling.state_dtype),
                recipe.objective.keeps,
                None if attention is None else compared_states(plan, attention.states),
            )
            finished = sample(
                self.policy, recipe.kernel, rollouts, cond,
                address=Address(recipe.run.seed, self.iteration),
                 guidance=recipe.sampling.guidance, batch_size=recipe.sampling.batch_size,
                probe=probe_of(attention), ledger=self.ledger,
            )  # fmt: skip
            rounds.append(rollouts)
            with self.ledger.timed("rollout"):
                known = getattr(recipe.allocation, "rounds", None)
                scoring.take(rollouts, finished, last=len(rounds) == known)
            if attention is not None:
                rollouts.attention_shift = self.attention.shift(
                    self.policy, rollouts, cond, guidance=recipe.sampling.guidance,
                    batch_size=recipe.sampling.batch_size, ledger=self.ledger,
                )  # fmt: skip
            spent = spent + sizes
        return join_rollouts(rounds), scoring.scores()

    def _plan(self, prompts: list[Prompt], sizes: Tensor, spent: Tensor) -> Plan:
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
        advantages = self.reward.advantages(self.recipe.credit.advantages, rollouts, scores)
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

    def evaluate(self) -> Evaluated:
        """Evaluate the moving average of the weights."""
        monitors = self.recipe.monitors.rewards
        with self.evaluation_ledger.timed("evaluate"):
            found = self._evaluated("ema", self.reward, self.evaluation_ledger)
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
                ledger=self.evaluation_ledger,
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

    def watch(self, found: Evaluated) -> Metrics:
        """What the sentinel says of an evaluation; it warns, and stops the run if it is to."""
        settings = self.recipe.monitors
        vectors = {n: v for n, v in found.monitors.items() if isinstance(v, Tensor) and v.ndim}
        sighting = self.sentinel.look(
            torch.full((1,), torch.nan) if found.drawn is None else found.drawn.rewards,
            {name: values for name, values in vectors.items() if name not in settings.rewards},
            {name: v for name, v in vectors.items() if name in settings.rewards}
            | ({} if found.by_image is None else {"score": found.by_image}),
            first=self.iteration == 0,
        )
        drifts = {f"drift/{name}": moved for name, moved in sighting.drifts.items()}
        if not sighting.alarms:
            return drifts
        self.stopped = settings.on_hacking == "stop"
        log.warning(
            "iteration %d: the reward rises, but %s. Look at the images: the policy may cheat its "
            "reward%s.",
            self.iteration, " and ".join(sighting.alarms.values()),
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

    def expected(self) -> Metrics:
        """What an iteration is about to do, by its plan: that of the present iteration.

        Costs are those of a typical allocation of which no transition is skipped:
        `network_evaluations`, `weighted_evaluations` and `reward_calls` as in the ledger. The rest
        is `summary_of` it.
        """
        plan = self.first_plan()
        objective, ledger = self.recipe.objective, Ledger()
        passes = self.policy.evaluations(self.recipe.sampling.guidance)
        ledger.forward(plan.network_evaluations() * passes)
        compared = self.attention.passes(len(plan.prompts), len(self.base_grid) - 1)
        # With guidance only what sees the prompt is compared: one pass.
        ledger.forward(compared * min(passes, self.policy.evaluations(1.0)))
        updates = plan.trained_states() * passes * objective.epochs
        ledger.forward_backward(updates)
        ledger.forward(updates * len(objective.needs))
        return {
            "network_evaluations": ledger.network_evaluations,
            "weighted_evaluations": ledger.weighted_evaluations,
            "reward_calls": len(self.reward.parts) * int(plan.scored.sum()),
            **summary_of(plan),
        }

    def first_plan(self) -> Plan:
        """The plan of the present iteration, all rounds, by the allocation that is to be expected.

        No component remembers it; the curve of attention entropy begins here if it has not.
        """
        memories = [(part, deepcopy(part.state())) for _, part in self._components_with_memory()]
        prompts = self.recipe.prompts.batch(self.recipe.run.seed, self.iteration)
        P, allocation = len(prompts), self.recipe.allocation
        spent = torch.zeros(P, dtype=torch.long)
        first = allocation.sizes(P, [])
        typical = getattr(allocation, "typical", None)
        plans = []
        for sizes in [spent if first is None else first] if typical is None else typical(P):
            plans.append(self._plan(prompts, sizes, spent))
            spent = spent + sizes
        for part, memory in memories:
            part.load_state(memory)
        return join(plans)

    def start_metrics(self) -> Metrics:
        """The line of iteration 0, with what says how to read the run's metrics."""
        return {
            "version": package_version(),
            "measure": asdict(measure_of(self.recipe.evaluation)),
            "plan": self.expected(),
            **self.taken(),
            "policy/dimensions": self.dimensions,
            "policy/clip_range": self.recipe.objective.clip(self.dimensions),
        }

    def taken(self) -> Metrics:
        """What the run has taken so far, as in every line of its metrics."""
        return {
            "iteration": self.iteration,
            "seconds": round(self.seconds, 3),
            **{f"ledger/{name}": count for name, count in self.ledger.counts().items()},
        }

    # --- checkpoints ---------------------------------------------------------------------------

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything with many numbers that a checkpoint must hold."""
        weights = self.policy.weights
        return {
            "live": weights.tensors("live"),
            "ema": weights.tensors("ema"),
            "optimizer": optimizer_tensors(self.optimizer),
        }

    def state(self) -> dict[str, Any]:
        """Everything else; noise needs none, it has an address."""
        return {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "ledger": self.ledger.state(),
            "evaluation_ledger": self.evaluation_ledger.state(),
            "reference": self.policy.weights.digest("reference"),
            "recipe": identity_of(self.recipe.resolved),
            "inputs": self.inputs,
            "code": self.code,
            "sentinel": self.sentinel.state(),
            "monitors": self.recipe.resolved["monitors"]["rewards"],
            "stopped": self.stopped,
            "attention": self.attention.curve.state(),
            "components": {
                name: component.state() for name, component in self._components_with_memory()
            },
        }

    def load(self, checkpoint: Path) -> None:
        """Go back to a checkpoint.

        Raises:
            CheckpointError: missing, torn, or made from other base weights.
            InputError: prompts or files that the recipe names have changed since.
        """
        state = read_run_state(checkpoint)
        check_inputs(state.get("inputs"), self.inputs, checkpoint)
        warn_of_changed_code(state.get("code", {}), self.code, checkpoint)
        weights = self.policy.weights
        check_reference(state, weights.digest("reference"), checkpoint)
        weights.load(read_tensors(checkpoint / "live.safetensors"))
        weights.keep("ema", read_tensors(checkpoint / "ema.safetensors"))
        load_optimizer_tensors(self.optimizer, read_tensors(checkpoint / "optimizer.safetensors"))
        self.ledger.load_state(state["ledger"])
        self.evaluation_ledger.load_state(state["evaluation_ledger"])
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.sentinel.load_state(state.get("sentinel", {}))
        # What was measured of a monitor says nothing of another one with its name.
        before, now = state.get("monitors", {}), self.recipe.resolved["monitors"]["rewards"]
        self.sentinel.forget([name for name in before if before[name] != now.get(name)])
        self.stopped = state.get("stopped", False) and self.recipe.monitors.on_hacking == "stop"
        self.attention.curve.load_state(state.get("attention", {}))
        for name, component in self._components_with_memory():
            if name not in state["components"]:
                raise CheckpointError(f"{checkpoint} has no memory of the {name}, which needs it.")
            component.load_state(state["components"][name])
        warn_of_another_recipe(state, self.recipe.resolved, checkpoint)

    def _components_with_memory(self) -> list[tuple[str, Any]]:
        rewards = {part.key: part.reward for part in self.reward.parts.values()}
        parts = {**vars(self.recipe), **rewards}.items()
        return [(name, part) for name, part in parts if hasattr(part, "load_state")]
