"""Pretraining of the embedded network by rectified flow on rendered scenes with noisy captions.

The base model must be imperfect in a way that reinforcement learning can mend: every scene is drawn
right, and with probability `label_noise` its caption is wrong in one attribute (uniform over the
attributes that it states). The network learns the mixture; a reward can pick the right component.
One caption in ten is left out, for guidance.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from entroflow.checkpoints import (
    CheckpointError,
    checkpoint_exists,
    load_optimizer_tensors,
    optimizer_tensors,
    read_state,
    read_tensors,
    write_checkpoint,
)
from entroflow.contents import Contents, Count
from entroflow.policies.base import WeightSets
from entroflow.policies.shapes.network import ShapesNetwork
from entroflow.policies.shapes.tokenizer import CAPTION_LENGTH, VOCABULARY, tokenize
from entroflow.shapes import grammar
from entroflow.shapes.scenes import lay_out, render
from entroflow.writing import write_bytes


class PhaseState(Contents):
    """A phase of pretraining."""

    steps: Count


class PretrainingSettings(Contents):
    """What pretraining was begun with."""

    phases: list[PhaseState]


class PretrainingState(Contents):
    """`state.json` of pretraining."""

    step: Count
    settings: PretrainingSettings


@dataclass(frozen=True)
class Phase:
    """Steps on one kind of data; the learning rate warms up and goes down as a cosine to zero.

    Attributes:
        label_noise: probability that a caption is wrong in one attribute.
        skills: what the captions are about.
        noisiness: location of the logit-normal distribution of sigma; its median is
            sigmoid(noisiness).
    """

    steps: int
    learning_rate: float
    label_noise: float
    skills: tuple[str, ...] = grammar.SKILLS
    noisiness: float = 0.2


@dataclass(frozen=True)
class Pretraining:
    """Settings of a pretraining run; the defaults made the shipped weights.

    A finished run can go on with more phases. The first one teaches who stands left of whom, which
    the mixture of all captions and noise levels does not: see docs/shapes-world.md.
    """

    phases: tuple[Phase, ...] = (
        Phase(1500, 4e-3, label_noise=0.0, skills=("position",), noisiness=2.0),
        Phase(12_000, 4e-3, label_noise=0.25),
        Phase(6000, 3e-3, label_noise=0.2),
    )
    batch: int = 128
    warm_up: int = 300
    weight_decay: float = 0.01
    caption_dropout: float = 0.1
    ema: float = 0.999
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def scaled_to(self, steps: int) -> Pretraining:
        """The same phases, shorter or longer, of about `steps` in all."""
        shares = (max(1, round(phase.steps * steps / self.steps)) for phase in self.phases)
        scaled = zip(self.phases, shares, strict=True)
        return replace(self, phases=tuple(replace(phase, steps=n) for phase, n in scaled))

    def phase_of(self, step: int) -> tuple[Phase, int]:
        """The phase that a step belongs to, and its first step."""
        start = 0
        for phase in self.phases:
            if step < start + phase.steps:
                return phase, start
            start += phase.steps
        raise ValueError(f"step {step} is beyond the last phase.")


def batch_of_scenes(settings: Pretraining, step: int) -> tuple[Tensor, Tensor]:
    """Images [B, 3, 32, 32] in [-1, 1] and word ids [B, L] of one training step.

    A pure function of the seed and the step, so that a resumed run sees the same data.
    """
    rng = np.random.default_rng([settings.seed, step])
    phase, _ = settings.phase_of(step)
    specs = [grammar.draw(rng, "train", phase.skills) for _ in range(settings.batch)]
    captions = []
    for spec in specs:
        fate = rng.random()
        if fate < settings.caption_dropout:
            captions.append("")
        elif rng.random() < phase.label_noise:
            captions.append(grammar.text(grammar.one_attribute_wrong(spec, rng)))
        else:
            captions.append(grammar.text(spec))
    return render(lay_out(specs, rng)) * 2 - 1, tokenize(captions)


def flow_matching_loss(network: torch.nn.Module, settings: Pretraining, step: int) -> Tensor:
    """Mean squared error of the velocity at logit-normal sigmas (Esser et al., 2024)."""
    images, words = batch_of_scenes(settings, step)
    # Reduced to what torch takes: seeds may have 63 bits.
    generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) % 2**63)
    noise = torch.randn(images.shape, generator=generator)
    noisiness = settings.phase_of(step)[0].noisiness
    sigma = torch.sigmoid(noisiness + 1.2 * torch.randn(len(images), generator=generator))
    wide = sigma[:, None, None, None]
    state = (1 - wide) * images + wide * noise
    with torch.autocast("cpu", torch.bfloat16):
        velocity = network(state, sigma, words)
    return F.mse_loss(velocity.float(), noise - images)


def learning_rate_at(settings: Pretraining, step: int) -> float:
    """In each phase a linear warm-up, then a cosine to zero (SGDR, Loshchilov & Hutter, 2017)."""
    phase, start = settings.phase_of(step)
    warm = min(1.0, (step - start + 1) / max(1, settings.warm_up))
    cosine = 0.5 * (1 + math.cos(math.pi * (step - start) / phase.steps))
    return phase.learning_rate * warm * cosine


def pretrain(
    settings: Pretraining, folder: Path, checkpoint_every: int = 500
) -> Generator[tuple[int, float], None, None]:
    """Train, or go on training, in `folder`; yields (step, loss) after every step.

    The folder holds `checkpoint/` (replaced atomically) and `loss.jsonl`. Closing the generator
    leaves a checkpoint of the last step.

    Raises:
        CheckpointError: the folder holds a run with other settings, or a torn checkpoint.
    """
    torch.manual_seed(settings.seed)
    network = ShapesNetwork(VOCABULARY, CAPTION_LENGTH)
    optimizers = _optimizers(network, settings)
    average = copy.deepcopy(network).requires_grad_(False)
    start = 0
    checkpoint = folder / "checkpoint"
    if checkpoint_exists(checkpoint):
        start = _resume(checkpoint, settings, network, average, optimizers)
    parameters: list[Tensor] = list(network.parameters())
    averages: list[Tensor] = list(average.parameters())
    recent: list[dict[str, float]] = []
    saved = start

    def save(step: int) -> None:
        nonlocal saved
        if step == saved:
            return
        write_checkpoint(
            checkpoint,
            {
                "network": dict(network.named_parameters()),
                "average": dict(average.named_parameters()),
                "muon": optimizer_tensors(optimizers[0]),
                "adamw": optimizer_tensors(optimizers[1]),
            },
            {"step": step, "settings": asdict(settings)},
        )
        with (folder / "loss.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in recent)
        recent.clear()
        saved = step

    for step in range(start, settings.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate_at(settings, step)
        loss = flow_matching_loss(network, settings, step)
        network.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(settings.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(averages, parameters, 1 - decay)
        recent.append({"step": step + 1, "loss": loss.item()})
        if (step + 1) % checkpoint_every == 0 or step + 1 == settings.steps:
            save(step + 1)
        try:
            yield step + 1, loss.item()
        except GeneratorExit:
            save(step + 1)
            raise


def _optimizers(network: ShapesNetwork, settings: Pretraining) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices inside the blocks, AdamW for everything else."""
    inside = {
        name
        for name, parameter in network.named_parameters()
        if parameter.ndim == 2 and "block" in name and "modulation" not in name
    }
    named = dict(network.named_parameters())
    matrices = [named[name] for name in named if name in inside]
    others = [named[name] for name in named if name not in inside]
    decay = settings.weight_decay
    return [
        torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=decay, betas=(0.9, 0.99)),
    ]


def _resume(
    checkpoint: Path,
    settings: Pretraining,
    network: ShapesNetwork,
    average: ShapesNetwork,
    optimizers: list[torch.optim.Optimizer],
) -> int:
    state = read_state(checkpoint, PretrainingState)
    now = json.loads(json.dumps(asdict(settings)))
    begun, start = 0, 0
    for phase in state["settings"]["phases"]:
        begun += start < state["step"]
        start += phase["steps"]
    for values in (now, state["settings"]):
        # Phases that have not begun may change.
        values["phases"] = values["phases"][:begun]
    for name, value in now.items():
        before = state["settings"].get(name)
        if before != value:
            raise CheckpointError(
                f"{checkpoint} was made with {name}={before}, not {value}; "
                "use the same settings or another folder."
            )
    for module, name in ((network, "network"), (average, "average")):
        WeightSets(dict(module.named_parameters())).load(
            read_tensors(checkpoint / f"{name}.safetensors")
        )
    for optimizer, name in zip(optimizers, ("muon", "adamw"), strict=True):
        load_optimizer_tensors(optimizer, read_tensors(checkpoint / f"{name}.safetensors"))
    return int(state["step"])


def export_weights(folder: Path) -> Path:
    """Write the moving average of a pretraining run as `base.safetensors` in float16."""
    average = read_tensors(folder / "checkpoint" / "average.safetensors")
    path = folder / "base.safetensors"
    write_bytes(path, save({name: tensor.half() for name, tensor in average.items()}))
    return path
