"""Low-rank adapters (LoRA, 2106.09685) on the transformer of a pipeline, through peft."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig

from entroflow.errors import InputError

ADAPTER = "default"
"""Name of the trained adapter; diffusers and peft look for this one where none is named."""
ATTENTION = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
"""Ends of the names of the attention's projections, in both kinds of transformers."""
Initial = Literal["gaussian", "uniform"]
"""Of A: normal, or Kaiming uniform; B starts from 0."""


def new_lora(
    transformer: Any, rank: int, alpha: int, targets: Sequence[str], initial: Initial
) -> None:
    """Add an adapter W + alpha / rank B A to linear modules; the same A every time.

    A is part of the reference that a run is resumed against.

    Args:
        targets: ends of the names of the modules.

    Raises:
        InputError: no module has such a name.
    """
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets),
        init_lora_weights="gaussian" if initial == "gaussian" else True,
    )  # fmt: skip
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transformer.add_adapter(config, ADAPTER)
    except ValueError:
        paths = [name.split(".", 2)[-1] for name, _ in transformer.named_modules()]
        linear = sorted({path for path in paths if path.startswith("attn.")})
        raise InputError(
            f"policy.lora_targets: no module is named like {', '.join(targets)}; there are "
            f"{', '.join(linear)}, and others."
        ) from None
    _train(transformer)


def load_lora(pipeline: Any, path: Path) -> None:
    """Load an adapter as diffusers saves it, to go on training it; rank and alpha are its own.

    Raises:
        InputError: there is none, or not for this model.
    """
    if not path.exists():
        raise InputError(f"policy.lora_start: there is no {path}.")
    try:
        pipeline.load_lora_weights(str(path), adapter_name=ADAPTER)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"policy.lora_start: {path} holds no LoRA for this model "
            f"({str(error).splitlines()[0]})."
        ) from None
    _train(pipeline.transformer)


def _train(transformer: Any) -> None:
    """Make the adapter trainable, in float32: small steps are lost in half precision."""
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
