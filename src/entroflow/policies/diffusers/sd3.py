"""Stable Diffusion 3 and 3.5 (2403.03206) as a policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from pydantic import Field
from torch import Tensor

from entroflow.policies.attention import conditional
from entroflow.policies.base import Condition
from entroflow.policies.diffusers.base import DiffusersConfig, DiffusersPolicy
from entroflow.policies.diffusers.loading import load_pipeline

NEGATIVE = "negative_"
"""Before the names of the negative prompt's embeddings."""


class SD3Config(DiffusersConfig):
    """Stable Diffusion 3 or 3.5, from a folder or a model hub."""

    type: Literal["sd3"] = "sd3"
    negative_prompt: str = Field("", description="what guidance leads away from")

    def build(self) -> SD3Policy:
        """Load the pipeline.

        Raises:
            InputError: there is none of this class.
        """
        return self.over(load_pipeline(self, "StableDiffusion3Pipeline"))

    def over(self, pipeline: Any) -> SD3Policy:
        """See `DiffusersConfig.over`."""
        return SD3Policy(pipeline, self)


class SD3Policy(DiffusersPolicy):
    """Guidance above 1 is classifier-free, in two passes; else there is none."""

    settings: SD3Config

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Text embeddings, and beside each those of the negative prompt."""
        own = super().encode(prompts).tensors
        negative = super().encode([self.settings.negative_prompt]).tensors
        beside = {f"{NEGATIVE}{name}": v.expand_as(own[name]) for name, v in negative.items()}
        return Condition({**own, **beside})

    def evaluations(self, guidance: float) -> int:
        """One pass, or two with guidance above 1."""
        return 2 if guidance > 1 else 1

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `DiffusersPolicy.embedding_shapes`; the two CLIPs' tokens come before those of T5."""
        config = self.pipeline.transformer.config
        tokens = self.pipeline.tokenizer_max_length + self.settings.tokens
        own = {
            "embedded": (tokens, config.joint_attention_dim),
            "pooled": (config.pooled_projection_dim,),
        }
        return {**own, **{f"{NEGATIVE}{name}": shape for name, shape in own.items()}}

    def _embed(self, prompts: list[str]) -> dict[str, Tensor]:
        embedded, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, prompts, prompts, device=self._device, do_classifier_free_guidance=False,
            max_sequence_length=self.settings.tokens,
        )  # fmt: skip
        return {"embedded": embedded, "pooled": pooled}

    def _predict(
        self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        own = {name: value for name, value in cond.items() if not name.startswith(NEGATIVE)}
        if guidance <= 1:
            return self._forward(x, sigma, own)
        both = {name: torch.cat([cond[f"{NEGATIVE}{name}"], value]) for name, value in own.items()}
        with conditional(slice(len(x), None)):
            forward = self._forward(torch.cat([x, x]), torch.cat([sigma, sigma]), both)
        of_negative, of_prompt = forward.chunk(2)
        return of_negative + guidance * (of_prompt - of_negative)

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

    def _call_options(self) -> dict[str, Any]:
        return {"negative_prompt": self.settings.negative_prompt}

    def _text_keys(self) -> slice:
        patch = self.pipeline.transformer.config.patch_size
        _, height, width = self.latent_shape
        return slice((height // patch) * (width // patch), None)

    def _largest_latent(self) -> float:
        config = self.pipeline.transformer.config
        return (config.pos_embed_max_size or math.inf) * int(config.patch_size)

    def _channels(self) -> int:
        return int(self.pipeline.transformer.config.in_channels)
