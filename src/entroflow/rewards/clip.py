"""How well image and prompt agree by a CLIP model; PickScore is one that learnt from people."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoProcessor, CLIPModel

from entroflow.component import Component
from entroflow.errors import InputError
from entroflow.pictures import to_pil
from entroflow.places import PathOrName
from entroflow.prompts import Prompt
from entroflow.rewards.base import Scores, Status


class CLIPScore(Component):
    """Similarity of image and prompt: the cosine of their embeddings by a CLIP model.

    `model: yuvalkirstain/PickScore_v1` with `processor: laion/CLIP-ViT-H-14-laion2B-s32B-b79K` and
    `scaled: true` is PickScore (2305.01569). Prompts are cut at the model's length.
    """

    type: Literal["clip"] = "clip"
    model: Annotated[str, PathOrName()] = Field(
        "openai/clip-vit-large-patch14", description="CLIP model: a name or a folder"
    )
    processor: Annotated[str | None, PathOrName()] = Field(
        None, description="of images and words; the model's if unset"
    )
    scaled: bool = Field(False, description="times the model's own scale, as PickScore has it")
    batch_size: int = Field(32, ge=1, description="most images in one pass")
    device: str | None = Field(None, description="as cuda or cpu; the accelerator if there is one")

    def check(self) -> None:
        """See `Component.check`: load the model, which stays loaded."""
        super().check()
        _ = self._loaded

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """See `Reward.score`.

        Raises:
            InputError: there is no such model, it is not whole, or there is no such device.
        """
        parts = [
            self._cosines(
                images[start : start + self.batch_size], prompts[start:][: self.batch_size]
            )
            for start in range(0, len(images), self.batch_size)
        ]
        return Scores(torch.cat(parts), (Status.OK,) * len(images))

    def _cosines(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        model, processor = self._loaded
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        inputs = processor(
            text=texts, images=[to_pil(image) for image in images],
            return_tensors="pt", padding=True, truncation=True,
        )  # fmt: skip
        found = model(**inputs.to(model.device))
        own = [texts.index(prompt.text) for prompt in prompts]
        # Both are of length 1 already.
        cosines = (found.image_embeds.double() * found.text_embeds.double()[own]).sum(dim=1)
        scale = model.logit_scale.double().exp() if self.scaled else 1.0
        values: Tensor = (scale * cosines).cpu()
        return values

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        # transformers declares no pair for the second argument.
        load: Any = CLIPModel.from_pretrained
        try:
            model, report = load(self.model, output_loading_info=True)
            processor = AutoProcessor.from_pretrained(self.processor or self.model)
        except Exception as error:  # what is raised of damaged files is written down nowhere
            reason = " ".join(str(error).split())
            raise InputError(
                f"the CLIP model {self.model} can't be loaded ({reason:.200})."
            ) from None
        # Weights that a folder lacks are made up at random: rewards would mean nothing.
        if missing := sorted(report["missing_keys"]):
            raise InputError(
                f"the CLIP model {self.model} lacks {len(missing)} tensors, as {missing[0]}; give "
                "a folder that holds all of it."
            )
        accelerator = torch.accelerator.current_accelerator()
        device = self.device or ("cpu" if accelerator is None else accelerator.type)
        try:
            return model.eval().to(device), processor
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"device: can't use {device} ({reason:.200}).") from None
