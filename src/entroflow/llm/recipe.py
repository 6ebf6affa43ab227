"""A recipe for a language model: what is trained on what, and which tokens are left out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML

from entroflow.component import Component
from entroflow.errors import RecipeError
from entroflow.llm.clips import MOST, MU_B, MU_V
from entroflow.settings_text import holder_of, override_of, parse_yaml
from entroflow.users_code import search_beside
from entroflow.wrong_keys import explained, hint

SHIPPED = Path(str(resources.files("entroflow"))) / "llm" / "recipes"
"""Folder of the recipes in the package."""
EMBEDDED_WEIGHTS = SHIPPED.parent / "base" / "model.safetensors"
TEXTS = ("title", "paper", "notes")
EMBEDDED = "embedded"


class Model(Component):
    """The policy: any causal language model of transformers."""

    path: str = Field(
        EMBEDDED, description="embedded is the one in the package; else a folder, or a name that "
        "transformers finds"
    )  # fmt: skip
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the weights")
    lora_rank: int | None = Field(
        None, ge=1, description="of a LoRA on all linear layers that is trained instead; null: "
        "all weights are"
    )  # fmt: skip
    lora_alpha: int = Field(64, ge=1, description="scale of the LoRA, over its rank")


class Task(Component):
    """What is asked, and what is right."""

    type: Literal["countdown", "dataset"] = Field(
        "countdown", description="countdown: the puzzles in the package; dataset: of yours"
    )
    problems: int | None = Field(
        None, ge=1, description="to train on; null: 4000 of countdown, all of a dataset"
    )
    path: str | None = Field(
        None, description="of dataset: a folder or name that `datasets.load_dataset` finds"
    )
    name: str | None = Field(None, description="of dataset: which of its configurations")
    split: str = Field("train", description="of dataset: which of its parts")
    prompt: str = Field("prompt", description="of dataset: the column with what is asked")
    answer: str = Field("solution", description="of dataset: the column with what is right")
    reward: str = Field(
        "trl.rewards.accuracy_reward",
        description="of dataset: dotted path of a function (completions, solution, **) -> numbers",
    )
    held_out: int = Field(
        500, ge=1, description="of dataset: problems for validation, and as many again for the "
        "test, that are never trained on"
    )  # fmt: skip

    @model_validator(mode="after")
    def _has_a_dataset(self) -> Self:
        if (self.type == "dataset") != (self.path is not None):
            raise ValueError("path names the data of type: dataset, and is needed for it alone")
        return self


class Clip(Component):
    """Which penalised tokens an update leaves out (2602.03392)."""

    type: Literal["none", "b", "v"] = Field(
        "none", description="none; b: S far below the batch's; v: S far below its mean over the "
        "vocabulary"
    )  # fmt: skip
    mu: float | None = Field(
        None, ge=0,
        description=f"standard deviations that are far; null: {MU_B} for b, {MU_V} for v",
    )  # fmt: skip
    sides: Literal["one", "two"] = Field(
        "one", description="one, as released; two: far on either side, whatever was earned"
    )
    most: float = Field(
        MOST, gt=0, le=1, description="of v: largest share that is left out, but one token may be"
    )
    denominator: Literal["keep", "shrink"] = Field(
        "keep", description="whether tokens left out count in the loss's denominator and KL; "
        "shrink, as published: they don't"
    )  # fmt: skip


class Evaluation(Component):
    """How often the policy is right about problems it does not train on."""

    every: int = Field(20, ge=1, description="updates from one evaluation to the next")
    problems: int = Field(100, ge=2, description="problems, always the same")
    each: int = Field(16, ge=1, description="answers to each")
    temperature: float = Field(1.0, ge=0, description="they are sampled with; 0: the likeliest")
    batch_size: int = Field(256, ge=1, description="most answers that are sampled at once")


class Run(Component):
    """How long."""

    updates: int = Field(200, ge=1, description="optimizer steps")
    seed: int = Field(0, ge=0, description="of everything that is random")


PARTS: dict[str, type[Component]] = {
    "model": Model, "task": Task, "clip": Clip, "evaluation": Evaluation, "run": Run,
}  # fmt: skip
"""The sections whose keys are ours."""
SECTIONS = (*PARTS, "trainer")
OURS = (
    "output_dir", "max_steps", "seed", "report_to", "logging_steps", "logging_strategy",
    "logging_first_step", "save_strategy", "log_completions", "entropy_clip",
    "entropy_clip_mu", "entropy_clip_sides", "entropy_clip_most", "entropy_clip_denominator",
)  # fmt: skip
"""Settings of TRL that other sections make."""
PLAIN: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str}
"""Types of settings that are checked: what a value must be."""


@dataclass(frozen=True)
class LLMRecipe:
    """A recipe that was read.

    Attributes:
        trainer: settings of `EntropyGRPOConfig`, as they are.
    """

    name: str
    title: str
    paper: str
    notes: str
    model: Model
    task: Task
    clip: Clip
    evaluation: Evaluation
    run: Run
    trainer: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """A short hash of all settings but the seed, and how the run is judged and called.

        The weights in the package are part of it.
        """
        content = {key: getattr(self, key).model_dump(mode="json") for key in PARTS}
        content |= {"run": {"updates": self.run.updates}, "trainer": dict(self.trainer)}
        del content["evaluation"]
        if self.model.path == EMBEDDED:
            content["weights"] = hashlib.blake2b(EMBEDDED_WEIGHTS.read_bytes()).hexdigest()
        text = json.dumps(content, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def to_yaml(self) -> str:
        """With every key of ours written out; `load` reads it back."""
        writer, out = YAML(), StringIO()
        writer.width = 100
        texts = {key: getattr(self, key) for key in TEXTS if getattr(self, key)}
        parts = {key: getattr(self, key).model_dump(mode="json") for key in PARTS}
        writer.dump({"name": self.name, **texts, **parts, "trainer": dict(self.trainer)}, out)
        return out.getvalue()

    def trl_settings(self, output: Path) -> dict[str, Any]:
        """What `EntropyGRPOConfig` is made of."""
        clip = self.clip
        return {
            **self.trainer,
            "output_dir": str(output), "max_steps": self.run.updates, "seed": self.run.seed,
            "report_to": "none", "logging_steps": 1, "save_strategy": "no",
            "entropy_clip": clip.type,
            "entropy_clip_mu": clip.mu, "entropy_clip_sides": clip.sides,
            "entropy_clip_most": clip.most, "entropy_clip_denominator": clip.denominator,
        }  # fmt: skip


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes in the package."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> LLMRecipe:
    """Read a recipe: a shipped name or a file, then `section.key=value` overrides in order.

    Raises:
        RecipeError: unknown recipe, section or key; a value of the wrong type or out of range.
    """
    name, text, folder = _find(str(name_or_path))
    search_beside(folder)
    mapping = parse_yaml(text, name)
    for override in overrides:
        keys, value = override_of(override, SECTIONS)
        holder_of(mapping, keys, override)[keys[-1]] = value
    name = str(mapping.pop("name", name))
    for key in mapping:
        if key not in SECTIONS and key not in TEXTS:
            raise RecipeError(f"{name}: unknown section {key!r}{hint(key, [*SECTIONS, *TEXTS])}")
    parts: dict[str, Any] = {key: str(mapping.get(key) or "") for key in TEXTS}
    for section, kind in PARTS.items():
        fields = _fields(mapping, section, name)
        try:
            parts[section] = kind.model_validate(fields, strict=True)
        except ValidationError as error:
            raise RecipeError(explained(error, kind, f"{name}: {section}")) from None
    trainer = _fields(mapping, "trainer", name)
    _check_trainer(trainer, f"{name}: trainer")
    return LLMRecipe(name=name, **parts, trainer=trainer)


def _fields(mapping: Mapping[str, Any], section: str, name: str) -> dict[str, Any]:
    fields = mapping.get(section) or {}
    if not isinstance(fields, Mapping):
        raise RecipeError(f"{name}: {section} must hold keys and values, not {fields!r}.")
    return dict(fields)


def _check_trainer(fields: Mapping[str, Any], where: str) -> None:
    """Refuse keys that TRL does not have or other sections set, and values of another type."""
    from entroflow.llm.grpo import EntropyGRPOConfig

    fields_of = [f for f in dataclasses.fields(EntropyGRPOConfig) if f.init]
    # Names: some annotations are text.
    types = {f.name: getattr(f.type, "__name__", str(f.type)) for f in fields_of}
    known = [*types]
    for key, value in fields.items():
        if key in OURS:
            raise RecipeError(f"{where}.{key} is set by the other sections; leave it out.")
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{hint(key, known)}")
        if types[key] in PLAIN and not isinstance(value, PLAIN[types[key]]):
            raise RecipeError(f"{where}.{key}: must be of type {types[key]}, not {value!r}.")


def _find(name: str) -> tuple[str, str, Path | None]:
    """Name and text of a recipe, and the folder of one that is the user's."""
    found = shipped()
    if name in found:
        return name, found[name].read_text(encoding="utf-8"), None
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        raise RecipeError(f"there is no recipe {name!r}{hint(name, list(found))}")
    try:
        return path.stem, path.read_text(encoding="utf-8"), path.resolve().parent
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe file {path}.") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise RecipeError(f"{path} is not a YAML file.") from None
