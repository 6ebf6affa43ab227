"""Read a LoRA from a file, whoever wrote it: diffusers, PEFT, ComfyUI, ai-toolkit, kohya, XLabs.

A file names each tensor `prefix + layer + part`. Prefixes say which program wrote it, layers have
diffusers' names or those of the model's authors (`original_names`), with dots or underscores, and
parts are the two factors and their alpha. A tensor that has no place is an error: a LoRA that is
loaded in part is another LoRA.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from entroflow.checkpoints import STATE_FILE
from entroflow.errors import InputError
from entroflow.policies.diffusers.original_names import original_layers

PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.",
    "lora_unet_", "lora_transformer_", "lycoris_",
)  # fmt: skip
"""Before a layer of the transformer: PEFT, ComfyUI and ai-toolkit, diffusers, kohya, LyCORIS."""
ENCODERS = ("text_encoder", "lora_te", "text_model", "clip_", "t5")
"""Before a layer of a text encoder."""
PARTS = {
    "down": re.compile(
        r"\.(lora_A|lora_A\.\w+(?=\.weight)|lora_down|lora\.down|lora_linear_layer\.down|down)(\.weight)?"
    ),
    "up": re.compile(
        r"\.(lora_B|lora_B\.\w+(?=\.weight)|lora_up|lora\.up|lora_linear_layer\.up|up)(\.weight)?"
    ),
    "alpha": re.compile(r"\.alpha"),
}
"""What follows the name of a layer; PEFT's own modules have the adapter's name in between."""
USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT call the file in a folder."""
CONFIG = "adapter_config.json"
"""PEFT's settings, beside its file."""
METADATA = "lora_adapter_metadata"
"""The same settings in the header of diffusers' file, each behind `transformer.`."""
PLAIN = {
    "peft_type": ("LORA",), "use_dora": (False,), "use_qalora": (False,), "lora_bias": (False,),
    "bias": ("none",), "modules_to_save": ((), []), "layer_replication": ((), []),
    "target_parameters": ((), []), "trainable_token_indices": ((), [], {}),
    # The others change the model's own weights, too.
    "init_lora_weights": (True, False, "gaussian", "eva"),
}  # fmt: skip
"""Settings of PEFT with which an adapter is W + scale B A and nothing else, where they are set."""
EXPECTED = "transformer_blocks.0.attn.to_q.lora_A.weight"
"""A name as an example of what is expected."""


@dataclass(frozen=True)
class Factors:
    """What a LoRA adds to the weight of one linear module: alpha / rank * up @ down.

    Attributes:
        down: [rank, values in], float32.
        up: [values out, rank], float32.
        alpha: its strength times its rank.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Of the change."""
        return len(self.down)


def read_lora(path: Path, transformer: nn.Module) -> dict[str, Factors]:
    """The factors in a file, or in the file of a folder, by the module that they change.

    Raises:
        InputError: there is no such file, or something in it has no place in this transformer.
    """
    file = _file_at(path)
    tensors, settings = _content(file)
    places = _places(transformer)
    layers: dict[str, dict[str, Tensor]] = {}
    unplaced: list[str] = []
    for name, tensor in tensors.items():
        layer, part = _layer_and_part(name)
        if part is None or _flat(layer) not in places:
            unplaced.append(name)
        elif part in layers.setdefault(layer, {}):
            raise _wrong(file, f"{name} and another name mean the same")
        else:
            layers[layer][part] = tensor
    if unplaced:
        raise _wrong(file, _about_unplaced(unplaced, len(tensors), transformer))
    factors: dict[str, Factors] = {}
    for layer, parts in layers.items():
        if not parts.keys() >= {"down", "up"}:
            (missing, *_) = {"down", "up"} - parts.keys()
            raise _wrong(file, f"{layer} has no lora_{'A' if missing == 'down' else 'B'}")
        try:
            changes = _changes(layer, parts, places[_flat(layer)], settings, transformer)
        except ValueError as error:
            raise _wrong(file, str(error)) from None
        if twice := factors.keys() & changes.keys():
            raise _wrong(file, f"{min(twice)} is changed twice, under different names")
        factors |= changes
    return factors


def _file_at(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise InputError(f"policy.lora_start: there is no {path}.")
    if only := _only_one(path):
        return only[0]
    there = sorted(path.glob("*.safetensors"))
    listed = f": {', '.join(file.name for file in there[:5])}" if there else ""
    raise InputError(
        f"policy.lora_start: {path} holds no LoRA for this model: it has {len(there)} .safetensors "
        f"files{listed}; name one."
    )


def _only_one(folder: Path) -> list[Path]:
    """The LoRA of a folder where it is clear which; else nothing."""
    there = sorted(folder.glob("*.safetensors"))
    usual = [file for file in there if file.name in USUAL]
    return next((files for files in (there, usual) if len(files) == 1), [])


def _content(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
    """The tensors of a file, and the settings that PEFT or diffusers wrote with them."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            header = (opened.metadata() or {}).get(METADATA)
    except (SafetensorError, OSError) as error:
        raise _wrong(file, f"it is no safetensors file, or torn ({error})") from None
    if not tensors:
        raise _wrong(file, "it is empty")
    if (file.parent / STATE_FILE).exists():
        raise _wrong(
            file, "it is a checkpoint without its alpha; take what entroflow export writes"
        )
    beside = file.parent / CONFIG
    if header is not None:
        settings, where, prefix = _object(header, file), file, "transformer."
    elif beside.is_file() and file in (beside.with_name(USUAL[1]), *_only_one(file.parent)):
        settings, where, prefix = _object(beside.read_bytes(), beside), beside, ""
    else:
        return tensors, None
    settings = {
        key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)
    }
    for key, plain in PLAIN.items():
        value = settings.get(key)
        if value is not None and value not in plain:
            raise _wrong(file, f"{where.name} sets {key} to {value!r}, which is no plain LoRA")
    return tensors, settings or None


def _object(content: str | bytes, file: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(content)
    except ValueError as error:
        raise _wrong(file, f"its settings are no JSON ({error})") from None
    if not isinstance(settings, dict):
        raise _wrong(file, "its settings are no JSON object")
    return settings


def _layer_and_part(name: str) -> tuple[str, str | None]:
    """The layer that a tensor is of, without prefixes, and which part; None for an unknown one."""
    layer, part = name, None
    for kind, pattern in PARTS.items():
        if match := re.fullmatch(rf"(?P<layer>.+?){pattern.pattern}", name):
            layer, part = match["layer"], kind
            break
    while prefix := next((p for p in PREFIXES if layer.startswith(p)), None):
        layer = layer.removeprefix(prefix)
    return layer, part


def _flat(name: str) -> str:
    """A name as kohya writes it."""
    return name.replace(".", "_")


@dataclass(frozen=True)
class _Place:
    """Where a layer of a file lies in the transformer.

    Attributes:
        modules: names of linear modules; the layer is their weights below each other.
        original: whether the layer has the name that the model's authors gave it.
    """

    modules: tuple[str, ...]
    original: bool = False


def _places(transformer: nn.Module) -> dict[str, _Place]:
    """Every layer that a file may name, flat."""
    places = {_flat(name): _Place(names, True) for name, names in original_layers(transformer)}
    return places | {_flat(name): _Place((name,)) for name, _ in transformer.named_modules()}


def _changes(
    layer: str,
    parts: Mapping[str, Tensor],
    place: _Place,
    settings: Mapping[str, Any] | None,
    transformer: nn.Module,
) -> dict[str, Factors]:
    """The factors of one layer of a file, by module.

    Raises:
        ValueError: they do not fit.
    """
    down, up = parts["down"], parts["up"]
    modules: list[Any] = [transformer.get_submodule(name) for name in place.modules]
    for name, module in zip(place.modules, modules, strict=True):
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{layer} changes {name}, which is no linear layer")
    values_in = int(modules[0].in_features)
    values_out = [int(module.out_features) for module in modules]
    if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1] or not len(down):
        raise ValueError(
            f"the factors of {layer} are {_shape(down)} and {_shape(up)}, where rank x "
            f"{values_in} and {sum(values_out)} x rank are expected"
        )
    if down.shape[1] != values_in or len(up) != sum(values_out):
        raise ValueError(
            f"{layer} leads from {down.shape[1]} to {len(up)} values, in this model from "
            f"{values_in} to {sum(values_out)}"
        )
    for factor in (down, up):
        if not factor.is_floating_point() or not factor.float().isfinite().all():
            raise ValueError(f"the factors of {layer} are no finite numbers")
    alpha = _alpha(layer, len(down), parts.get("alpha"), settings)
    changes = {}
    for name, rows in zip(place.modules, up.float().split(values_out), strict=True):
        parent = transformer.get_submodule(name.rpartition(".")[0])
        if place.original and type(parent).__name__ == "AdaLayerNormContinuous":
            # The authors' shift comes before the scale, diffusers' after it.
            rows = torch.cat(rows.chunk(2)[::-1])
        changes[name] = Factors(down.float().clone(), rows.clone(), alpha)
    return changes


def _alpha(
    layer: str, rank: int, tensor: Tensor | None, settings: Mapping[str, Any] | None
) -> float:
    """That of the layer itself, else by the settings of the file, else its rank: strength 1."""
    if tensor is not None:
        if tensor.numel() != 1:
            raise ValueError(f"the alpha of {layer} holds {tensor.numel()} values")
        alpha = float(tensor)
    elif settings is not None:
        try:
            own = dict(settings.get("alpha_pattern") or {})
            alpha = float(own.get(get_pattern_key(list(own), layer), settings["lora_alpha"]))
        except (AttributeError, KeyError, TypeError, ValueError, re.error):
            raise ValueError(f"its settings give no alpha for {layer}") from None
        if settings.get("use_rslora"):
            # Scaled by alpha over the root of the rank.
            alpha *= rank**0.5
    else:
        return float(rank)
    if not 0 < abs(alpha) < float("inf"):
        raise ValueError(f"the alpha of {layer} is {alpha:g}")
    return alpha


def _about_unplaced(names: list[str], total: int, transformer: nn.Module) -> str:
    """What is wrong with names of a file that have no place."""
    encoders = [
        name for name in names if name.removeprefix("base_model.model.").startswith(ENCODERS)
    ]
    unknown = [name for name in names if _layer_and_part(name)[1] is None]
    if encoders:
        odd = encoders
        why = (
            "change a text encoder, but only a LoRA of the transformer is trained and exported: "
            "fuse it into the model (pipe.load_lora_weights, fuse_lora, save_pretrained), or take "
            "these tensors out"
        )
    elif len(unknown) == total:
        odd, why = unknown, f"are no LoRA's; names like {EXPECTED} are expected"
    elif unknown:
        odd, why = unknown, "are no part of a plain LoRA (lora_A, lora_B and alpha)"
    else:
        odd, why = names, f"are for layers that this {type(transformer).__name__} lacks"
    return f"{len(odd)} of its {total} tensors, as {odd[0]}, {why}"


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def _wrong(file: Path, what: str) -> InputError:
    line = " ".join(what.split())
    return InputError(f"policy.lora_start: {file} holds no LoRA for this model: {line}.")
