"""The embedded policy: a text-to-image model of 2.92 million parameters, in the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from entroflow.checkpoints import read_tensors
from entroflow.component import Component
from entroflow.policies.attention import conditional
from entroflow.policies.base import Condition, Reading, WeightSets
from entroflow.policies.grid import shifted_grid
from entroflow.policies.shapes.network import CHANNELS, RESOLUTION, ShapesNetwork
from entroflow.policies.shapes.tokenizer import CAPTION_LENGTH, VOCABULARY, tokenize
from entroflow.writing import write_bytes

WEIGHTS = Path(__file__).with_name("base.safetensors")


class ShapesPolicyConfig(Component):
    """The embedded model; all its weights are trained."""

    type: Literal["shapes"] = "shapes"
    weights: Path | None = Field(
        None, description="safetensors to start from; the shipped ones if unset"
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="of the network's matrix products"
    )
    shift: float = Field(
        1.0, gt=0, description="of the sampling grid; above 1: more steps near noise"
    )

    def build(self) -> ShapesPolicy:
        """Load the weights.

        Raises:
            CheckpointError: the file is missing or torn.
            InputError: it holds another network.
        """
        return ShapesPolicy(read_tensors(self.weights or WEIGHTS), self.precision, self.shift)


class ShapesPolicy:
    """The three verbs over `ShapesNetwork`; latents are the pixels, scaled to [-1, 1]."""

    latent_shape: tuple[int, ...] = (CHANNELS, RESOLUTION, RESOLUTION)

    def __init__(
        self, tensors: dict[str, Tensor], precision: str = "bf16", shift: float = 1.0
    ) -> None:
        self.network = ShapesNetwork(VOCABULARY, CAPTION_LENGTH)
        self.weights = WeightSets(dict(self.network.named_parameters()))
        self.weights.load({key: value.float() for key, value in tensors.items()})
        self._mixed = precision == "bf16"
        self._shift = shift

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Word ids; the network embeds them itself."""
        return Condition({"words": tokenize(prompts)})

    def readings(self, prompts: Sequence[str]) -> list[Reading]:
        """See `ReadsPrompts`; no caption of the grammar is too long."""
        words = (tokenize(prompts) != 0).sum(dim=1).tolist()
        return [Reading("the embedded model", CAPTION_LENGTH, words)]

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition, guidance: float) -> Tensor:
        """Velocity [B, 3, 32, 32] in float32; `guidance` 1 needs one pass, any other value two."""
        words = cond.tensors["words"]
        if guidance == 1:
            return self._forward(x, sigma, words)
        with conditional(slice(0, len(x))):
            both = self._forward(
                torch.cat([x, x]),
                torch.cat([sigma, sigma]),
                torch.cat([words, torch.zeros_like(words)]),
            )
        of_prompt, of_none = both.chunk(2)
        return of_none + guidance * (of_prompt - of_none)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [0, 1]."""
        return ((latents.float() + 1) / 2).clamp(0, 1)

    def sigmas(self, steps: int) -> Tensor:
        """[steps + 1] shifted grid."""
        return shifted_grid(steps, self._shift)

    def evaluations(self, guidance: float) -> int:
        """One pass, or two with guidance."""
        return 1 if guidance == 1 else 2

    def export(self, folder: Path, *, merged: bool) -> None:
        """Write the active weights as a file for `policy.weights`; there is nothing to merge."""
        tensors = {key: value.detach().contiguous() for key, value in self.weights.live.items()}
        write_bytes(folder / "weights.safetensors", save(tensors))

    def _forward(self, x: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
        # No cache of cast weights: an optimizer or a swap may change them in between.
        with torch.autocast("cpu", torch.bfloat16, enabled=self._mixed, cache_enabled=False):
            velocity: Tensor = self.network(x.float(), sigma, words)
        return velocity.float()
