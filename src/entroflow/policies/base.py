"""What every algorithm knows of a model: three verbs, a grid, and named sets of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from entroflow.errors import InputError

SAMPLED = 64
"""About so many values of a frozen tensor go into a digest."""


@dataclass(frozen=True)
class Condition:
    """Encoded prompts: named tensors whose first axis is the prompt."""

    tensors: Mapping[str, Tensor]

    def take(self, prompt: Tensor) -> Condition:
        """The conditions of a network batch; `prompt` [B] holds prompt indices."""
        return Condition({name: value[prompt] for name, value in self.tensors.items()})


class PolicyConfig(Protocol):
    """Settings that a policy is built from."""

    def build(self) -> Policy:
        """The policy with its weights."""
        ...


@dataclass(frozen=True)
class Memory:
    """Bytes on the device.

    Attributes:
        kept: what lies there all the time, by its name.
        passing: what comes and goes, by the work it is for; at any time only one of them.
    """

    kept: Mapping[str, int]
    passing: Mapping[str, int]

    @property
    def peak(self) -> int:
        """The most that lies there at once."""
        return sum(self.kept.values()) + max(self.passing.values())


@runtime_checkable
class OnDevice(Protocol):
    """Settings of a policy that can say what it takes on a device before any weights are loaded."""

    device: str | None
    """Name of the device; None: that of the machine."""

    cache: Path | None
    """Folder that keeps text embeddings."""

    def memory(self, *, guidance: float, batch_size: int, micro_batch: int) -> Memory:
        """Of a run with these settings."""
        ...


class Policy(Protocol):
    """A generator of images.

    Latents have shape `latent_shape` and D values. sigma is 1 at noise and 0 at data; a velocity is
    noise - data.
    """

    latent_shape: tuple[int, ...]
    weights: WeightSets

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompts [P] as a condition with first axis P."""
        ...

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition, guidance: float) -> Tensor:
        """Velocity [B, *latent_shape] at states x [B, *latent_shape] and sigma [B]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1]."""
        ...

    def sigmas(self, steps: int) -> Tensor:
        """The base grid [steps + 1], from 1 to 0."""
        ...

    def evaluations(self, guidance: float) -> int:
        """Network passes that one velocity costs per image."""
        ...


@dataclass(frozen=True)
class Reading:
    """How long prompts are for one text encoder.

    Attributes:
        encoder: its name, as people know it.
        limit: most tokens that it reads; what follows is cut.
        tokens: [P] of each prompt, counted as the limit counts.
    """

    encoder: str
    limit: int
    tokens: Sequence[int]


@runtime_checkable
class ReadsPrompts(Protocol):
    """A policy that can say, without encoding prompts, how much of them its encoders read."""

    def readings(self, prompts: Sequence[str]) -> Sequence[Reading]:
        """For each text encoder.

        Raises:
            InputError: one of the prompts [P] can't be encoded.
        """
        ...


@runtime_checkable
class Exports(Protocol):
    """A policy that writes its weights in the form that other programs load."""

    def export(self, folder: Path, *, merged: bool) -> None:
        """Write the active weights into an empty folder.

        Args:
            merged: as a whole model, also where only a part of it is trained.
        """
        ...


@runtime_checkable
class HasPipeline(Policy, Protocol):
    """A policy over a pipeline that can sample by itself, to be compared with."""

    dtype: torch.dtype
    """In which the network computes."""

    def own_sigmas(self, steps: int) -> Tensor:
        """The grid [steps + 1] of the pipeline, whatever the recipe wants."""
        ...

    def by_pipeline(self, prompts: Sequence[str], x: Tensor, steps: int, guidance: float) -> Tensor:
        """Latents [P, *latent_shape] that the pipeline's own call leads x to, on its own grid."""
        ...


class WeightSets:
    """Named copies of the trainable parameters: `live`, and `reference`, `ema`, ... where made.

    `with weights("ema"):` runs the policy on that copy. Copies are swapped by pointer, so entering
    costs nothing.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], frozen: Mapping[str, Tensor] | None = None
    ) -> None:
        """`parameters` are trained; `frozen` ones are not, but part of what a digest stands for."""
        self.live = dict(parameters)
        self._frozen = frozen or {}
        self._sets: dict[str, dict[str, Tensor]] = {}
        self._active = "live"

    def keep(self, name: str, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Store a copy under `name`: of `tensors`, or else of the live weights."""
        source = self.live if tensors is None else tensors
        self._check(source, name)
        self._sets[name] = {key: source[key].detach().clone() for key in self.live}

    def keep_reference(self) -> None:
        """Store the live weights as `reference`, unless the policy came with another."""
        if "reference" not in self._sets:
            self.keep("reference")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one set."""
        return self.live if name == "live" else self._sets[name]

    def equal(self, one: str, other: str) -> bool:
        """Whether two sets are the same to the bit."""
        ours, theirs = self.tensors(one), self.tensors(other)
        return all(torch.equal(ours[key], theirs[key]) for key in self.live)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the live weights.

        Raises:
            InputError: names or shapes differ from the live weights.
        """
        self._check(tensors, "the loaded weights")
        with torch.no_grad():
            for key, parameter in self.live.items():
                parameter.copy_(tensors[key])

    def follow(self, name: str, decay: float) -> None:
        """One step of the exponential moving average: `name` <- decay name + (1 - decay) live."""
        followers = [self._sets[name][key] for key in self.live]
        live = [parameter.detach() for parameter in self.live.values()]
        torch._foreach_lerp_(followers, live, 1 - decay)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run with the weights of one set.

        Raises:
            KeyError: no such set.
        """
        if name == self._active:
            yield
            return
        if self._active != "live":
            raise RuntimeError(f"weights {self._active!r} are active; leave them first.")
        stored = self._sets[name]
        self._swap(stored)
        self._active = name
        try:
            yield
        finally:
            self._swap(stored)
            self._active = "live"

    def digest(self, name: str) -> str:
        """A short hash of one set's values, and of a sample of what is frozen."""
        summary = hashlib.blake2b(digest_size=8)
        for key, tensor in sorted(self._frozen.items()):
            sample = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // SAMPLED)]
            summary.update(f"{key} {tuple(tensor.shape)}".encode())
            summary.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for key, tensor in sorted(self.tensors(name).items()):
            summary.update(key.encode())
            summary.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return summary.hexdigest()

    def _swap(self, stored: dict[str, Tensor]) -> None:
        for key, parameter in self.live.items():
            parameter.data, stored[key] = stored[key], parameter.data

    def _check(self, tensors: Mapping[str, Tensor], name: str) -> None:
        ours = {key: tuple(value.shape) for key, value in self.live.items()}
        theirs = {key: tuple(value.shape) for key, value in tensors.items()}
        if ours != theirs:
            odd = sorted(
                key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)
            )
            raise InputError(f"{name} do not fit this policy: {', '.join(odd[:3])} differ.")
