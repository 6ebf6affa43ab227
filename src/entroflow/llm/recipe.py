"""A recipe for a language model: what is trained on what, and which tokens are left out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from entroflow.component import Component
from entroflow.errors import RecipeError, quoted
from entroflow.llm.clips import MOST, MU_B, MU_V
from entroflow.places import PathOrName
from entroflow.recipe.build import Source
from entroflow.recipe.identity import language_model_identity, short_hash
from entroflow.recipe.imports import refuse_untrusted
from entroflow.recipe.kinds import LANGUAGE_MODELS, Kind
from entroflow.recipe.load import assembled, recipe_yaml
from entroflow.recipe.messages import hint
from entroflow.recipe.read import read
from entroflow.recipe.registry import Layout
from entroflow.recipe.text import TEXTS

EMBEDDED_WEIGHTS = LANGUAGE_MODELS.parent / "base" / "model.safetensors"
EMBEDDED = "embedded"


class Model(Component):
    """The policy: any causal language model of transformers."""

    path: Annotated[str, PathOrName((EMBEDDED,))] = Field(
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
    path: Annotated[str | None, PathOrName(in_folders=True)] = Field(
        None, description="of dataset: a file (.jsonl, .ndjson, .json, .parquet; .csv and .tsv, "
        "whose cells are all texts), a folder, or the name user/name of one on a hub"
    )  # fmt: skip
    name: str | None = Field(None, description="of dataset: which of its configurations")
    split: str = Field("train", description="of dataset: which of its parts")
    prompt: str = Field("prompt", description="of dataset: the column with what is asked")
    answer: str = Field(
        "solution", description="of dataset: the column with what is right, for the reward as "
        "`solution`"
    )  # fmt: skip
    reward: str = Field(
        "trl.rewards.accuracy_reward",
        description="of dataset: dotted path of a function (completions, prompts, and each column "
        "by its name, **_) -> numbers",
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
OURS = (
    "output_dir", "max_steps", "seed", "report_to", "logging_steps", "logging_strategy",
    "logging_first_step", "save_strategy", "log_completions", "entropy_clip",
    "entropy_clip_mu", "entropy_clip_sides", "entropy_clip_most", "entropy_clip_denominator",
)  # fmt: skip
"""Settings of TRL that other sections make."""
REFUSED = {
    **dict.fromkeys(
        ("trust_remote_code", "model_init_kwargs", "resume_from_checkpoint"),
        "it may run code that comes with a model or a checkpoint",
    ),
    **dict.fromkeys(
        (
            "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy",
            "hub_always_push", "hub_revision", "log_completions_hub_repo", "trackio_space_id",
            "trackio_bucket_id", "trackio_static_space_id",
        ),
        "a run publishes nothing",
    ),
}  # fmt: skip
"""Settings of TRL that no recipe makes -> why."""
PLAIN: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str}
"""Types of settings that are checked: what a value must be."""


LAYOUT = Layout(Kind.LANGUAGE_MODEL, LANGUAGE_MODELS, {**PARTS, "trainer": None})


@dataclass(frozen=True)
class LLMRecipe:
    """A recipe that was read.

    Attributes:
        trainer: settings of `EntropyGRPOConfig`, as they are.
        found_in: the folder of the file, where the user's reward may lie.
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
    found_in: Path | None = field(default=None, compare=False)

    @property
    def hash(self) -> str:
        """A short hash of all settings but the seed, and how the run is judged and called.

        The weights in the package are part of it. Of a path its last name counts; what is there is
        digested in the checkpoints.
        """
        content = {**self._sections(), "run": {"updates": self.run.updates}}
        del content["evaluation"]
        if self.model.path == EMBEDDED:
            content["weights"] = hashlib.blake2b(EMBEDDED_WEIGHTS.read_bytes()).hexdigest()
        return short_hash(content, LANGUAGE_MODELS)

    @property
    def identity(self) -> str:
        """A short hash of all that a resumed run may not change."""
        return language_model_identity(self._sections())

    def _sections(self) -> dict[str, Any]:
        parts = {key: getattr(self, key).model_dump(mode="json") for key in PARTS}
        return {**parts, "trainer": dict(self.trainer)}

    @property
    def has_own_reward(self) -> bool:
        """Whether its reward is found by a dotted path."""
        return self.task.type == "dataset"

    def refuse_strangers(self) -> None:
        """Refuse a reward that is neither trusted nor of the user's working tree; see `load`.

        Raises:
            UntrustedError: it is; nothing was imported.
        """
        if self.has_own_reward:
            refuse_untrusted(self.task.reward, f"{self.name}: task.reward")

    def to_yaml(self) -> str:
        """With every key of ours written out; `load` reads it back."""
        texts = {key: getattr(self, key) for key in TEXTS if getattr(self, key)}
        home = self.found_in if self.has_own_reward else None
        return recipe_yaml(self.name, home, {**texts, **self._sections()})

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


def load(
    name_or_path: str | Path, overrides: Sequence[str] = (), *, trust: bool = False
) -> LLMRecipe:
    """Read a recipe: a shipped name or a file, then `section.key=value` overrides in order.

    Nothing that it names is imported.

    Args:
        name_or_path: of the recipe.
        overrides: changes to it; their paths are looked for in the current folder first.
        trust: let its reward be found also in a folder that is not below the current one.

    Raises:
        RecipeError: unknown recipe, section or key; a value of the wrong type or out of range.
    """
    written = read(name_or_path, overrides, LAYOUT)
    written.search(trust)
    name, parts, _ = assembled(written.mapping, written.name, LAYOUT, Source(written.places))
    _check_trainer(parts["trainer"], f"{name}: trainer")
    return LLMRecipe(name=name, **parts, found_in=written.home)


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
        if key in REFUSED:
            raise RecipeError(f"{where}.{key} can't be set: {REFUSED[key]}.")
        if key not in known:
            raise RecipeError(f"{where}: unknown key {quoted(key)}{hint(key, known)}")
        kind = types[key]
        is_bool = isinstance(value, bool)
        if kind in PLAIN and (not isinstance(value, PLAIN[kind]) or is_bool != (kind == "bool")):
            raise RecipeError(f"{where}.{key}: must be of type {kind}, not {quoted(value)}.")
