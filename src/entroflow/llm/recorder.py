"""What a run of a language model leaves in its folder, and how good the policy gets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import TrainerCallback
from trl.models.utils import unwrap_model_for_generation

from entroflow.checkpoints import write_digests
from entroflow.contents import RunError, read_object
from entroflow.errors import InputError
from entroflow.evaluation.base import mean_over_prompts
from entroflow.llm.embedded import Sampling
from entroflow.llm.passing import avg_at, pass_at
from entroflow.llm.problems import Judged, Problems, judge
from entroflow.llm.recipe import LLMRecipe
from entroflow.llm.state import ResumableTrainer
from entroflow.report.llm_page import write_llm_report
from entroflow.runs.events import Events
from entroflow.runs.folder import EVALUATION, RunFolder
from entroflow.runs.llm_files import BaseAnswers
from entroflow.version import package_version
from entroflow.writing import (
    part_of,
    settled,
    to_json,
    write_text,
    writing,
)

log = logging.getLogger(__name__)

BASE_ANSWERS = "base.json"
LONGEST = 256
"""Tokens of an answer where a recipe does not say how many."""
SHOWN = 8
"""Test problems whose answers are written down."""

Watch = Callable[[Mapping[str, Any]], None]


def compared(problems: Problems, base: Judged, tuned: Judged) -> dict[str, Any]:
    """Both models' numbers, the gains problem by problem, and some answers."""
    n = base.right.shape[1]
    gains = {
        f"avg@{n}": mean_over_prompts(avg_at(tuned.right) - avg_at(base.right)),
        f"pass@{n}": mean_over_prompts(pass_at(tuned.right, n) - pass_at(base.right, n)),
    }
    rows = range(min(SHOWN, len(base.said)))
    return {
        "problems": len(base.said),
        "each": n,
        "base": base.numbers(),
        "tuned": tuned.numbers(),
        "gain": gains,
        "answers": [
            {
                "prompt": problems.test[row]["prompt"],
                "base": list(zip(base.said[row], base.right[row].tolist(), strict=True)),
                "tuned": list(zip(tuned.said[row], tuned.right[row].tolist(), strict=True)),
            }
            for row in rows
        ],
    }


class Recorder(TrainerCallback):
    """Writes down what TRL logs, and how good the policy is now and then.

    All processes judge, as weights may lie on all of them; one writes.
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: LLMRecipe,
        trainer: ResumableTrainer,
        problems: Problems,
        watch: Watch | None,
        stopping: Callable[[], bool],
    ) -> None:
        self.folder, self.recipe, self.trainer, self.problems = folder, recipe, trainer, problems
        self.watch, self.stopping = watch, stopping
        self.main = trainer.accelerator.is_main_process
        self.events = Events(folder.tensorboard)
        lines = folder.metrics()
        self.seconds = lines[-1].get("seconds", 0.0) if lines else 0.0
        self._since, self._unsaved = perf_counter(), False

    def judge(self, rows: Sequence[dict[str, Any]]) -> Judged:
        """The policy as it is, on problems that are held out."""
        settings, trainer = self.recipe.evaluation, self.trainer
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped, trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            ) as model,
            trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
        ):  # fmt: skip
            return judge(
                model, trainer.processing_class, [*rows][: settings.problems],
                self.problems.reward,
                Sampling(
                    settings.each, trainer.args.max_completion_length or LONGEST,
                    settings.temperature, self.recipe.run.seed, settings.batch_size,
                ),
                trainer.state,
            )  # fmt: skip

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The base, and the line of iteration 0, unless they are there."""
        if state.global_step:
            self.catch_up(state.global_step)
        else:
            base = self.judge(self.problems.test)
            start = {"iteration": 0, "version": package_version(), **self._evaluated()}
            if self.main:
                write_text(self.folder.path / BASE_ANSWERS, to_json(_as_json(base)) + "\n")
                self._write(start)
                self._show(start)
        self._since = perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop where that was asked for, in any of the processes: in all after the same update.

        Not in the midst of a generation batch, as that could not go on.
        """
        asked = torch.tensor(float(self.stopping()))
        if self.trainer.processes.sum(asked).item() > 0 and self.trainer.is_between_batches:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One line per update; now and then a checkpoint, and how good it is."""
        if "loss" not in (logs or {}):
            return
        self.seconds += perf_counter() - self._since
        line = {"iteration": state.global_step, "seconds": round(self.seconds, 3)}
        line |= {k: v for k, v in logs.items() if isinstance(v, int | float) and k != "epoch"}
        due = state.global_step % self.recipe.evaluation.every == 0
        last = control.should_training_stop or state.global_step == args.max_steps
        self._unsaved |= due
        self._write(line)
        # Saved before it is judged, which takes long and may be cut short.
        if last or (self._unsaved and self.trainer.is_between_batches):
            self._save(state.global_step)
            self._unsaved = False
        if due or last:
            self._evaluate(line)
        self._show(line)
        self._since = perf_counter()

    def catch_up(self, updates: int) -> None:
        """The evaluation of a checkpoint, where the run was killed after it had been saved."""
        due = updates % self.recipe.evaluation.every == 0 or updates >= self.recipe.run.updates
        for line in self.folder.metrics():
            known = any(key.startswith("eval/") for key in line)
            if due and line["iteration"] == updates and not known:
                self._evaluate(line)

    def finish(self, updates: int) -> None:
        """Both models on the test problems."""
        tuned = self.judge(self.problems.test)
        self.events.close()
        if self.main:
            base = _from_json(read_base_answers(self.folder.path))
            by = {"iteration": updates, "recipe": self.recipe.identity}
            found = {**by, **compared(self.problems, base, tuned)}
            write_text(self.folder.path / EVALUATION, to_json(found, indent=1) + "\n")
            try:
                write_llm_report(self.folder)
            except InputError as error:
                log.warning("there is no new report: %s", str(error))

    def _save(self, update: int) -> None:
        """Write a checkpoint; the one before goes when it is whole."""
        whole = self.folder.checkpoints / f"{update:08d}"
        part = part_of(whole)
        with writing(whole):
            if self.main:
                part.mkdir()
            self.trainer.save_model(str(part))
            self.trainer.write_state(part)
            if self.main:
                # TRL's settings, as a pickle: the recipe has them in plain sight.
                (part / "training_args.bin").unlink(missing_ok=True)
                write_digests(part)
                settled(part)
                part.rename(whole)
        if self.main:
            self.folder.prune(keep=1)

    def _evaluated(self) -> dict[str, float]:
        found = self.judge(self.problems.validation).numbers()
        line: dict[str, float] = {}
        for name, (value, low, high) in found.items():
            line |= {f"eval/{name}": value, f"eval/{name}_low": low, f"eval/{name}_high": high}
        return line

    def _evaluate(self, line: dict[str, Any]) -> None:
        """Add an evaluation to a line that is written already."""
        judged = self._evaluated()
        line |= judged
        if self.main:
            self.folder.replace_metrics(line)
            self.events.numbers({"iteration": line["iteration"], **judged})

    def _write(self, line: dict[str, Any]) -> None:
        if self.main:
            self.folder.append_metrics(line)
            self.events.numbers(line)

    def _show(self, line: dict[str, Any]) -> None:
        if self.main and self.watch is not None:
            self.watch(line)


def read_base_answers(run: Path) -> dict[str, Any]:
    """What the model answered before it was trained.

    Raises:
        RunError: the file is missing or torn.
    """
    remedy = f"; restore it from a copy, or start a new run from its model: model.path={run}"
    if not (run / BASE_ANSWERS).exists():
        raise RunError(f"{run} has no {BASE_ANSWERS}, what it is compared with{remedy}")
    return read_object(run / BASE_ANSWERS, BaseAnswers, remedy=remedy)


def _as_json(judged: Judged) -> dict[str, Any]:
    return {"said": judged.said, "right": judged.right.tolist()}


def _from_json(found: Mapping[str, Any]) -> Judged:
    return Judged(found["said"], torch.tensor(found["right"]))
