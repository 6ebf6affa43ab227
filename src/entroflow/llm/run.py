"""A run of `EntropyGRPOTrainer` in its folder: what it says, how good it gets, and the model.

recipe.yaml         the recipe
metrics.jsonl       one object per update; iteration 0 is the start
tensorboard/        the same numbers as events
model/              the model at the last evaluation, as transformers writes it
evaluation.json     it and the base on the test problems
report.html         made from the above
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.utils.logging import disable_progress_bar

from entroflow.checkpoints import to_json, write_text
from entroflow.errors import InputError
from entroflow.evaluation.base import mean_over_prompts
from entroflow.launch import asked_to_stop
from entroflow.llm.embedded import BASE
from entroflow.llm.grpo import EntropyGRPOConfig, EntropyGRPOTrainer
from entroflow.llm.passing import avg_at, pass_at
from entroflow.llm.problems import Judged, Problems, judge, problems_of
from entroflow.llm.recipe import EMBEDDED, LLMRecipe, load
from entroflow.report.events import Events
from entroflow.report.llm_page import write_llm_report
from entroflow.runs import EVALUATION, RECIPE, RunFolder, package_version

MODEL = "model"
SHOWN = 8
"""Test problems whose answers are written down."""

Watch = Callable[[Mapping[str, Any]], None]


def load_model(path: str, dtype: str = "float32") -> tuple[Any, Any]:
    """A causal language model and its tokenizer; the libraries' own bars stay away.

    Args:
        path: `embedded`, a run folder, or what transformers finds.

    Raises:
        InputError: there is none.
    """
    disable_progress_bar()
    place = str(BASE) if path == EMBEDDED else path
    if (Path(place) / MODEL).is_dir():
        place = str(Path(place) / MODEL)
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"no language model can be loaded from {path!r}: {reason}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def train(recipe: LLMRecipe, run: Path | None = None, watch: Watch | None = None) -> RunFolder:
    """Train in a new run folder.

    Args:
        run: folder, `runs/<recipe>-<time>` if None; never overwritten.
        watch: called with every line of the metrics.

    Raises:
        InputError: a model, a task or a setting is wrong.
    """
    model, tokenizer = load_model(recipe.model.path, recipe.model.dtype)
    problems = problems_of(recipe.task, tokenizer)
    # What TRL itself may want to write goes nowhere: the run folder has its own files.
    with TemporaryDirectory() as scratch:
        trainer = _trainer(recipe, model, tokenizer, problems, Path(scratch))
        return _run(recipe, trainer, problems, run, watch)


def _trainer(
    recipe: LLMRecipe, model: Any, tokenizer: Any, problems: Problems, scratch: Path
) -> EntropyGRPOTrainer:
    """TRL's trainer, which says nothing by itself.

    Raises:
        InputError: a setting that it does not take.
    """
    with warnings.catch_warnings():
        # TRL still sets what transformers will call otherwise.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            trainer = EntropyGRPOTrainer(
                model, problems.reward, EntropyGRPOConfig(**recipe.trl_settings(scratch)),
                train_dataset=problems.train, processing_class=tokenizer,
            )  # fmt: skip
        except (ValueError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{recipe.name}: trainer: {reason}") from None
    for silent in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(silent)
    return trainer


def _run(
    recipe: LLMRecipe,
    trainer: EntropyGRPOTrainer,
    problems: Problems,
    run: Path | None,
    watch: Watch | None,
) -> RunFolder:
    # Of several processes all judge, as weights may lie on all of them; one writes.
    main = trainer.accelerator.is_main_process
    folder = _shared(recipe, run, main)
    with folder.held() if main else nullcontext(), asked_to_stop() as stopping:
        recorder = _Recorder(folder, recipe, trainer, problems, watch, stopping)
        trainer.add_callback(recorder)
        base = recorder.judge(problems.test)
        recorder.begin()
        trainer.train()
        recorder.close()
        recorder.save()
        tuned = recorder.judge(problems.test)
        if main:
            found = {"iteration": trainer.state.global_step, **compared(problems, base, tuned)}
            write_text(folder.path / EVALUATION, to_json(found, indent=1) + "\n")
            write_llm_report(folder)
    return folder


def _shared(recipe: LLMRecipe, run: Path | None, main: bool) -> RunFolder:
    """The run folder, which one process names and makes for all.

    Raises:
        InputError: it is in use; in every process.
    """
    said: list[Any] = [None, None]
    if main:
        place = run or Path("runs") / f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
        try:
            said = [str(RunFolder.create(place, recipe.to_yaml()).path), None]
        except InputError as error:
            said = [None, str(error)]
    broadcast_object_list(said)
    if said[1] is not None:
        raise InputError(said[1])
    return RunFolder(Path(said[0]))


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


class _Recorder(TrainerCallback):
    """Writes down what TRL logs, and how good the policy is now and then."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: LLMRecipe,
        trainer: EntropyGRPOTrainer,
        problems: Problems,
        watch: Watch | None,
        stopping: Callable[[], bool],
    ) -> None:
        self.folder, self.recipe, self.trainer, self.problems = folder, recipe, trainer, problems
        self.watch, self.stopping = watch, stopping
        self.events = Events(folder.tensorboard)
        self.seconds, self._since = 0.0, perf_counter()

    def judge(self, rows: Sequence[dict[str, Any]]) -> Judged:
        """The policy as it is, on problems that are held out."""
        settings = self.recipe.evaluation
        return judge(
            self.trainer.accelerator.unwrap_model(self.trainer.model),
            self.trainer.processing_class, [*rows][: settings.problems], self.problems.reward,
            each=settings.each,
            most_words=self.problems.most_words or self.trainer.args.max_completion_length or 256,
            temperature=settings.temperature, seed=self.recipe.run.seed,
            batch_size=settings.batch_size,
        )  # fmt: skip

    def begin(self) -> None:
        """The line of iteration 0."""
        self._write({"iteration": 0, "version": package_version(), **self._evaluated()})
        self._since = perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop where that was asked for, in any of the processes: in all after the same update."""
        asked = torch.tensor(float(self.stopping()))
        if self.trainer.processes.sum(asked).item() > 0:
            control.should_training_stop = True

    def save(self) -> None:
        """Write the model as it is; an older one stays until the new one is whole."""
        whole, part = self.folder.path / MODEL, self.folder.path / f".{MODEL}.part"
        self.trainer.save_model(str(part))
        if not self.trainer.accelerator.is_main_process:
            return
        # TRL's settings, as a pickle: the recipe has them in plain sight.
        (part / "training_args.bin").unlink(missing_ok=True)
        if whole.exists():
            shutil.rmtree(whole)
        part.rename(whole)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One line per update."""
        if "loss" not in (logs or {}):
            return
        self.seconds += perf_counter() - self._since
        line = {"iteration": state.global_step, "seconds": round(self.seconds, 3)}
        line |= {k: v for k, v in logs.items() if isinstance(v, int | float) and k != "epoch"}
        due = state.global_step % self.recipe.evaluation.every == 0
        if due or state.global_step == args.max_steps:
            line |= self._evaluated()
            self.save()
        self._write(line)
        self._since = perf_counter()

    def _evaluated(self) -> dict[str, float]:
        found = self.judge(self.problems.validation).numbers()
        line: dict[str, float] = {}
        for name, (value, low, high) in found.items():
            line |= {f"eval/{name}": value, f"eval/{name}_low": low, f"eval/{name}_high": high}
        return line

    def _write(self, line: dict[str, Any]) -> None:
        if not self.trainer.accelerator.is_main_process:
            return
        self.folder.append_metrics(line)
        self.events.numbers(line)
        if self.watch is not None:
            self.watch(line)

    def close(self) -> None:
        """Write what is left."""
        self.events.close()


def evaluate(
    path: str, *, problems: int, each: int, temperature: float, seed: int
) -> dict[str, Any]:
    """A model on test problems: those of its run's recipe, or of countdown.

    Args:
        path: see `load_model`.
        problems, each: how many, and answers to each.
        temperature, seed: see `embedded.answers`.

    Returns:
        `problems`, and by measure (`avg@16`, `pass@4`) its value and 95% interval over problems.

    Raises:
        InputError: there is no such model, or not as many problems.
    """
    of_run = Path(path) / RECIPE
    recipe = load(of_run if of_run.is_file() else "countdown")
    model, tokenizer = load_model(path, recipe.model.dtype)
    model.to(PartialState().device)
    known = problems_of(recipe.task, tokenizer)
    if problems > len(known.test):
        raise InputError(f"there are {len(known.test)} test problems, not {problems}.")
    found = judge(
        model, tokenizer, known.test[:problems], known.reward, each=each, seed=seed,
        most_words=known.most_words or recipe.trainer.get("max_completion_length", 256),
        temperature=temperature, batch_size=recipe.evaluation.batch_size,
    )  # fmt: skip
    return {"problems": problems, **found.numbers()}
