"""Stable Diffusion 3 and 3.5 (2403.03206) as a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from pydantic import Field
from torch import Tensor

from entroflow.policies.base import Condition
from entroflow.policies.diffusers.base import DiffusersConfig, DiffusersPolicy, load_pipeline


class SD3Config(DiffusersConfig):
    """Stable Diffusion 3 or 3.5, from a folder or a model hub."""

    type: Literal["sd3"] = "sd3"
    negative_prompt: str = Field("", description="what guidance leads away from")

    def build(self) -> SD3Policy:
        """Load the pipeline.

        Raises:
            InputError: there is none of this class.
        """
        return SD3Policy(load_pipeline(self, "StableDiffusion3Pipeline"), self)


class SD3Policy(DiffusersPolicy):
    """Guidance above 1 is classifier-free, in two passes; else there is none."""

    settings: SD3Config

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Text embeddings, and those of the negative prompt for `velocity`."""
        self._negative = super().encode([self.settings.negative_prompt]).tensors
        return super().encode(prompts)

    def evaluations(self, guidance: float) -> int:
        """One pass, or two with guidance above 1."""
        return 2 if guidance > 1 else 1

    def _embed(self, prompts: list[str]) -> dict[str, Tensor]:
        embedded, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, prompts, prompts, device=self._device, do_classifier_free_guidance=False,
            max_sequence_length=self.settings.tokens,
        )  # fmt: skip
        return {"embedded": embedded, "pooled": pooled}

    def _predict(
        self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        if guidance <= 1:
            return self._forward(x, sigma, cond)
        both = {
            name: torch.cat([self._negative[name].to(value).expand_as(value), value])
            for name, value in cond.items()
        }
        forward = self._forward(torch.cat([x, x]), torch.cat([sigma, sigma]), both)
        unconditional, conditional = forward.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def _forward(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        velocity: Tensor = self._network(
            hidden_states=x,
            timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond["embedded"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]
        return velocity

    def _schedule(self, steps: int) -> None:
        scheduler, mu = self.pipeline.scheduler, None
        if scheduler.config.use_dynamic_shifting:
            _, height, width = self.latent_shape
            patch = self.pipeline.transformer.config.patch_size
            mu = calculate_shift(
                (height // patch) * (width // patch),
                scheduler.config.base_image_seq_len, scheduler.config.max_image_seq_len,
                scheduler.config.base_shift, scheduler.config.max_shift,
            )  # fmt: skip
        scheduler.set_timesteps(steps, mu=mu)

    def _channels(self) -> int:
        return int(self.pipeline.transformer.config.in_channels)
