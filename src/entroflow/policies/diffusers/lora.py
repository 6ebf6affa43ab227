"""Low-rank adapters (LoRA, 2106.09685) on the transformer of a pipeline, through peft."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from entroflow.errors import InputError
from entroflow.policies.diffusers.lora_files import Factors

ADAPTER = "default"
"""Name of the trained adapter; diffusers and peft look for this one where none is named."""
ATTENTION = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
"""Ends of the names of the attention's projections, in both kinds of transformers."""
Initial = Literal["gaussian", "uniform"]
"""Of A: normal, or Kaiming uniform; B starts from 0."""
Number = TypeVar("Number", int, float)


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


def start_lora(transformer: Any, factors: Mapping[str, Factors]) -> None:
    """Add the adapter that a file holds, to go on training it; each module has its own rank."""
    rank, ranks = _usual_and_others({name: each.rank for name, each in factors.items()})
    alpha, alphas = _usual_and_others({name: each.alpha for name, each in factors.items()})
    config = LoraConfig(
        r=rank, rank_pattern=ranks, lora_alpha=cast(int, alpha), alpha_pattern=alphas,
        target_modules=_any_of(factors),
    )  # fmt: skip
    with torch.random.fork_rng():
        transformer.add_adapter(config, ADAPTER)
    _train(transformer)
    for name, layer in lora_layers(transformer).items():
        layer.lora_A[ADAPTER].weight.data.copy_(factors[name].down)
        layer.lora_B[ADAPTER].weight.data.copy_(factors[name].up)


def lora_layers(transformer: Any) -> dict[str, Any]:
    """The modules that the adapter changes, by name."""
    return {
        name: module for name, module in transformer.named_modules()
        if isinstance(module, LoraLayer)
    }  # fmt: skip


def save_lora(pipeline: Any, folder: Path) -> None:
    """Write the adapter as diffusers does, with a strength of 1 for whoever reads it.

    alpha / rank is part of B, and alpha the rank: in diffusers' metadata, as its loader of Stable
    Diffusion 3 refuses a file with tensors for it; other programs take the rank for an alpha that
    is not there.
    """
    transformer = pipeline.transformer
    tensors, ranks = {}, {}
    for name, layer in lora_layers(transformer).items():
        tensors[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight.detach()
        up = layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]
        tensors[f"{name}.lora_B.weight"] = up
        ranks[name] = layer.r[ADAPTER]
    usual, others = _usual_and_others(ranks)
    # Not a whole configuration: other versions of PEFT refuse keys that they do not know.
    settings = {
        "r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others,
        "target_modules": _any_of(ranks),
    }  # fmt: skip
    type(pipeline).save_lora_weights(
        folder, transformer_lora_layers=tensors, transformer_lora_adapter_metadata=settings
    )


def _any_of(modules: Iterable[str]) -> str:
    """The pattern of PEFT that means these modules and no others whose names end like theirs."""
    return "|".join(re.escape(name) for name in modules)


def _usual_and_others(by_module: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
    """The value that most modules have, and those of the others by PEFT's patterns of names."""
    ((usual, _),) = Counter(by_module.values()).most_common(1)
    others = {f"^{re.escape(n)}": value for n, value in by_module.items() if value != usual}
    return usual, others


def _train(transformer: Any) -> None:
    """Make the adapter trainable, in float32: small steps are lost in half precision."""
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
