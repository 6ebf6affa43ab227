"""Before a long run: does it start, is it right, what will it take, and does it fit?

Every check gives one finding, whatever goes wrong in it; what it would need and could not have been
built makes it `skipped`.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from pydantic import BaseModel

from entroflow.checks.examination import examine_reward
from entroflow.checks.findings import DoubtfulError, Finding, NotPossibleError, Verdict, finding_of
from entroflow.errors import InputError
from entroflow.evaluation.base import HeldOutEvaluation
from entroflow.evaluation.images import draw
from entroflow.evaluation.prompt_checks import remarks_on_prompts
from entroflow.exploration.summary import summary_of
from entroflow.noise import Address, Stream, gaussian
from entroflow.policies.base import HasPipeline, OnDevice
from entroflow.prompts import ListedSource, Prompt
from entroflow.recipe.build import changed
from entroflow.recipe.load import Recipe
from entroflow.rewards.combined import as_rewards
from entroflow.rewards.parts import Part
from entroflow.sampling.kernels import ODE
from entroflow.sampling.solver import integrate
from entroflow.settings import ENDS
from entroflow.training.forecast import expected_of, first_plan, rehearse
from entroflow.training.trainer import Trainer
from entroflow.wording import count, duration, size

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far a rollout without noise may be from the pipeline's own, relative to its size.

In half precision the pipeline keeps its latents in it, too, while rollouts have theirs in float32.
"""
COPIES_IN_A_CHECKPOINT = 4
"""Of what is trained: itself, its moving average, and AdamW's two moments."""
FEW = 4
"""Rollouts of the small iteration."""
FULL = 0.9
"""Share of the memory beyond which allocator and kernels may want more than there is."""


def examine(recipe: Recipe, devices: int = 1) -> Iterator[Finding]:
    """Check a recipe before a long run, with as little work as it takes; findings as they come.

    Nothing is written; the weights that a small iteration changes are thrown away.

    Args:
        devices: that are to share the groups of an iteration.
    """
    patient = _Patient(recipe, devices)
    for check in (
        patient.recipe_, patient.memory, patient.model, patient.prompts, patient.plan,
        patient.parity, patient.reward, patient.batches, patient.disk, patient.on_policy,
        patient.cost,
    ):  # fmt: skip
        name = check.__name__.rstrip("_").replace("_", "-")
        yield finding_of(name, check)


@dataclass
class _Patient:
    """The recipe under examination, and what the checks have built of it so far.

    Every check returns what it found in a line. It raises InputError for what would make the run
    fail, `DoubtfulError` for what would make it worse than it could be.
    """

    recipe: Recipe
    devices: int
    policy: Any = None
    trainer: Trainer | None = None
    seconds: float = math.nan
    reward_seconds: float = math.nan

    # --- without the model ---------------------------------------------------------------------

    def recipe_(self) -> str:
        """It was read without an error, or nothing would be here."""
        run = self.recipe.run
        ends = " or ".join(f"{count(end)} {ENDS[key]}" for key, end in run.ends.items())
        return f"{self.recipe.name} ({self.recipe.hash}), {ends}"

    def memory(self) -> str:
        """Computed from the configuration of the model, held against what the device has."""
        policy = self.recipe.policy
        if not isinstance(policy, OnDevice):
            raise NotPossibleError("not computed for a policy of this kind")
        memory = policy.memory(
            guidance=self.recipe.sampling.guidance,
            batch_size=self.recipe.sampling.batch_size,
            micro_batch=self.recipe.optimizer.micro_batch,
        )
        kept = ", ".join(f"{name} {size(held)}" for name, held in memory.kept.items())
        passing = ", ".join(f"{name} {size(held)}" for name, held in memory.passing.items())
        there, where = _memory_there(policy.device)
        said = (
            f"computed: {size(memory.peak)} at most, of {size(there)} that {where} has. Always "
            f"there: {kept}. One of these at a time: {passing}."
        )
        if memory.peak > there:
            raise InputError(f"{said} {SMALLER}")
        if memory.peak > FULL * there:
            raise DoubtfulError(f"{said} The allocator needs some of it, too. {SMALLER}")
        return said

    # --- with the model ------------------------------------------------------------------------

    def model(self) -> str:
        """It can be loaded."""
        self.policy = self.recipe.policy.build()
        trained = sum(tensor.numel() for tensor in self.policy.weights.live.values())
        if not trained:
            raise InputError("no weight of the policy is trained, so nothing can be learnt.")
        shape = " x ".join(map(str, self.policy.latent_shape))
        return f"loaded; {count(trained)} weights are trained; latents {shape}"

    def prompts(self) -> str:
        """They can be read and encoded, and held-out ones are other ones; see `prompt_checks`."""
        policy, first = self._built(), self._batch()
        policy.encode([prompt.text for prompt in first])
        source = self.recipe.prompts
        number = f" of {len(source.listed())}" if isinstance(source, ListedSource) else ""
        said = f"{len(first)}{number} an iteration, as {first[0].text!r}"
        remarks = remarks_on_prompts(source, self.recipe.evaluation, policy)
        if remarks:
            raise DoubtfulError(f"{said}; {'; '.join(remarks)}")
        return said

    def plan(self) -> str:
        """The first iteration can be planned, and all parts can read what they need."""
        trainer = Trainer(self.recipe, self._built())
        rehearse(trainer)
        self.trainer = trainer
        steps = ", ".join(f"{s['start']}-{s['end']}" for s in expected_of(trainer)["steps"])
        return f"stochastic steps {steps} of {self.recipe.sampling.steps}"

    def parity(self) -> str:
        """A rollout without noise is the pipeline's own image, from the same latents."""
        recipe, policy = self.recipe, self._built()
        if not isinstance(policy, HasPipeline):
            raise NotPossibleError("there is no other program that samples from this policy")
        prompts = [prompt.text for prompt in self._batch()[:1]]
        steps, guidance = recipe.sampling.steps, recipe.sampling.guidance
        none = torch.zeros(1, dtype=torch.long)
        x = gaussian(
            policy.latent_shape, Address(recipe.run.seed), Stream.EVALUATION, none, none, none
        )
        with torch.no_grad():
            *_, last = integrate(
                policy, ODE(), x, policy.encode(prompts), none, policy.own_sigmas(steps)[None],
                torch.zeros(1, steps, dtype=torch.float64), guidance=guidance,
            )  # fmt: skip
        wanted = policy.by_pipeline(prompts, x, steps, guidance)
        apart, allowed = float((last.state - wanted).norm() / wanted.norm()), CLOSE[policy.dtype]
        said = (
            f"after {steps} steps without noise the latents are off by {apart:.1e} of their size "
            "from those of the pipeline's own call"
        )
        if not apart <= allowed:
            raise InputError(
                f"{said}; {allowed:g} is allowed in {policy.dtype}. This version of diffusers may "
                "sample in another way than entroflow knows."
            )
        return said

    def reward(self) -> str:
        """Images of one prompt have one that can be trained on, and all monitors.

        See `rewards.examination`.
        """
        recipe, prompts = self.recipe, self._batch()[:1]
        with torch.no_grad():
            images = draw(
                self._built(), prompts, torch.tensor([2]),
                steps=recipe.sampling.steps, guidance=recipe.sampling.guidance,
                seed=recipe.run.seed, batch_size=recipe.sampling.batch_size,
            ).images  # fmt: skip
        said: list[str] = []
        doubts: list[str] = []

        def look(parts: Mapping[str, Part]) -> None:
            for name, part in parts.items():
                for found in examine_reward(part, [images], prompts):
                    text = found.said if name == "reward" else f"{name}: {found.said}"
                    if found.verdict is Verdict.FAILED:
                        raise InputError(f"{text} The warnings say why.")
                    (doubts if found.verdict is Verdict.WARNING else said).append(text)

        start = perf_counter()
        look(recipe.reward.parts)
        self.reward_seconds = (perf_counter() - start) / (4 * len(images))
        look({f"monitor {name}": each for name, each in recipe.monitors.rewards.items()})
        if doubts:
            raise DoubtfulError("; ".join(doubts))
        return "; ".join(said)

    def batches(self) -> str:
        """Rollouts and trained states fill their batches, and groups the devices."""
        objective, micro = self.recipe.objective, self.recipe.optimizer.micro_batch
        batch = self.recipe.sampling.batch_size
        plan = first_plan(self._planned())
        groups = len(plan.group[plan.scored].unique())
        minibatches = objective.minibatches
        updates = minibatches if isinstance(minibatches, int) else len(summary_of(plan)["steps"])
        states = math.ceil(plan.trained_states() / updates)
        said = (
            f"{len(plan.prompts)} prompts, {groups} groups, {int(plan.scored.sum())} images; "
            f"updates: {updates}, of {states} states in {math.ceil(states / micro)} passes of "
            f"{micro}"
        )
        odd = []
        if batch != micro:
            odd.append(
                f"sampling.batch_size {batch} is not optimizer.micro_batch {micro}: in batches of "
                "different shapes the same state may round otherwise"
            )
        if left := states % micro:
            odd.append(
                f"the last pass holds {left}: optimizer.micro_batch={_divisor(states, micro)} "
                "fills all"
            )
        if groups % self.devices:
            odd.append(f"{groups} groups do not divide by {self.devices} devices")
        if odd:
            raise DoubtfulError(f"{said}; {'; '.join(odd)}")
        return said if self.devices == 1 else f"{said}; {groups // self.devices} groups a device"

    def disk(self) -> str:
        """There is room for the checkpoints that are there at once.

        The latest, the best, and one that is being written.
        """
        live = self._built().weights.live.values()
        one = COPIES_IN_A_CHECKPOINT * sum(t.numel() * t.element_size() for t in live)
        number = self.recipe.run.keep_checkpoints + 2
        free = shutil.disk_usage(Path.cwd()).free
        said = f"{size(number * one)} for {number} checkpoints; {size(free)} are free here"
        policy = self.recipe.policy
        if isinstance(policy, OnDevice) and policy.cache is not None:
            cond = self._built().encode([self._batch()[0].text])
            kept = sum(t.numel() * t.element_size() for t in cond.tensors.values())
            said += f"; {size(kept)} more for each prompt in {policy.cache}"
        if number * one > free:
            raise InputError(f"{said}: go to another folder, or keep fewer (run.keep_checkpoints).")
        return said

    def on_policy(self) -> str:
        """In one iteration with few rollouts and random rewards, the ratio is 1 and the KL 0.

        The KL is what it is where the policy came with another reference than it starts from.
        """
        recipe = self.recipe
        # In batches of one shape where the method allows, as equal bits need.
        small = replace(
            recipe,
            prompts=_with(recipe.prompts, {"per_iteration": 1}),
            allocation=_with(recipe.allocation, {"group_size": FEW, "low": FEW, "high": FEW}),
            sampling=_with(recipe.sampling, {"batch_size": FEW}),
            objective=_with(recipe.objective, {"minibatches": 1}),
            optimizer=_with(recipe.optimizer, {"micro_batch": FEW}),
        )
        drawn = torch.Generator().manual_seed(0)
        reward = as_rewards(lambda images, *_: torch.rand(len(images), generator=drawn).tolist())
        trainer = Trainer(small, self._built(), reward)
        at_reference = trainer.policy.weights.equal("live", "reference")
        line = trainer.step()
        self.seconds = trainer.seconds / trainer.ledger.weighted_evaluations
        clip = recipe.objective.clip(trainer.dimensions)
        if line["policy/loss"] is None:
            raise InputError("no example was trained on, so there is nothing to learn from.")
        if clip is None:
            return "the objective has no ratio that could show it; one step was taken"
        off, kl = line["policy/ratio_max_deviation"], line["policy/kl"]
        said = f"ratio off by {off:.1e} and KL {kl:.1e} before a step; clip range {clip:.1e}"
        if not at_reference:
            said += "; the KL is to a reference that the policy does not start from"
            kl = 0.0
        if off > clip or kl > clip:
            raise InputError(f"{said}: rollout and training must agree; the warning says in what.")
        if off > 0.1 * clip or kl > 0.1 * clip:
            raise DoubtfulError(f"{said}: more than a tenth of it is lost to rounding.")
        return said

    def cost(self) -> str:
        """Of an iteration and of the run, by the plan of the first."""
        expected, run = expected_of(self._planned()), self.recipe.run
        weighted, calls = expected["weighted_evaluations"], expected["reward_calls"]
        said = (
            f"an iteration: {expected['network_evaluations']:,} network evaluations, "
            f"{weighted:,} weighted, {calls:,} rewards{self._time(weighted, calls)}"
        )
        judged = self.recipe.evaluation
        if run.iterations and isinstance(judged, HeldOutEvaluation):
            passes = judged.steps * self.policy.evaluations(judged.guidance)
            evaluations = run.iterations // run.evaluate_every + 1
            images = evaluations * judged.images + 2 * judged.test_images
            said += f"; held-out scores in all: {count(images * passes)}, {count(images)} rewards"
            said += self._time(images * passes, images)
        if run.iterations:
            weighted, calls = run.iterations * weighted, run.iterations * calls
            said += f"; training in all: {count(weighted)} weighted, {count(calls)} rewards"
            said += self._time(weighted, calls)
        return said

    def _time(self, evaluations: float, rewards: float) -> str:
        """How long that may take, at the pace of the small iteration and of two rewards."""
        seconds = evaluations * self.seconds + rewards * self.reward_seconds
        return f", about {duration(seconds)}" if seconds > 0 else ""

    # --- what checks need ----------------------------------------------------------------------

    def _batch(self) -> list[Prompt]:
        return self.recipe.prompts.batch(self.recipe.run.seed, 0)

    def _built(self) -> Any:
        if self.policy is None:
            raise NotPossibleError("needs the model")
        return self.policy

    def _planned(self) -> Trainer:
        if self.trainer is None:
            self._built()
            raise NotPossibleError("needs the plan")
        return self.trainer


SMALLER = (
    "Less is taken with smaller optimizer.micro_batch, sampling.batch_size or policy.resolution, "
    "policy.gradient_checkpointing=true, policy.offload_encoders=true and policy.tiled_vae=true."
)


def _memory_there(device: str | None) -> tuple[int, str]:
    """Bytes of a device, or of the machine if it computes itself; and its name."""
    accelerator = torch.accelerator.current_accelerator()
    chosen = torch.device(device or (accelerator.type if accelerator is not None else "cpu"))
    if chosen.type == "cuda":
        return torch.cuda.get_device_properties(chosen).total_memory, str(chosen)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"


def _divisor(number: int, most: int) -> int:
    """The largest divisor up to `most`."""
    return max(n for n in range(1, most + 1) if number % n == 0)


def _with(component: Any, fields: dict[str, Any]) -> Any:
    """A component with other values for those of the fields that it has."""
    if not isinstance(component, BaseModel):
        return component
    own = {key: value for key, value in fields.items() if key in type(component).model_fields}
    return changed(component, own, "doctor") if own else component
