"""The run folder: everything a run leaves behind, and all it needs to go on.

recipe.yaml             the resolved recipe
metrics.jsonl           one object per iteration; iteration 0 is the start
checkpoints/00000020/   safetensors and JSON with their digests; best.json names the best of them
images/00000020.png     the same prompts and noise at every evaluation, to look at
examples/00000020.*     the same images as one strip, with captions and verdicts as JSON
trajectories/00000020.* what the steps of some rollouts earned, where the credit looks into them
tensorboard/            the same numbers and pictures as events
evaluation.json         the final comparison on test prompts
report.html             made from the above
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from entroflow import checkpoints, pictures
from entroflow.checkpoints import CheckpointError, checkpoints_of
from entroflow.contents import (
    RunError,
    checked,
)
from entroflow.contents import read_text as text_of
from entroflow.credit.trace import Trajectories
from entroflow.errors import InputError
from entroflow.evaluation.base import Evaluated
from entroflow.locks import one_writer
from entroflow.recipe.kinds import RECIPE, Kind, kind_of, other_run
from entroflow.recipe.text import parse_yaml
from entroflow.runs import best
from entroflow.runs.files import METRICS, StartLine, read_lines
from entroflow.writing import (
    PART,
    remove_parts,
    to_json,
    write_bytes,
    write_text,
    writing,
)

log = logging.getLogger(__name__)

REPORT, EVALUATION = "report.html", "evaluation.json"
END = "...\n"
"""The end of a YAML document: a recipe without it is torn."""
SHEET_COLUMNS = 6


def folder_name(name: str) -> str:
    """The name of a recipe as that of a folder: letters, digits and `._+=,-`; else `_`."""
    return re.sub(r"[^\w.+=,-]", "_", name)


def spent(line: Mapping[str, Any]) -> dict[str, float]:
    """What a run has spent at one line of its metrics, for `Run.share_done`."""
    return {
        "iterations": line["iteration"],
        "budget": line.get("ledger/weighted_evaluations", 0),
        "updates": line.get("ledger/optimizer_steps", 0),
        "minutes": line.get("seconds", 0) / 60,
    }


class RunFolder:
    """Access to one run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.images = path / "images"
        self.examples = path / "examples"
        self.trajectories = path / "trajectories"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def create(cls, path: Path, recipe_yaml: str) -> RunFolder:
        """Make a new run folder.

        Raises:
            RunError: something is there already.
        """
        run = cls(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            resumable = f", or go on with --resume {path}" if run.all_checkpoints() else ""
            raise RunError(f"{path} exists already; choose another --run{resumable}.")
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            try:
                # Of two processes that make a folder at the same time, one gets here first.
                run.checkpoints.mkdir()
            except FileExistsError:
                raise RunError(
                    f"another process has just made {path}; choose another --run."
                ) from None
        run.write_recipe(recipe_yaml)
        return run

    @classmethod
    def open(cls, path: Path, kind: Kind | None = None) -> RunFolder:
        """An existing run folder.

        Args:
            kind: that the run must be of; None: of either.

        Raises:
            RunError: `path` is not one, its recipe is torn, or it is of the other kind.
        """
        recipe = path / RECIPE
        if not recipe.is_file():
            raise RunError(f"{path} is not a run folder: it has no {RECIPE}.")
        # Sections that are cut off would take their defaults in silence.
        text = text_of(recipe)
        lines = [line.strip() for line in text.splitlines()]
        if [line for line in lines if line][-1:] != [END.strip()]:
            raise RunError(
                f"{recipe} is torn, or of an older version: its last line is not {END.strip()!r}; "
                f"add it if the rest is whole ({REPORT} shows what it was)."
            )
        if kind is not None and (message := other_run(path, parse_yaml(text, str(recipe)), kind)):
            raise RunError(message)
        return cls(path)

    @property
    def kind(self) -> Kind | None:
        """Of its recipe; None where that does not tell."""
        recipe = self.path / RECIPE
        return kind_of(parse_yaml(text_of(recipe), str(recipe)))

    def write_recipe(self, recipe_yaml: str) -> None:
        """Write the resolved recipe."""
        write_text(self.path / RECIPE, recipe_yaml + END)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, no other process trains in the folder.

        Raises:
            InputError: another process does.
        """
        with one_writer(self.path):
            for outdated in self.checkpoints.glob(".*.old"):
                checkpoints.checkpoint_exists(self.checkpoints / outdated.name[1:-4])
            remove_parts(self.path.glob(f"*/.*{PART}"))
            yield

    # --- metrics -------------------------------------------------------------------------------

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one line; it is on disk when this returns. What is not finite becomes null."""
        path = self.path / METRICS
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def replace_metrics(self, line: Mapping[str, Any]) -> None:
        """Write the line of an iteration anew, in the place of the one that is there."""
        lines = self.metrics()
        self._write_metrics(
            [line if old["iteration"] == line["iteration"] else old for old in lines]
        )

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines; a last line torn by a crash is left out.

        Raises:
            RunError: another line is torn.
        """
        return list(self.each_metrics())

    def each_metrics(self) -> Iterator[dict[str, Any]]:
        """As `metrics`, one line at a time: of a long run they take much memory together."""
        path = self.path / METRICS
        if path.exists():
            yield from read_lines(path, self._without_metrics())

    def start(self) -> dict[str, Any] | None:
        """The line of iteration 0 of a run of images, with how to read the others, if it is there.

        Raises:
            RunError: it is torn, or of an older version.
        """
        lines = self.metrics()
        if not lines or lines[0]["iteration"] != 0:
            return None
        start = lines[0]
        if not {"measure", "plan"} <= start.keys():
            version = start.get("version", "unknown")
            raise RunError(
                f"{self.path} was begun by an older version ({version}), whose "
                "metrics have other names; go on with that one, or start a new run from its "
                f"weights (policy.weights={self.path}/checkpoints/.../ema.safetensors)."
            )
        try:
            return checked(start, StartLine)
        except ValueError as reason:
            torn = f"{self.path / METRICS}:1 is torn ({reason})"
            raise RunError(f"{torn}{self._without_metrics()}") from None

    def gap(self, lines: Sequence[Mapping[str, Any]]) -> str:
        """What is wrong with the metrics, in a few words; nothing if every iteration is there."""
        numbers = [line["iteration"] for line in lines]
        end = max([*numbers, *(int(path.name) for path in self.all_checkpoints()[-1:])], default=-1)
        if lacking := end + 1 - len({*numbers}):
            there = {*numbers}
            first = next(n for n in count() if n not in there)
            return f"lacks {lacking} of {end + 1} iterations, the first of them {first}"
        if len(numbers) > end + 1:
            return "has an iteration twice"
        return "" if numbers == sorted(numbers) else "is out of order"

    def metrics_until(
        self, iteration: int, state: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """The lines up to an iteration, in order and each once.

        Args:
            state: what the line of the iteration must hold, by the checkpoint.

        Raises:
            RunError: lines are torn or missing, contradict each other, or are of another run.
        """
        path = self.path / METRICS
        by_iteration: dict[int, dict[str, Any]] = {}
        for line in self.metrics():
            if by_iteration.setdefault(line["iteration"], line) != line:
                raise RunError(
                    f"{path} has two lines of iteration {line['iteration']}, which differ"
                    f"{self._without_metrics()}"
                )
        kept = [by_iteration[n] for n in sorted(by_iteration) if n <= iteration]
        whole = next(n for n in count() if n not in by_iteration)
        if whole <= iteration:
            raise RunError(
                f"{path} lacks {iteration + 1 - len(kept)} of the {iteration + 1} iterations up to "
                f"{iteration}, where the latest checkpoint is, the first of them {whole}"
                f"{self._without_metrics(whole)}"
            )
        for key, value in (state or {}).items():
            if (written := by_iteration[iteration].get(key, value)) != value:
                raise RunError(
                    f"{path} is of another run, or was changed: {key} of iteration {iteration} is "
                    f"{written!r}, but {value!r} in the checkpoint{self._without_metrics()}"
                )
        return kept

    def cut_after(self, iteration: int) -> None:
        """Forget what was written after `iteration`: it is about to be written again.

        Raises:
            RunError: see `metrics_until`; nothing is changed then.
        """
        kept = self.metrics_until(iteration)
        if [line for line in self.metrics() if line["iteration"] <= iteration] != kept:
            log.warning(
                "%s had lines out of order or twice; they are put in order.", self.path / METRICS
            )
        self._write_metrics(kept)
        self._forget_after(iteration)

    def _without_metrics(self, whole: int = 0) -> str:
        """The end of a message about metrics that can't be gone on with: what to do.

        Args:
            whole: so many iterations are there, from 0 on.
        """
        older = [int(path.name) for path in self.all_checkpoints() if int(path.name) < whole]
        if older:
            return (
                f"; restore it from a copy, or remove the checkpoints after {max(older)} to go on "
                "from there."
            )
        return "; restore it from a copy, or start a new run from the weights of this one."

    def _write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        write_text(self.path / METRICS, "".join(to_json(line) + "\n" for line in lines))

    def _forget_after(self, iteration: int) -> None:
        outdated = [self.path / EVALUATION, *self.path.glob("*/test_*")]
        for folder in (self.images, self.examples, self.trajectories):
            numbered = (path for path in folder.glob("[0-9]*") if path.stem.isdecimal())
            outdated += [path for path in numbered if int(path.stem) > iteration]
        for path in outdated:
            path.unlink(missing_ok=True)

    # --- pictures ------------------------------------------------------------------------------

    def save_sheet(self, name: str, evaluated: Evaluated) -> Image:
        """The examples of an evaluation for people: a green bar where strictly right."""
        sheet = pictures.grid(evaluated.images, SHEET_COLUMNS, evaluated.captions, evaluated.passed)
        pictures.save(sheet, self.images / f"{name}.png")
        return sheet

    def save_examples(self, name: str, evaluated: Evaluated) -> None:
        """The examples of an evaluation for programs: a strip of images, and their captions."""
        strip = torch.cat(list(evaluated.images), dim=-1)
        picture = pictures.to_png(strip)
        write_bytes(self.examples / f"{name}.png", picture)
        content = {
            "captions": list(evaluated.captions),
            "passed": list(evaluated.passed),
            "picture": pictures.digest_of(picture),
        }
        write_text(self.examples / f"{name}.json", to_json(content) + "\n")

    def save_trajectories(self, iteration: int, shown: Trajectories) -> None:
        """Rollouts to look at: a sheet with a row of images for each, and what steps earned."""
        sheet = torch.cat([torch.cat(list(row), dim=-1) for row in shown.images], dim=-2)
        name = f"{iteration:08d}"
        picture = pictures.to_png(sheet / 255)
        write_bytes(self.trajectories / f"{name}.png", picture)
        content = {**shown.known, "picture": pictures.digest_of(picture)}
        write_text(self.trajectories / f"{name}.json", to_json(content) + "\n")

    # --- checkpoints ---------------------------------------------------------------------------

    def save_checkpoint(
        self,
        iteration: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        keep: int,
    ) -> Path:
        """Write a checkpoint; of the older ones only the latest `keep - 1` and the best remain."""
        folder = self.checkpoint(iteration)
        checkpoints.write_checkpoint(folder, tensors, state)
        self.prune(keep)
        return folder

    def prune(self, keep: int) -> None:
        """Remove all checkpoints but the latest `keep` and the best.

        None is removed where it can't be told which is the best.
        """
        outdated = self.all_checkpoints()[:-keep]
        if not outdated:
            return
        try:
            kept = best.marked_checkpoint(self)
        except InputError as error:
            log.warning("no checkpoint is removed, as the best is not known: %s", str(error))
            return
        for folder in outdated:
            if folder != kept:
                shutil.rmtree(folder)

    def mark_best(self, iteration: int, score: float, by: str = "reward") -> None:
        """Name the checkpoint of `iteration` the best by an evaluation, `eval/<by>`."""
        best.mark(self, {"iteration": iteration, "score": score, "by": by})

    def best(self) -> Path | None:
        """The best checkpoint by evaluation; see `best.best_checkpoint`."""
        return best.best_checkpoint(self)

    def best_score(self, by: str = "reward") -> float:
        """The score of the best checkpoint; see `best.best_score`."""
        return best.best_score(self, by)

    def choose_best_by(self, by: str) -> None:
        """Name the best checkpoint by another evaluation; see `best.choose_by`."""
        best.choose_by(self, by)

    def mend_best(self) -> None:
        """Write `best.json` anew where it can't be gone by; see `best.mend`."""
        best.mend(self)

    def checkpoint(self, iteration: int) -> Path:
        """The folder of the checkpoint of an iteration, which may not be there."""
        return self.checkpoints / f"{iteration:08d}"

    def all_checkpoints(self) -> list[Path]:
        """Every checkpoint, oldest first."""
        return checkpoints_of(self.checkpoints)

    def latest(self) -> Path:
        """The latest checkpoint.

        Raises:
            CheckpointError: there is none.
        """
        saved = self.all_checkpoints()
        if not saved:
            raise CheckpointError(
                f"{self.path} has no checkpoint to go on from; remove it and start anew."
            )
        return saved[-1]
