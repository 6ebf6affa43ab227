"""How the preferences were learnt: from comparisons that are as noisy as those of people.

The base model draws several images for each of some training captions. Of two of them one is
preferred with probability sigmoid(sharpness * difference in quality), the Bradley-Terry model;
quality is the graded score. The networks see which one was preferred, never the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from entroflow.noise import Address
from entroflow.policies.shapes.policy import ShapesPolicyConfig
from entroflow.prompts import Prompt
from entroflow.rewards.preferences.network import Pairwise, Pointwise, features
from entroflow.sampling.kernels import FlowSDE
from entroflow.sampling.plan import fresh_rows
from entroflow.sampling.rollouts import Rollouts
from entroflow.sampling.solver import sample
from entroflow.shapes import grammar
from entroflow.shapes.scoring import score
from entroflow.writing import (
    refuse_used,
    to_json,
    whole_folder,
    write_bytes,
    write_text,
)

KINDS: dict[str, type[Pointwise | Pairwise]] = {"pointwise": Pointwise, "pairwise": Pairwise}
STEPS = 10
WITHOUT = 1e-6
"""Differences in quality up to this are none."""
CHUNK = 50
"""Captions that are drawn at once."""


@dataclass(frozen=True)
class Learning:
    """Settings; the defaults made the shipped weights.

    Attributes:
        captions, held_out: training and validation captions; captions may occur twice.
        images: for each, half of them drawn with step noise, as rollouts are.
        sharpness: log-odds of a preference per unit of quality.
        batch: captions in a step, with all their pairs.
    """

    captions: int = 800
    held_out: int = 400
    images: int = 6
    sharpness: float = 12.0
    epochs: int = 6
    batch: int = 24
    learning_rate: float = 1e-3
    warm_up: int = 50
    weight_decay: float = 0.05
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of each network."""
        return self.epochs * (self.captions // self.batch)


@dataclass(frozen=True)
class Compared:
    """Images of captions, N of G each, and which of two was preferred.

    Attributes:
        features: [N, G, tokens, width].
        quality: [N, G] in [0, 1].
        first, second: [M] which two of a group are compared, all of them once.
        preferred: [N, M] whether the first was preferred.
    """

    features: Tensor
    quality: Tensor
    first: Tensor
    second: Tensor
    preferred: Tensor

    @property
    def difference(self) -> Tensor:
        """[N, M] quality of the first over that of the second."""
        return self.quality[:, self.first] - self.quality[:, self.second]


def compared(settings: Learning, split: grammar.Split, captions: int) -> Iterator[Compared]:
    """Images with their comparisons, some captions after the other."""
    # Training and held-out captions see other noise.
    seed = 2 * settings.seed + (split != "train")
    source = np.random.default_rng(seed)
    specs = [grammar.draw(source, split) for _ in range(captions)]
    policy = ShapesPolicyConfig().build()
    first, second = torch.triu_indices(settings.images, settings.images, 1)
    for start in range(0, captions, CHUNK):
        chosen = specs[start : start + CHUNK]
        texts = [grammar.text(spec) for spec in chosen for _ in range(settings.images)]
        images = _drawn(policy, chosen, settings.images, seed, start)
        shape = (len(chosen), settings.images)
        quality = score(images, [s for s in chosen for _ in range(settings.images)]).graded
        quality = quality.view(shape)
        odds = settings.sharpness * (quality[:, first] - quality[:, second])
        coin = torch.from_numpy(source.random(odds.shape))
        preferred = coin < odds.double().sigmoid()
        yield Compared(
            features(images, texts).unflatten(0, shape), quality, first, second, preferred
        )


@torch.no_grad()
def _drawn(policy: Any, specs: list[grammar.Spec], images: int, seed: int, start: int) -> Tensor:
    """[N * images, 3, 32, 32] in [0, 1]: images of each caption, half of them with step noise."""
    prompts = [Prompt(grammar.text(spec)) for spec in specs]
    grid, kernel = policy.sigmas(STEPS), FlowSDE()
    std = kernel.std(grid[:-1], grid[1:], grid)
    sizes, none = torch.full((len(specs),), images), torch.zeros(len(specs), dtype=torch.long)
    plan = fresh_rows(prompts, sizes, none, grid, std)
    plan.std[torch.arange(plan.rows) % images < images // 2] = 0
    rollouts = Rollouts.empty(plan, policy.latent_shape)
    for _ in sample(
        policy, kernel, rollouts, policy.encode(plan.texts),
        address=Address(seed, start), guidance=1.0, batch_size=64,
    ):  # fmt: skip
        pass
    assert rollouts.images is not None
    return rollouts.images[rollouts.image_of(torch.arange(plan.rows))]


def joined(parts: list[Compared]) -> Compared:
    """Several as one."""
    one = parts[0]
    return Compared(
        torch.cat([part.features for part in parts]),
        torch.cat([part.quality for part in parts]),
        one.first,
        one.second,
        torch.cat([part.preferred for part in parts]),
    )


def learn(network: Pointwise | Pairwise, data: Compared, settings: Learning) -> Iterator[float]:
    """Maximise the likelihood of the preferences; yields the loss of every step."""
    source = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    captions, step = len(data.quality), 0
    for _ in range(settings.epochs):
        order = torch.randperm(captions, generator=source)
        for start in range(0, captions - settings.batch + 1, settings.batch):
            chosen = order[start : start + settings.batch]
            warm = min(1.0, (step + 1) / settings.warm_up)
            cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * warm * cosine
            with torch.autocast("cpu", torch.bfloat16):
                read = network.reader(data.features[chosen].flatten(0, 1)).float()
            read = read.unflatten(0, (len(chosen), -1))
            # Either may be shown first.
            turned = torch.rand(data.preferred[chosen].shape, generator=source) < 0.5
            one, other = read[:, data.first], read[:, data.second]
            shown = torch.where(turned[..., None], other, one)
            beside = torch.where(turned[..., None], one, other)
            right = (data.preferred[chosen] ^ turned).float()
            loss = F.binary_cross_entropy_with_logits(network.logit(shown, beside), right)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            yield loss.item()


@torch.no_grad()
def accuracy(network: Pointwise | Pairwise, data: Compared) -> dict[str, float]:
    """How often a network is right about held-out pairs of different quality.

    Returns:
        `order`: it prefers the better one; `labels`: the one that was preferred; `noise`: labels
        that prefer the worse one; `contradictions`: asked in the other order, it says the other
        thing. Shares, and `pairs`, how many there were.
    """
    read = torch.stack([network.reader(group) for group in data.features])
    one, other = read[:, data.first], read[:, data.second]
    says, turned = network.logit(one, other) > 0, network.logit(other, one) < 0
    told = data.difference.abs() > WITHOUT
    better = data.difference > 0

    def share(which: Tensor) -> float:
        return which[told].double().mean().item()

    return {
        "order": share(says == better),
        "labels": share(says == data.preferred),
        "noise": share(better != data.preferred),
        "contradictions": share(says != turned),
        "pairs": int(told.sum()),
    }


Progress = Callable[[str, int, str], AbstractContextManager[Callable[[int, float], None]]]


def make(settings: Learning, to: Path, progress: Progress) -> dict[str, dict[str, float]]:
    """Draw, learn both, and write what came of it: weights in float16, and `accuracy.json`.

    Args:
        progress: a bar for what is done, how many steps of it, and what the number is.

    Returns:
        By kind, `accuracy` on held-out pairs.

    Raises:
        InputError: something is in the folder.
    """
    refuse_used(to)
    splits: dict[grammar.Split, int] = {"train": settings.captions, "validation": settings.held_out}
    data: dict[str, Compared] = {}
    for split, captions in splits.items():
        parts: list[Compared] = []
        with progress(f"drawing {split} captions", captions, "quality") as advance:
            for part in compared(settings, split, captions):
                parts.append(part)
                advance(sum(len(p.quality) for p in parts), part.quality.mean().item())
        data[split] = joined(parts)
    found, weights = {}, {}
    for name, kind in KINDS.items():
        torch.manual_seed(settings.seed)
        network = kind()
        with progress(f"learning, {name}", settings.steps, "loss") as advance:
            for step, loss in enumerate(learn(network, data["train"], settings), start=1):
                advance(step, loss)
        tensors = {key: tensor.half() for key, tensor in network.state_dict().items()}
        # What is shipped is what is measured.
        network.load_state_dict(tensors)
        found[name] = accuracy(network, data["validation"])
        weights[name] = save(tensors)
    content = {"settings": asdict(settings), "accuracy": found}
    with whole_folder(to) as made:
        for name, written in weights.items():
            write_bytes(made / f"{name}.safetensors", written)
        write_text(made / "accuracy.json", to_json(content, indent=1) + "\n")
    return found
