"""The run folder: everything a run leaves behind, and all it needs to go on.

recipe.yaml             the resolved recipe
metrics.jsonl           one object per iteration; iteration 0 is the start
checkpoints/00000020/   safetensors and JSON; best.json names the best by evaluation
images/00000020.png     the same prompts and noise at every evaluation, to look at
examples/00000020.*     the same images as one strip, with captions and verdicts as JSON
trajectories/00000020.* what the steps of some rollouts earned, where the credit looks into them
tensorboard/            the same numbers and pictures as events
evaluation.json         the final comparison on test prompts
report.html             made from the above
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

import entroflow
from entroflow import checkpoints, pictures
from entroflow.checkpoints import CheckpointError, one_writer, to_json, write_bytes, write_text
from entroflow.credit.trace import Trajectories
from entroflow.errors import InputError
from entroflow.evaluation.base import Evaluated

RECIPE, METRICS, REPORT, EVALUATION = (
    "recipe.yaml",
    "metrics.jsonl",
    "report.html",
    "evaluation.json",
)
BEST = "best.json"
END = "...\n"
"""The end of a YAML document: a recipe without it is torn."""
SHEET_COLUMNS = 6


def package_version() -> str:
    """The commit of the package where it is in a git checkout, else its version."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        asked = ["git", "-C", str(here), *arguments]
        answer = subprocess.check_output(asked, stderr=subprocess.DEVNULL)
        return os.fsdecode(answer).strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) not in here.parents:
            return entroflow.__version__
        changed = git("status", "--porcelain", "--", str(here))
        return git("rev-parse", "--short", "HEAD") + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return entroflow.__version__


def spent(line: Mapping[str, Any]) -> dict[str, float]:
    """What a run had taken at one line of its metrics, for `Run.share_done`."""
    return {
        "iterations": line["iteration"],
        "budget": line.get("ledger/weighted_evaluations", 0),
        "updates": line.get("ledger/optimizer_steps", 0),
        "minutes": line.get("seconds", 0) / 60,
    }


class RunError(InputError):
    """A run folder can't be used as asked; the message says why and what to do."""


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
        path.mkdir(parents=True, exist_ok=True)
        try:
            # Of two processes that make the same folder at the same time, one gets here first.
            run.checkpoints.mkdir()
        except FileExistsError:
            raise RunError(f"another process has just made {path}; choose another --run.") from None
        run.write_recipe(recipe_yaml)
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run folder.

        Raises:
            RunError: `path` is not one, or its recipe is torn.
        """
        recipe = path / RECIPE
        if not recipe.is_file():
            raise RunError(f"{path} is not a run folder: it has no {RECIPE}.")
        # Sections that are cut off would take their defaults in silence.
        lines = [line.strip() for line in recipe.read_bytes().splitlines()]
        if [line for line in lines if line][-1:] != [END.strip().encode()]:
            raise RunError(
                f"{recipe} is torn, or of an older version: its last line is not {END.strip()!r}; "
                f"add it if the rest is whole ({REPORT} shows what it was)."
            )
        return cls(path)

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
            # What a process that was killed had begun to write.
            for part in self.checkpoints.glob(".*.part"):
                shutil.rmtree(part, ignore_errors=True)
            yield

    # --- metrics -------------------------------------------------------------------------------

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one line; it is on disk when this returns. What is not finite becomes null."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def replace_metrics(self, line: Mapping[str, Any]) -> None:
        """Write the line of an iteration anew, in the place of the one that is there."""
        kept = [old for old in self.metrics() if old["iteration"] != line["iteration"]]
        write_text(self.path / METRICS, "".join(to_json(each) + "\n" for each in [*kept, line]))

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines; a last line torn by a crash is left out."""
        return list(self.each_metrics())

    def each_metrics(self) -> Iterator[dict[str, Any]]:
        """As `metrics`, one line at a time: of a long run they take much memory together."""
        path = self.path / METRICS
        if not path.exists():
            return
        torn = 0
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if torn:
                    raise RunError(f"{path}:{torn} is torn; the run can't be read.")
                try:
                    parsed = json.loads(line)
                except json.JSONDecodeError:
                    torn = number
                else:
                    yield parsed

    def cut_after(self, iteration: int) -> None:
        """Forget what was written after `iteration`: it is about to be written again."""
        kept = [line for line in self.metrics() if line["iteration"] <= iteration]
        write_text(self.path / METRICS, "".join(to_json(line) + "\n" for line in kept))
        outdated = [self.path / EVALUATION, *self.path.glob("*/test_*")]
        for folder in (self.images, self.examples, self.trajectories):
            outdated += [path for path in folder.glob("[0-9]*") if int(path.stem) > iteration]
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
        write_bytes(self.examples / f"{name}.png", pictures.to_png(strip))
        known = {"captions": list(evaluated.captions), "passed": list(evaluated.passed)}
        write_text(self.examples / f"{name}.json", to_json(known) + "\n")

    def save_trajectories(self, iteration: int, shown: Trajectories) -> None:
        """Rollouts to look at: a sheet with a row of images for each, and what is known of them."""
        sheet = torch.cat([torch.cat(list(row), dim=-1) for row in shown.images], dim=-2)
        name = f"{iteration:08d}"
        write_bytes(self.trajectories / f"{name}.png", pictures.to_png(sheet / 255))
        write_text(self.trajectories / f"{name}.json", to_json(shown.known) + "\n")

    # --- checkpoints ---------------------------------------------------------------------------

    def save_checkpoint(
        self,
        iteration: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        keep: int,
    ) -> Path:
        """Write a checkpoint; of the older ones only the latest `keep - 1` and the best remain."""
        folder = self.checkpoints / f"{iteration:08d}"
        checkpoints.write_checkpoint(folder, tensors, state)
        self.prune(keep)
        return folder

    def prune(self, keep: int) -> None:
        """Remove all checkpoints but the latest `keep` and the best."""
        best = self.best()
        for outdated in self.all_checkpoints()[:-keep]:
            if best is None or outdated != best:
                shutil.rmtree(outdated)

    def mark_best(self, iteration: int, score: float, by: str = "reward") -> None:
        """Name the checkpoint of `iteration` the best by evaluation, and what it was judged by."""
        content = {"iteration": iteration, "score": score, "by": by}
        write_text(self.checkpoints / BEST, to_json(content) + "\n")

    def best(self) -> Path | None:
        """The best checkpoint by evaluation, if one is marked and still there."""
        return self._marked()[0]

    def best_score(self, by: str = "reward") -> float:
        """The score of the best checkpoint; -inf if there is none, or it was judged by another."""
        _, score, judged_by = self._marked()
        return score if judged_by == by else -math.inf

    def _marked(self) -> tuple[Path | None, float, str]:
        try:
            content = json.loads((self.checkpoints / BEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None, -math.inf, ""
        folder = self.checkpoints / f"{content['iteration']:08d}"
        if not folder.is_dir() or content["score"] is None:
            return None, -math.inf, ""
        return folder, content["score"], content.get("by", "reward")

    def all_checkpoints(self) -> list[Path]:
        """Every checkpoint, oldest first."""
        return sorted(p for p in self.checkpoints.glob("[0-9]*") if p.is_dir())

    def latest(self) -> Path:
        """The latest checkpoint.

        Raises:
            CheckpointError: there is none.
        """
        found = self.all_checkpoints()
        if not found:
            raise CheckpointError(
                f"{self.path} has no checkpoint to go on from; remove it and start anew."
            )
        return found[-1]


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file of a run folder holds.

    Raises:
        RunError: the file is torn.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is torn ({error}); remove it to do without.") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no JSON object; remove it to do without.")
    return content
