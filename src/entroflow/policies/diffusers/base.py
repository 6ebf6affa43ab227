"""What all policies over diffusers pipelines share: loading, encoding, decoding, LoRA, precision.

    pipeline -> transformer with LoRA (trained) + encoders, VAE, scheduler (as they are)

States stay on the CPU in float32 and the network is where `device` says: `velocity` moves its
arguments in and its result back, so no algorithm knows of a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from entroflow.component import Component
from entroflow.errors import InputError
from entroflow.places import PathOrName
from entroflow.policies.attention import is_watched
from entroflow.policies.base import Condition, Memory, Reading, WeightSets
from entroflow.policies.diffusers.embeddings import EmbeddingCache, origin_of
from entroflow.policies.diffusers.joint_attention import shown_attention
from entroflow.policies.diffusers.loading import is_one_file
from entroflow.policies.diffusers.lora import (
    ADAPTER,
    ATTENTION,
    Initial,
    lora_layers,
    new_lora,
    save_lora,
    start_lora,
)
from entroflow.policies.diffusers.lora_files import read_lora
from entroflow.policies.diffusers.memory import memory_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MOST_IN_MEMORY = 512
"""Prompts whose embeddings are in memory where they are on disk, too: some MB each."""
ENCODED_AT_ONCE = 16
"""Prompts in one call of the text encoders."""


class DiffusersConfig(Component):
    """Settings of every policy over a diffusers pipeline."""

    model: Annotated[str, PathOrName()] = Field(
        description="folder of the pipeline, its name on a model hub, or a .safetensors file"
    )
    variant: str | None = Field(
        None, description="of the weights in the folder, as fp16 for *.fp16.safetensors"
    )
    config: Annotated[str | None, PathOrName()] = Field(
        None,
        description="folder (or hub name) of a pipeline of the same kind, where model is a file: "
        "configurations, tokenizers and what the file lacks are taken from there",
    )
    resolution: int = Field(512, ge=16, description="width and height of images, in pixels")
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="of the transformer's and encoders' arithmetic; states are float32"
    )
    lora_rank: int | None = Field(
        32, ge=1, description="of the LoRA that is trained; null trains the whole transformer"
    )
    lora_alpha: int = Field(64, ge=1, description="scale of the LoRA, over its rank")
    lora_targets: tuple[str, ...] | None = Field(
        None,
        description="ends of the names of the modules that it changes; attention by default",
    )
    lora_init: Initial = Field(
        "gaussian", description="of its first factor, normal or Kaiming uniform; the other is 0"
    )
    lora_start: Path | None = Field(
        None,
        description="LoRA to start from, a file or a folder, as diffusers, PEFT, ComfyUI or kohya "
        "write it; it has its own rank, alpha and targets",
    )
    reference: Literal["base", "start"] = Field(
        "start",
        description="what the KL and comparisons refer to: the model as it starts, or (with "
        "lora_start) without any LoRA",
    )
    tokens: int = Field(256, ge=1, description="most tokens of a prompt for the T5 encoder")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass, to save memory"
    )
    compile: bool = Field(False, description="torch.compile the transformer")
    device: str | None = Field(
        None, description="of transformer and VAE, as cuda:1; an accelerator if there is one"
    )
    offload_encoders: bool = Field(
        False, description="keep the text encoders on the CPU but while they encode"
    )
    cache: Path | None = Field(None, description="folder that keeps text embeddings")
    tiled_vae: bool = Field(False, description="decode in tiles, to save memory")

    @model_validator(mode="after")
    def _one_kind_of_training(self) -> Self:
        if self.lora_rank is None and (self.lora_start is not None or self.reference == "base"):
            raise ValueError(
                "lora_start and reference: base are for a LoRA, but lora_rank is null: the whole "
                "transformer is trained"
            )
        return self

    @model_validator(mode="after")
    def _folder_or_file(self) -> Self:
        if is_one_file(self.model) and self.config is None:
            raise ValueError(
                "model is one file, so config must name a folder (or hub name) of a pipeline of "
                "its kind, for the configurations, the tokenizers and what the file lacks"
            )
        if self.config is not None and not is_one_file(self.model):
            raise ValueError("config is for a model that is one file; a folder has its own")
        return self

    def over(self, pipeline: Any) -> DiffusersPolicy:
        """The policy over a pipeline that is there already."""
        raise NotImplementedError

    def dtype_of(self, component: str) -> torch.dtype:
        """In which a component of the pipeline is kept."""
        # Half-precision VAEs overflow, and the small steps of training are lost in such weights.
        exact = component == "vae" or (component == "transformer" and self.lora_rank is None)
        return torch.float32 if exact else DTYPES[self.precision]

    def memory(self, *, guidance: float, batch_size: int, micro_batch: int) -> Memory:
        """What a run takes on the device, computed without loading any weights; see `memory_of`."""
        return memory_of(
            self, guidance=guidance, batch_size=batch_size, micro_batch=micro_batch,
            prompts_at_once=ENCODED_AT_ONCE,
        )  # fmt: skip


class DiffusersPolicy:
    """The three verbs over a pipeline; what differs between models is in `_embed`, `_predict`,
    `_schedule` and `_channels`.

    Attributes:
        pipeline: the pipeline, whose transformer is what is trained.
        settings: what it was built from.
    """

    def __init__(self, pipeline: Any, settings: DiffusersConfig) -> None:
        self.pipeline, self.settings = pipeline, settings
        self._device = torch.device(settings.device or _default_device())
        self.dtype = DTYPES[settings.precision]
        self._embeddings: dict[str, dict[str, Tensor]] = {}
        self._cache: EmbeddingCache | None = None
        pipeline.set_progress_bar_config(disable=True)
        for name, module in _modules(pipeline).items():
            if getattr(module, "peft_config", None):
                raise InputError(
                    f"policy: the pipeline's {name} has a LoRA already, which would be lost: fuse "
                    "it first (pipe.fuse_lora, pipe.unload_lora_weights), or name its file as "
                    "policy.lora_start."
                )
            module.eval().requires_grad_(False)
        transformer = pipeline.transformer
        if settings.lora_rank is None:
            transformer.requires_grad_(True)
        elif settings.lora_start is not None:
            start_lora(transformer, read_lora(settings.lora_start, transformer))
        else:
            new_lora(
                transformer, settings.lora_rank, settings.lora_alpha,
                settings.lora_targets or ATTENTION, settings.lora_init,
            )  # fmt: skip
        if settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if settings.tiled_vae:
            pipeline.vae.enable_tiling()
        transformer.to(self._device)
        pipeline.vae.to(self._device)
        self._rest_encoders()
        self._network = torch.compile(transformer) if settings.compile else transformer
        parameters = dict(transformer.named_parameters())
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        self.weights = WeightSets(trained, dict(self._frozen()))
        if settings.reference == "base" and settings.lora_rank is not None:
            without = {n: torch.zeros_like(p) if ".lora_B." in n else p for n, p in trained.items()}
            self.weights.keep("reference", without)
        self.latent_shape = self._latent_shape()
        if settings.cache is not None:
            origin = origin_of(
                pipeline, settings.precision, settings.tokens, self.embedding_shapes()
            )
            self._cache = EmbeddingCache(settings.cache, origin)

    # --- the verbs -----------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Text embeddings, on the CPU; each prompt is encoded once and remembered."""
        if self._cache is not None and len(self._embeddings) > MOST_IN_MEMORY:
            self._embeddings.clear()
        missing = [text for text in dict.fromkeys(prompts) if text not in self._embeddings]
        unknown = [text for text in missing if not self._recall(text)]
        if unknown:
            self._wake_encoders()
            for first in range(0, len(unknown), ENCODED_AT_ONCE):
                texts = unknown[first : first + ENCODED_AT_ONCE]
                with torch.no_grad():
                    found = {name: value.cpu() for name, value in self._embed(texts).items()}
                for number, text in enumerate(texts):
                    self._remember(text, {name: v[number].clone() for name, v in found.items()})
            self._rest_encoders()
        names = self._embeddings[prompts[0]] if prompts else {}
        return Condition({n: torch.stack([self._embeddings[t][n] for t in prompts]) for n in names})

    def readings(self, prompts: Sequence[str]) -> list[Reading]:
        """See `ReadsPrompts`: of the CLIPs, which share their tokens, one; and T5."""
        found: dict[str, Reading] = {}
        parts = self.pipeline.components
        for name, tokenizer in parts.items():
            if not name.startswith("tokenizer") or not prompts:
                continue
            if tokenizer is None or parts.get(name.replace("tokenizer", "text_encoder")) is None:
                continue
            t5 = "T5" in type(tokenizer).__name__
            encoder = "T5" if t5 else "CLIP"
            limit = self.settings.tokens if t5 else self.pipeline.tokenizer_max_length
            ids = tokenizer(list(prompts), verbose=False)["input_ids"]
            found.setdefault(encoder, Reading(encoder, limit, [len(of_one) for of_one in ids]))
        return list(found.values())

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition, guidance: float) -> Tensor:
        """Velocity [B, *latent_shape] in float32, where x is.

        Args:
            x: [B, *latent_shape].
            sigma: [B].
            cond: of B prompts.
            guidance: as the pipeline takes it.

        Raises:
            InputError: its attention is to be watched, but it is compiled.
        """
        there = self._device
        tensors = {name: value.to(there) for name, value in cond.tensors.items()}
        with self._mixed(), self._shown():
            velocity = self._predict(
                x.to(there, self.dtype), sigma.to(there, torch.float32), tensors, guidance
            )
        return velocity.float().to(x.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], on the CPU; one at a time, in float32."""
        vae = self.pipeline.vae
        latents = latents.float() / vae.config.scaling_factor + vae.config.shift_factor
        images = [vae.decode(each[None].to(self._device)).sample.cpu() for each in latents]
        return ((torch.cat(images) + 1) / 2).clamp(0, 1)

    def sigmas(self, steps: int) -> Tensor:
        """[steps + 1], as the pipeline's scheduler has them at this resolution."""
        return self.own_sigmas(steps)

    def own_sigmas(self, steps: int) -> Tensor:
        """[steps + 1], the pipeline's, whatever the recipe wants."""
        self._schedule(steps)
        sigmas: Tensor = self.pipeline.scheduler.sigmas.double().cpu()
        return sigmas

    def evaluations(self, guidance: float) -> int:
        """Network passes that one velocity costs per image."""
        raise NotImplementedError

    @torch.no_grad()
    def by_pipeline(self, prompts: Sequence[str], x: Tensor, steps: int, guidance: float) -> Tensor:
        """Latents [P, *latent_shape] that the pipeline's own call leads x to, on its own grid."""
        self._wake_encoders()
        side = self.settings.resolution
        with self._mixed():
            found: Tensor = self.pipeline(
                list(prompts), height=side, width=side, num_inference_steps=steps,
                guidance_scale=guidance, latents=self._packed(x.to(self._device)),
                output_type="latent", max_sequence_length=self.settings.tokens,
                **self._call_options(),
            ).images  # fmt: skip
        self._rest_encoders()
        return self._unpacked(found).float().cpu()

    def export(self, folder: Path, *, merged: bool) -> None:
        """Write the active weights: the LoRA, or a whole pipeline where `merged` or all is trained.

        The policy is of no use afterwards where a LoRA was merged.
        """
        transformer = self.pipeline.transformer
        if self.settings.lora_rank is not None:
            if not merged:
                save_lora(self.pipeline, folder)
                return
            transformer.float()
            transformer.fuse_lora(adapter_names=[ADAPTER])
            transformer.unload_lora()
        transformer.to(self.dtype)
        self.pipeline.save_pretrained(folder)

    # --- what differs --------------------------------------------------------------------------

    def _embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """Text embeddings by name, first axis P, by the pipeline's encoders."""
        raise NotImplementedError

    def _predict(
        self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        """The transformer's velocity, as the pipeline calls it."""
        raise NotImplementedError

    def _schedule(self, steps: int) -> None:
        """Set the scheduler's sigmas, as the pipeline does."""
        raise NotImplementedError

    def _channels(self) -> int:
        """Channels of the latents."""
        raise NotImplementedError

    def _text_keys(self) -> slice:
        """Which keys of joint attention are text."""
        raise NotImplementedError

    def _largest_latent(self) -> float:
        """Most values along a side of the latents."""
        return math.inf

    def _packed(self, x: Tensor) -> Tensor:
        """Latents as the pipeline's call takes them."""
        return x

    def _unpacked(self, latents: Tensor) -> Tensor:
        """Inverse of `_packed`."""
        return latents

    def _call_options(self) -> dict[str, Any]:
        """What else the pipeline's call must be told."""
        return {}

    # --- the rest ------------------------------------------------------------------------------

    def _mixed(self) -> torch.autocast:
        """Products in the precision of the settings."""
        mixed = self.dtype != torch.float32
        return torch.autocast(self._device.type, self.dtype, enabled=mixed, cache_enabled=False)

    def _shown(self) -> AbstractContextManager[None]:
        """Shows attention inside, if anybody watches."""
        if not is_watched():
            return nullcontext()
        if self.settings.compile:
            raise InputError(
                "attention can't be measured in a compiled transformer: set policy.compile=false."
            )
        return shown_attention(self.pipeline.transformer, self._text_keys())

    def stay_on(self, device: str) -> None:
        """Compute there from now on; the modules are there already."""
        self._device = torch.device(device)

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's text embeddings, by name, as `encode` gives them."""
        raise NotImplementedError

    def _latent_shape(self) -> tuple[int, int, int]:
        side, factor = self.settings.resolution, 2 * self.pipeline.vae_scale_factor
        if side % factor:
            raise InputError(
                f"policy.resolution is {side}, but must be a multiple of {factor} for this model."
            )
        latent, most = 2 * side // factor, self._largest_latent()
        if latent > most:
            raise InputError(
                f"policy.resolution is {side}, but this model draws up to {most * factor // 2}."
            )
        return self._channels(), latent, latent

    def encoders(self) -> list[torch.nn.Module]:
        """The text encoders of the pipeline."""
        return [
            part for name, part in self.pipeline.components.items()
            if name.startswith("text_encoder") and part is not None
        ]  # fmt: skip

    def _wake_encoders(self) -> None:
        for encoder in self.encoders():
            encoder.to(self._device)

    def _rest_encoders(self) -> None:
        place = torch.device("cpu") if self.settings.offload_encoders else self._device
        for encoder in self.encoders():
            encoder.to(place)

    def _frozen(self) -> Iterator[tuple[str, Tensor]]:
        """All else that decides about images: a run is not resumed where it differs."""
        for part, module in _modules(self.pipeline).items():
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    yield (name if part == "transformer" else f"{part}.{name}"), parameter
        for name, layer in lora_layers(self.pipeline.transformer).items():
            yield f"{name}.scaling", torch.tensor(layer.scaling[ADAPTER])

    def _remember(self, text: str, tensors: dict[str, Tensor]) -> None:
        self._embeddings[text] = tensors
        if self._cache is not None:
            self._cache.write(text, tensors)

    def _recall(self, text: str) -> bool:
        """Whether the embeddings of a prompt were kept on disk; then they are here now."""
        kept = None if self._cache is None else self._cache.read(text)
        if kept is not None:
            self._embeddings[text] = kept
        return kept is not None


def _modules(pipeline: Any) -> dict[str, torch.nn.Module]:
    components = pipeline.components.items()
    return {name: part for name, part in components if isinstance(part, torch.nn.Module)}


def _default_device() -> str:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator is not None else "cpu"
