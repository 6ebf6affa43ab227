"""What the training of a language model needs to go on, as safetensors and JSON.

trainer_state.json      TRL's own: updates, epoch, what was logged
optimizer.safetensors   moments of the optimizer
reference.safetensors   the reference of the KL, where it follows the policy (sync_ref_model)
progress.json           learning rates, scheduler, what else TRL adapts, and the random states of
                        every process
"""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor

from entroflow.checkpoints import (
    PROGRESS,
    TRAINER_STATE,
    CheckpointError,
    load_optimizer_tensors,
    optimizer_tensors,
    read_tensors,
)
from entroflow.llm.grpo import EntropyGRPOTrainer
from entroflow.runs.inputs import Inputs, check_inputs, warn_of_changed_code
from entroflow.runs.llm_files import read_progress, trl_state

log = logging.getLogger(__name__)

OPTIMIZER, REFERENCE = "optimizer.safetensors", "reference.safetensors"
ADAPTED = ("entropy_coef", "_last_world_entropy")
"""Numbers of TRL's trainer that its `use_adaptive_entropy` changes."""


class ResumableTrainer(EntropyGRPOTrainer):
    """Goes on from what `write_state` left, with the same weights as if it had never stopped.

    So where it stopped `is_between_batches`. TRL's own checkpoints are pickles, and forget how
    often the prompts were shuffled.

    Attributes:
        identity: of the recipe that it is made by.
    """

    identity = ""

    inputs: Inputs
    """What the recipe names and the training reads; see `entroflow.runs.inputs`."""
    code: Inputs
    """The module of the reward, where that is found by a dotted path."""

    def write_state(self, folder: Path) -> None:
        """Write all but the model into a folder; called in every process.

        Optimizers that FSDP or DeepSpeed have cut into shards are left out: they can only be
        written as pickles.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        states = gather_object([_random_state()])
        if not self.accelerator.is_main_process:
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        scaler = self.accelerator.scaler
        moments = optimizer_tensors(self.optimizer)
        tensors = {k: v.contiguous() for k, v in moments.items() if isinstance(v, Tensor)}
        progress = {
            "recipe": self.identity,
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "moments": {k: v for k, v in moments.items() if k not in tensors},
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "adapted": {name: getattr(self, name) for name in ADAPTED},
            "random": states,
            "inputs": self.inputs,
            "code": self.code,
        }
        save_file(tensors, folder / OPTIMIZER)
        try:
            text = json.dumps(progress)
        except TypeError as error:
            raise CheckpointError(
                f"trainer.optim={self.args.optim} keeps what can't be written down ({error}); "
                "choose another."
            ) from None
        (folder / PROGRESS).write_text(text, encoding="utf-8")
        if self.args.sync_ref_model and self.ref_model is not None:
            save_model(self.accelerator.unwrap_model(self.ref_model), str(folder / REFERENCE))
        self.state.save_to_json(str(folder / TRAINER_STATE))

    def _get_train_sampler(self, *given: Any) -> Any:
        self._sampler: Any = super()._get_train_sampler(*given)
        return self._sampler

    def _init_training_state(self, *given: Any, **named: Any) -> tuple[int, int]:
        epochs, steps = super()._init_training_state(*given, **named)
        # Each epoch has its own order, drawn from where the one before left the generator.
        for _ in range(epochs if self.shuffle_dataset else 0):
            torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)
        return epochs, steps

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        progress = read_progress(Path(checkpoint))
        tensors = read_tensors(Path(checkpoint) / OPTIMIZER)
        load_optimizer_tensors(self.optimizer, {**tensors, **progress["moments"]})
        for group, rate in zip(self.optimizer.param_groups, progress["rates"], strict=True):
            group["lr"] = rate
        self.lr_scheduler.load_state_dict(progress["scheduler"])
        for name, value in progress["adapted"].items():
            setattr(self, name, value)
        if self.args.sync_ref_model and self.ref_model is not None:
            load_model(self.accelerator.unwrap_model(self.ref_model), Path(checkpoint) / REFERENCE)
        # TRL counts again from 0, but which part of a generation batch is next depends on it.
        self._step = self.state.global_step * self.args.gradient_accumulation_steps

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A weight that shares its values with another is written once.
        missing = {*load_result.missing_keys} - {*self._policy.all_tied_weights_keys}  # type: ignore[misc]
        if wrong := sorted(missing | {*load_result.unexpected_keys}):
            raise CheckpointError(f"the checkpoint is of another model: {', '.join(wrong[:3])} ...")

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(read_progress(Path(checkpoint))["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states = read_progress(Path(checkpoint))["random"]
            _set_random_state(states[self.accelerator.process_index])


def inputs_of(folder: Path) -> Inputs | None:
    """What the training of a checkpoint read; None where that is not written down.

    Raises:
        CheckpointError: it is torn.
    """
    return read_progress(folder).get("inputs") if (folder / PROGRESS).is_file() else None


def check_state(folder: Path, processes: int, identity: str, inputs: Inputs, code: Inputs) -> int:
    """Whether a training can go on from a folder.

    A recipe, or the code of a reward, that was changed since is warned of.

    Args:
        processes: that there are now.
        inputs, code: as they are now.

    Returns:
        Its updates.

    Raises:
        CheckpointError: it holds the model alone, is torn, or of another number of processes.
        InputError: model or problems are not those that it was trained with.
    """
    if not (folder / PROGRESS).is_file():
        raise CheckpointError(
            f"{folder} holds the model alone, as FSDP's and DeepSpeed's shards of an optimizer are "
            f"not written down; start a new run from it: model.path={folder}"
        )
    progress = read_progress(folder)
    check_inputs(progress.get("inputs"), inputs, folder)
    if progress.get("recipe", identity) != identity:
        log.warning("the recipe was changed since %s; the run goes on by it.", folder)
    warn_of_changed_code(progress.get("code", {}), code, folder)
    before = len(progress["random"])
    if before != processes:
        raise CheckpointError(
            f"{folder} was written by {before} processes, not {processes}; launch as many again."
        )
    done = int(trl_state(folder)["global_step"])
    if done != int(folder.name):
        raise CheckpointError(
            f"{folder} is of another update: {TRAINER_STATE} says {done}; restore it from a copy."
        )
    return done


def _random_state() -> dict[str, Any]:
    """Of this process, for JSON: what samples answers, and what a reward may use."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    return {
        "python": [version, list(words), gauss],
        "numpy": numpy,
        "torch": torch.random.get_rng_state().tolist(),
        "cuda": cuda,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = state["numpy"]
    numpy["state"]["key"] = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy)
    torch.random.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
