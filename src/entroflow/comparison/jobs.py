"""The runs of a comparison before they are made: arms, with every seed, on equal terms."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from entroflow.errors import InputError
from entroflow.evaluation.base import HeldOutEvaluation
from entroflow.recipe.load import load_recipe
from entroflow.runs.folder import folder_name
from entroflow.runs.inputs import digest_of_records
from entroflow.settings import ENDS
from entroflow.training.forecast import expected_of, rehearse
from entroflow.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """A recipe and changes to it, one line of the table."""

    recipe: str
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Arm:
        """From `RECIPE[,SECTION.KEY=VALUE]...`; a comma inside of brackets divides nothing."""
        recipe, *overrides = re.split(r",(?![^\[{]*[\]}])", text)
        return cls(recipe, tuple(overrides))

    @property
    def name(self) -> str:
        """What it is called: as it was given."""
        return ",".join([self.recipe, *self.overrides])


@dataclass(frozen=True)
class Terms:
    """What all runs of a comparison have in common.

    Attributes:
        end: what each may take: `budget`, `updates` or `minutes`, as in the section `run`.
        shared: overrides of every arm.
        trust: see `load_recipe`.
    """

    end: Mapping[str, float | str]
    shared: Sequence[str] = ()
    trust: bool = False

    @property
    def ending(self) -> list[str]:
        """The overrides that end every run."""
        ends = {key: self.end.get(key) for key in ENDS}
        return [f"run.{key}={'null' if value is None else value}" for key, value in ends.items()]


@dataclass(frozen=True)
class Job:
    """One run: an arm with a seed, cut to the budget."""

    arm: Arm
    overrides: tuple[str, ...]
    recipe_hash: str
    seed: int
    base: str

    KEY: ClassVar = ("recipe_hash", "seed", "base")

    @property
    def key(self) -> dict[str, Any]:
        """Under which its result is kept."""
        return {name: getattr(self, name) for name in self.KEY}

    @property
    def named(self) -> dict[str, Any]:
        """What it was asked for as."""
        return {
            "arm": {"recipe": self.arm.recipe, "overrides": list(self.arm.overrides)},
            "overrides": list(self.overrides),
        }

    def folder(self, out: Path) -> Path:
        """Where it is run."""
        name = f"{Path(self.arm.recipe).stem}-{self.recipe_hash}-{self.base}-seed{self.seed}"
        return out / "runs" / folder_name(name)


def key_of(content: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key of a job among all that a result holds."""
    return tuple(content[name] for name in Job.KEY)


def planned(arms: Sequence[Arm], seeds: Sequence[int], terms: Terms) -> list[Job]:
    """All runs of a comparison, arm by arm.

    Raises:
        InputError: a recipe is wrong, given twice, or can't be run within the budget.
    """
    jobs: dict[tuple[Any, ...], Job] = {}
    for arm in arms:
        overrides = (*arm.overrides, *terms.shared)
        for override in overrides:
            if override.partition("=")[0] in {f"run.{key}" for key in (*ENDS, "seed")}:
                raise InputError(
                    f"{override}: how long runs are, and their seeds, are the same for all; give "
                    "--budget, --updates or --minutes, and --seeds."
                )
        with _said_of(arm):
            recipe = load_recipe(arm.recipe, (*overrides, *terms.ending), trust=terms.trust)
            if not isinstance(recipe.evaluation, HeldOutEvaluation):
                raise InputError(
                    "its evaluation has no test prompts to compare on; derive it from "
                    "entroflow.evaluation.base.HeldOutEvaluation."
                )
            trainer = Trainer(recipe)
            for remark in rehearse(trainer):
                log.warning("%s: %s.", arm.name, remark)
            cost = expected_of(trainer)["weighted_evaluations"]
            if recipe.run.budget is not None and cost > recipe.run.budget:
                raise InputError(
                    f"one iteration costs {cost:,} weighted evaluations, more than all."
                )
            base = trainer.policy.weights.digest("reference")
            named = {**trainer.named.inputs, **trainer.named.code}
            contents: dict[str, Any] = {key: each["digest"] for key, each in named.items()}
            for key, path in trainer.named.unverified:
                contents.setdefault(key, []).append(path)
            if contents:
                # The hash has names of files alone, but a result is of what they held.
                base = digest_of_records([base, contents])[: len(base)]
            for seed in seeds:
                ended = (*overrides, *terms.ending, f"run.seed={seed}")
                job = Job(arm, ended, recipe.hash, seed, base)
                twin = jobs.setdefault(key_of(job.key), job)
                if twin is not job:
                    raise InputError(f"it is the same recipe as {twin.arm.name}.")
    return list(jobs.values())


@contextmanager
def _said_of(arm: Arm) -> Iterator[None]:
    """Within, errors begin with the name of the arm."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{arm.name}: {error}") from None
