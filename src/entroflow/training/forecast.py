"""What a run is about to do: its first iteration is planned, and what it names is looked at."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from entroflow.evaluation.base import measure_of
from entroflow.evaluation.prompt_checks import remarks_on_prompts
from entroflow.exploration.summary import summary_of
from entroflow.ledger import Ledger
from entroflow.sampling.plan import Plan, join
from entroflow.training.checkpoint import components_with_memory
from entroflow.training.metrics import Metrics
from entroflow.version import package_version

if TYPE_CHECKING:
    from entroflow.training.trainer import Trainer


def rehearse(trainer: Trainer) -> list[str]:
    """Plan the first iteration, encode its prompts, look at all others, and read what the parts
    will need, so that wrong input shows at once.

    Returns:
        What is odd about the prompts; see `remarks_on_prompts`.

    Raises:
        InputError: a prompt file, a caption, a range of steps or a file that a part names is
            wrong, or attention is to be measured that the policy does not show.
    """
    prompts = trainer.recipe.prompts.batch(trainer.recipe.run.seed, trainer.iteration)
    trainer.encode(prompts)
    trainer.attention.try_out(
        trainer.policy, prompts, trainer.base_grid[:1], trainer.recipe.sampling.guidance
    )
    expected_of(trainer)
    trainer.named.check()
    return remarks_on_prompts(trainer.recipe.prompts, trainer.recipe.evaluation, trainer.policy)


def expected_of(trainer: Trainer) -> Metrics:
    """What an iteration is about to do, by its plan: that of the present iteration.

    Costs are those of a typical allocation of which no transition is skipped:
    `network_evaluations`, `weighted_evaluations` and `reward_calls` as in the ledger. The rest
    is `summary_of` it.
    """
    plan = first_plan(trainer)
    objective, ledger = trainer.recipe.objective, Ledger()
    passes = trainer.policy.evaluations(trainer.recipe.sampling.guidance)
    ledger.forward(plan.network_evaluations() * passes)
    compared = trainer.attention.passes(len(plan.prompts), len(trainer.base_grid) - 1)
    # With guidance only what sees the prompt is compared: one pass.
    ledger.forward(compared * min(passes, trainer.policy.evaluations(1.0)))
    updates = plan.trained_states() * passes * objective.epochs
    ledger.forward_backward(updates)
    ledger.forward(updates * len(objective.needs))
    return {
        "network_evaluations": ledger.network_evaluations,
        "weighted_evaluations": ledger.weighted_evaluations,
        "reward_calls": len(trainer.reward.parts) * int(plan.scored.sum()),
        **summary_of(plan),
    }


def first_plan(trainer: Trainer) -> Plan:
    """The plan of the present iteration, all rounds, by the allocation that is to be expected.

    No component remembers it; the curve of attention entropy begins here if it has not.
    """
    memories = [(part, deepcopy(part.state())) for _, part in components_with_memory(trainer)]
    prompts = trainer.recipe.prompts.batch(trainer.recipe.run.seed, trainer.iteration)
    P, allocation = len(prompts), trainer.recipe.allocation
    spent = torch.zeros(P, dtype=torch.long)
    first = allocation.sizes(P, [])
    typical = getattr(allocation, "typical", None)
    plans = []
    for sizes in [spent if first is None else first] if typical is None else typical(P):
        plans.append(trainer.plan(prompts, sizes, spent))
        spent = spent + sizes
    for part, memory in memories:
        part.load_state(memory)
    return join(plans)


def start_metrics(trainer: Trainer) -> Metrics:
    """The line of iteration 0, with what says how to read the run's metrics."""
    return {
        "version": package_version(),
        "measure": asdict(measure_of(trainer.recipe.evaluation)),
        "plan": expected_of(trainer),
        **trainer.taken(),
        "policy/dimensions": trainer.dimensions,
        "policy/clip_range": trainer.recipe.objective.clip(trainer.dimensions),
    }
