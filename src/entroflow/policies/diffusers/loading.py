"""Load a pipeline: from a folder, from a model hub, or from one file in its authors' layout."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open
from torch import nn

from entroflow.errors import InputError

if TYPE_CHECKING:
    from entroflow.policies.diffusers.base import DiffusersConfig

ONE_FILE = ".safetensors"
"""End of the name of a checkpoint that is one file."""
NOT_READ = (".ckpt", ".pt", ".pth", ".bin", ".gguf", ".sft")
"""Of pickles, which may run code, of quantised weights, and of what diffusers does not know."""
CLIP_L, CLIP_G, T5 = (f"text_encoders.{name}." for name in ("clip_l", "clip_g", "t5xxl"))
VAE = ("first_stage_model.", "vae.")
LAYOUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "StableDiffusion3Pipeline": {
        "transformer": ("joint_blocks.0.", "transformer_blocks.0."), "vae": VAE,
        "text_encoder": (CLIP_L,), "text_encoder_2": (CLIP_G,), "text_encoder_3": (T5,),
    },
    "FluxPipeline": {
        "transformer": ("double_blocks.0.", "transformer_blocks.0."), "vae": VAE,
        "text_encoder": (CLIP_L,), "text_encoder_2": (T5,),
    },
}  # fmt: skip
"""What the names of a part's tensors contain in a file that has it, in the authors' or diffusers'
layout; by the class of the pipeline and the name of the part."""
BLOCK = re.compile(r"(?<!\w)(joint|double|single|transformer|single_transformer)_blocks\.\d")
"""In the names of the tensors of a transformer's blocks, in either layout."""
QUANTISED = ("scaled_fp8", "scale_weight", "weight_scale", "quant_state", "absmax")
"""In the names of tensors that others are to be multiplied by before they are weights."""
UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError,
    SingleFileComponentError,
)  # fmt: skip
"""What diffusers raises for weights that are missing, torn, or of another model."""


def is_one_file(model: str) -> bool:
    """Whether a model is a file, not a folder or a name on a hub."""
    return model.lower().endswith((ONE_FILE, *NOT_READ)) or os.path.isfile(model)


def load_pipeline(settings: DiffusersConfig, kind: str) -> Any:
    """The pipeline of a folder, hub name or file.

    Args:
        kind: name of the class that it must be of.

    Raises:
        InputError: there is none, or it is of another class.
    """
    if is_one_file(settings.model):
        return _from_one_file(settings, kind)
    try:
        pipeline = _from_folder(settings.model, settings)
    except UNREADABLE as error:
        raise no_pipeline(settings, error) from None
    if type(pipeline).__name__ != kind:
        raise InputError(
            f"policy.model: {settings.model} is a {type(pipeline).__name__}, not a {kind}."
        )
    return pipeline


def _from_folder(folder: str, settings: DiffusersConfig, **without: None) -> Any:
    dtypes = {name: settings.dtype_of(name) for name in ("vae", "transformer", "default")}
    return DiffusionPipeline.from_pretrained(
        folder, dtype=dtypes, variant=settings.variant, **without
    )


def no_pipeline(settings: DiffusersConfig, error: Exception) -> InputError:
    """What to say where a folder or hub name can't be read."""
    where = f"policy.{'model' if settings.config is None else 'config'}"
    place = settings.config or settings.model
    there = _variants(Path(place)) - {settings.variant}
    if settings.config is None and there:
        remedy = f"its weights are of the variant {' or '.join(sorted(there))}: set policy.variant"
    else:
        remedy = "give a folder, or a name on the hub that `hf download` can get"
    return InputError(f"{where}: no pipeline at {place} ({_first_line(error)}); {remedy}.")


def _variants(folder: Path) -> set[str]:
    """The variants of which a folder has weights, as fp16."""
    names = [path.name.split(".") for path in folder.glob("*/*.safetensors")]
    return {parts[1].split("-")[0] for parts in names if len(parts) == 3}


def _from_one_file(settings: DiffusersConfig, kind: str) -> Any:
    """What a file lacks, and all configurations and tokenizers, come from `policy.config`."""
    assert settings.config is not None
    file, place = settings.model, settings.config
    names = _names(Path(file))
    quantised = [name for name in names if any(sign in name for sign in QUANTISED)]
    if quantised:
        raise InputError(
            f"policy.model: the weights of {file} are quantised ({quantised[0]}); take a file in "
            "bf16, fp16 or fp32."
        )
    layouts = LAYOUTS[kind]
    there = {
        part for part, signs in layouts.items()
        if any(sign in name for sign in signs for name in names)
    }  # fmt: skip
    if "transformer" not in there:
        raise InputError(
            f"policy.model: {file} is no {kind}: none of its {len(names)} tensors is called "
            f"{' or '.join(layouts['transformer'])}..., as {next(iter(names), 'there are none')}."
        )
    try:
        index: Any = DiffusionPipeline.load_config(place)
    except UNREADABLE as error:
        raise no_pipeline(settings, error) from None
    if index.get("_class_name") != kind:
        raise InputError(f"policy.config: {place} is a {index.get('_class_name')}, not a {kind}.")
    try:
        rest = _from_folder(place, settings, **dict.fromkeys(there))
        parts = {name: part for name, part in rest.components.items() if name not in there}
        pipeline = getattr(diffusers, kind).from_single_file(file, config=place, **parts)
        _check_whole(pipeline, there, file)
    except UNREADABLE as error:
        raise InputError(
            f"policy.model: {file} can't be loaded with the configuration of {place} "
            f"({_first_line(error)}); what the file lacks must be there."
        ) from None
    for name in there:
        nn.Module.to(getattr(pipeline, name), settings.dtype_of(name))
    return pipeline


def _check_whole(pipeline: Any, parts: Iterable[str], file: str) -> None:
    """Refuse a file whose tensors are fewer or more than those of the configuration.

    Raises:
        ValueError: they are; diffusers leaves out in silence what it has no place for.
    """
    for part in parts:
        for name, tensor in getattr(pipeline, part).state_dict().items():
            if tensor.is_meta:
                raise ValueError(f"the file has no {name} of the {part}")
    with safe_open(file, framework="pt") as opened:
        shapes = [opened.get_slice(n).get_shape() for n in opened.keys() if BLOCK.search(n)]  # noqa: SIM118
    weights = pipeline.transformer.state_dict().items()
    expected = sum(tensor.numel() for name, tensor in weights if BLOCK.search(name))
    values = sum(math.prod(shape) for shape in shapes)
    if values != expected:
        raise ValueError(f"the blocks of its transformer hold {values:,} values, not {expected:,}")


def _names(file: Path) -> list[str]:
    """Of the tensors in a file."""
    if not file.is_file():
        raise InputError(f"policy.model: there is no file {file}.")
    if not file.name.lower().endswith(ONE_FILE):
        raise InputError(f"policy.model: {file} is no {ONE_FILE} file; convert it first.")
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"policy.model: {file} is torn ({_first_line(error)}).") from None


def _first_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return (str(error).splitlines() or [type(error).__name__])[0]
