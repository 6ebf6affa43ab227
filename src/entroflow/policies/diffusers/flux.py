"""FLUX.1 as a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from pydantic import Field
from torch import Tensor

from entroflow.policies.diffusers.base import DiffusersConfig, DiffusersPolicy
from entroflow.policies.diffusers.loading import load_pipeline
from entroflow.policies.grid import shifted_grid


class FluxConfig(DiffusersConfig):
    """FLUX.1-dev or a model of its kind, from a folder or a model hub."""

    type: Literal["flux"] = "flux"
    tokens: int = Field(512, ge=1, description="most tokens of a prompt for the T5 encoder")
    shift: float | None = Field(
        None,
        gt=0,
        description="fixed shift of the grid, as DanceGRPO, MixGRPO and E-GRPO have it; the "
        "scheduler's own, which depends on the resolution, if not given",
    )

    def build(self) -> FluxPolicy:
        """Load the pipeline.

        Raises:
            InputError: there is none of this class.
        """
        return self.over(load_pipeline(self, "FluxPipeline"))

    def over(self, pipeline: Any) -> FluxPolicy:
        """See `DiffusersConfig.over`."""
        return FluxPolicy(pipeline, self)


class FluxPolicy(DiffusersPolicy):
    """Guidance is an input of the network (distilled), so every velocity is one pass."""

    settings: FluxConfig

    def evaluations(self, guidance: float) -> int:
        """One pass, whatever the guidance."""
        return 1

    def sigmas(self, steps: int) -> Tensor:
        """[steps + 1], of the fixed shift or as the pipeline's scheduler has them."""
        shift = self.settings.shift
        return self.own_sigmas(steps) if shift is None else shifted_grid(steps, shift)

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `DiffusersPolicy.embedding_shapes`."""
        config = self.pipeline.transformer.config
        return {
            "embedded": (self.settings.tokens, config.joint_attention_dim),
            "pooled": (config.pooled_projection_dim,),
        }

    def _embed(self, prompts: list[str]) -> dict[str, Tensor]:
        embedded, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self._device, max_sequence_length=self.settings.tokens
        )
        return {"embedded": embedded, "pooled": pooled}

    def _predict(
        self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        B, _, height, width = x.shape
        steps = self.pipeline.scheduler.config.num_train_timesteps
        guided = self.pipeline.transformer.config.guidance_embeds
        velocity = self._network(
            hidden_states=self._packed(x),
            # In the precision of the latents, as in the pipeline.
            timestep=(sigma * steps).to(x.dtype) / steps,
            guidance=torch.full_like(sigma, guidance) if guided else None,
            pooled_projections=cond["pooled"],
            encoder_hidden_states=cond["embedded"],
            txt_ids=torch.zeros(cond["embedded"].shape[1], 3).to(x),
            img_ids=FluxPipeline._prepare_latent_image_ids(
                B, height // 2, width // 2, x.device, x.dtype
            ),
            return_dict=False,
        )[0]
        return self._unpacked(velocity)

    def _packed(self, x: Tensor) -> Tensor:
        packed: Tensor = FluxPipeline._pack_latents(x, *x.shape)
        return packed

    def _unpacked(self, latents: Tensor) -> Tensor:
        side = self.settings.resolution
        unpacked: Tensor = FluxPipeline._unpack_latents(
            latents, side, side, self.pipeline.vae_scale_factor
        )
        return unpacked

    def _schedule(self, steps: int) -> None:
        scheduler = self.pipeline.scheduler
        _, height, width = self.latent_shape
        mu = calculate_shift(
            (height // 2) * (width // 2),
            scheduler.config.base_image_seq_len, scheduler.config.max_image_seq_len,
            scheduler.config.base_shift, scheduler.config.max_shift,
        )  # fmt: skip
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)

    def _text_keys(self) -> slice:
        return slice(0, self.settings.tokens)

    def _channels(self) -> int:
        return int(self.pipeline.transformer.config.in_channels) // 4
