"""What a checkpoint of a run holds, and how a trainer goes back to one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from entroflow.checkpoints import (
    CheckpointError,
    check_reference,
    load_optimizer_tensors,
    optimizer_tensors,
    read_run_state,
    read_tensors,
)
from entroflow.recipe.identity import identity_of, warn_of_another_recipe
from entroflow.runs.inputs import check_inputs, warn_of_changed_code

if TYPE_CHECKING:
    from entroflow.training.trainer import Trainer


def tensors_of(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Everything with many numbers that a checkpoint must hold."""
    weights = trainer.policy.weights
    return {
        "live": weights.tensors("live"),
        "ema": weights.tensors("ema"),
        "optimizer": optimizer_tensors(trainer.optimizer),
    }


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything else; noise needs none, it has an address."""
    return {
        "iteration": trainer.iteration,
        "seconds": trainer.seconds,
        "ledger": trainer.ledger.state(),
        **trainer.held_out.state(),
        "reference": trainer.policy.weights.digest("reference"),
        "recipe": identity_of(trainer.recipe.resolved),
        "inputs": trainer.named.inputs,
        "code": trainer.named.code,
        "attention": trainer.attention.curve.state(),
        "components": {
            name: component.state() for name, component in components_with_memory(trainer)
        },
    }


def load(trainer: Trainer, checkpoint: Path) -> None:
    """Go back to a checkpoint.

    Raises:
        CheckpointError: missing, torn, or made from other base weights.
        InputError: prompts or files that the recipe names have changed since.
    """
    state = read_run_state(checkpoint)
    check_inputs(state.get("inputs"), trainer.named.inputs, checkpoint)
    warn_of_changed_code(state.get("code", {}), trainer.named.code, checkpoint)
    weights = trainer.policy.weights
    check_reference(state, weights.digest("reference"), checkpoint)
    weights.load(read_tensors(checkpoint / "live.safetensors"))
    weights.keep("ema", read_tensors(checkpoint / "ema.safetensors"))
    load_optimizer_tensors(trainer.optimizer, read_tensors(checkpoint / "optimizer.safetensors"))
    trainer.ledger.load_state(state["ledger"])
    trainer.held_out.load_state(state)
    trainer.iteration, trainer.seconds = state["iteration"], state["seconds"]
    trainer.attention.curve.load_state(state.get("attention", {}))
    for name, component in components_with_memory(trainer):
        if name not in state["components"]:
            raise CheckpointError(f"{checkpoint} has no memory of the {name}, which needs it.")
        component.load_state(state["components"][name])
    warn_of_another_recipe(state, trainer.recipe.resolved, checkpoint)


def components_with_memory(trainer: Trainer) -> list[tuple[str, Any]]:
    """Key and component of those that remember something from iteration to iteration."""
    rewards = {part.key: part.reward for part in trainer.reward.parts.values()}
    parts = {**vars(trainer.recipe), **rewards}
    return [(key, part) for key, part in parts.items() if hasattr(part, "load_state")]
