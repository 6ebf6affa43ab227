"""A run of `EntropyGRPOTrainer` in its folder: what it says, how good it gets, and the model.

recipe.yaml             the recipe
metrics.jsonl           one object per update; iteration 0 is the start
tensorboard/            the same numbers as events
checkpoints/00000200/   the model at the last evaluation, as transformers writes it, and the rest
                        that it takes to go on (state.py)
base.json               what the model answered to the test problems before it was trained
evaluation.json         it and the tuned model on the test problems
report.html             made from the above
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
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
from trl.models.utils import unwrap_model_for_generation

from entroflow.checkpoints import settled, to_json, write_text
from entroflow.errors import InputError
from entroflow.evaluation.base import mean_over_prompts
from entroflow.launch import asked_to_stop
from entroflow.llm.embedded import BASE
from entroflow.llm.grpo import EntropyGRPOConfig
from entroflow.llm.passing import avg_at, pass_at
from entroflow.llm.problems import Judged, Problems, judge, problems_of
from entroflow.llm.recipe import EMBEDDED, LLMRecipe, Model, load
from entroflow.llm.state import ResumableTrainer, check_state
from entroflow.report.events import Events
from entroflow.report.llm_page import write_llm_report
from entroflow.runs import EVALUATION, RECIPE, RunFolder, package_version, read_object

BASE_ANSWERS, ADAPTER = "base.json", "adapter_config.json"
LONGEST = 256
"""Tokens of an answer where a recipe does not say how many."""
SHOWN = 8
"""Test problems whose answers are written down."""

Watch = Callable[[Mapping[str, Any]], None]


def load_model(path: str, dtype: str = "float32", merged: Path | None = None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer; the libraries' own bars stay away.

    Args:
        path: `embedded`, a run folder, or what transformers finds. A LoRA is merged into its base.
        merged: where a merged model is written, which then goes by this name: TRL loads the
            reference of a KL by name.

    Raises:
        InputError: there is none.
    """
    disable_progress_bar()
    place = str(BASE) if path == EMBEDDED else path
    if (Path(place) / RECIPE).is_file():
        place = str(RunFolder(Path(place)).latest())
    settings = {"dtype": getattr(torch, dtype)}
    try:
        if (Path(place) / ADAPTER).is_file():
            from peft import AutoPeftModelForCausalLM

            with _without_future():
                adapted = AutoPeftModelForCausalLM.from_pretrained(place, **settings)
            model = adapted.merge_and_unload()
            if merged is not None:
                model.save_pretrained(merged)
                model = AutoModelForCausalLM.from_pretrained(merged, **settings)
        else:
            model = AutoModelForCausalLM.from_pretrained(place, **settings)
        tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"no language model can be loaded from {path!r}: {reason}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


@contextmanager
def _without_future() -> Iterator[None]:
    """Within, nothing is heard of what the libraries will call otherwise among themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def train(recipe: LLMRecipe, run: Path | None = None, watch: Watch | None = None) -> RunFolder:
    """Train in a new run folder.

    Args:
        run: folder, `runs/<recipe>-<time>` if None; never overwritten.
        watch: called with every line of the metrics.

    Raises:
        InputError: a model, a task or a setting is wrong.
    """
    if (Path(recipe.model.path) / RECIPE).is_file():
        # That run may go on; this one has begun where it is now.
        place = str(RunFolder(Path(recipe.model.path)).latest().resolve())
        recipe = replace(recipe, model=recipe.model.model_copy(update={"path": place}))
    # What TRL itself may want to write goes nowhere: the run folder has its own files.
    with TemporaryDirectory() as scratch:
        trainer, problems = _prepared(recipe, Path(scratch))

        def new() -> RunFolder:
            place = run or Path("runs") / f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
            return RunFolder.create(place, recipe.to_yaml())

        folder = _shared(new, trainer.accelerator.is_main_process)
        _run(recipe, trainer, problems, folder, None, watch)
    return folder


def resume(path: Path, overrides: Sequence[str] = (), watch: Watch | None = None) -> RunFolder:
    """Go on from the last checkpoint of a run, with the same weights as if it never stopped.

    Args:
        path: the run folder.
        overrides: `run.updates=N` to go further than it was meant to, which moves the end of a
            falling learning rate; no other, as that would make it another run.
        watch: see `train`.

    Raises:
        InputError: no run folder, no checkpoint, a torn one, or nothing left to do.
    """
    folder = RunFolder.open(path)
    for override in overrides:
        if not override.startswith("run.updates="):
            raise InputError(
                f"a resumed run can change run.updates, not {override!r}; start a new run for "
                "another recipe."
            )
    recipe = load(path / RECIPE, overrides)
    checkpoint = folder.latest()
    with TemporaryDirectory() as scratch:
        trainer, problems = _prepared(recipe, Path(scratch))
        done = check_state(checkpoint, trainer.accelerator.num_processes)
        if done >= recipe.run.updates and (path / EVALUATION).exists():
            raise InputError(f"{path} has made its {done} updates; go further with run.updates=N.")
        if not (path / BASE_ANSWERS).is_file():
            raise InputError(
                f"{path} has no {BASE_ANSWERS}, what it is compared with; start a new run from its "
                f"model: model.path={path}"
            )
        _run(recipe, trainer, problems, folder, checkpoint, watch)
    return folder


def _prepared(recipe: LLMRecipe, scratch: Path) -> tuple[ResumableTrainer, Problems]:
    """TRL's trainer, which says nothing by itself, and what it is to solve.

    Raises:
        InputError: a model, a task or a setting is wrong.
    """
    model, tokenizer = load_model(recipe.model.path, recipe.model.dtype, scratch / "merged")
    problems = problems_of(recipe.task, tokenizer)
    known = min(len(problems.validation), len(problems.test))
    if recipe.evaluation.problems > known:
        raise InputError(
            f"{recipe.name}: evaluation.problems is {recipe.evaluation.problems}, but {known} are "
            "held out."
        )
    with _without_future():
        try:
            trainer = ResumableTrainer(
                model, problems.reward, EntropyGRPOConfig(**recipe.trl_settings(scratch)),
                train_dataset=problems.train, processing_class=tokenizer,
                peft_config=_lora(recipe.model),
            )  # fmt: skip
        except (ValueError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{recipe.name}: trainer: {reason}") from None
    for silent in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(silent)
    at_once = (trainer.args.generation_batch_size or 1) // (trainer.num_generations or 1)
    if len(problems.train) < at_once:
        raise InputError(
            f"{recipe.name}: there are {len(problems.train)} problems to train on, but {at_once} "
            "are answered at once; lower trainer.per_device_train_batch_size or "
            "trainer.gradient_accumulation_steps."
        )
    if trainer.is_fsdp_enabled:
        shards = str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
        if "FULL" not in shards:
            raise InputError(
                f"under FSDP's {shards} no model would be saved; set fsdp_state_dict_type: "
                "FULL_STATE_DICT in the configuration of accelerate."
            )
    return trainer, problems


def _lora(model: Model) -> Any:
    if model.lora_rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=model.lora_rank, lora_alpha=model.lora_alpha, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip


def _run(
    recipe: LLMRecipe,
    trainer: ResumableTrainer,
    problems: Problems,
    folder: RunFolder,
    checkpoint: Path | None,
    watch: Watch | None,
) -> None:
    main = trainer.accelerator.is_main_process
    held = folder.held() if main else nullcontext()
    with held, asked_to_stop() as stopping, _without_future():
        if main and checkpoint is not None:
            folder.cut_after(int(checkpoint.name))
            folder.write_recipe(recipe.to_yaml())
        recorder = _Recorder(folder, recipe, trainer, problems, watch, stopping)
        trainer.add_callback(recorder)
        if checkpoint is not None and int(checkpoint.name) >= recipe.run.updates:
            # Only the end was missing.
            trainer._load_from_checkpoint(str(checkpoint))
            recorder.catch_up(int(checkpoint.name))
            recorder.finish(int(checkpoint.name))
            return
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        recorder.finish(trainer.state.global_step)


def _shared(new: Callable[[], RunFolder], main: bool) -> RunFolder:
    """The run folder, which one process makes for all.

    Raises:
        InputError: it is in use; in every process.
    """
    said: list[Any] = [None, None]
    if main:
        try:
            said = [str(new().path), None]
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
                self.problems.reward, each=settings.each,
                most_words=trainer.args.max_completion_length or LONGEST,
                temperature=settings.temperature, seed=self.recipe.run.seed,
                batch_size=settings.batch_size,
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
            base = _from_json(read_object(self.folder.path / BASE_ANSWERS))
            found = {"iteration": updates, **compared(self.problems, base, tuned)}
            write_text(self.folder.path / EVALUATION, to_json(found, indent=1) + "\n")
            write_llm_report(self.folder)

    def _save(self, update: int) -> None:
        """Write a checkpoint; the one before goes when it is whole."""
        whole = self.folder.checkpoints / f"{update:08d}"
        part = whole.with_name(f".{whole.name}.part")
        if self.main:
            part.mkdir()
        self.trainer.save_model(str(part))
        self.trainer.write_state(part)
        if self.main:
            # TRL's settings, as a pickle: the recipe has them in plain sight.
            (part / "training_args.bin").unlink(missing_ok=True)
            settled(part)
            part.rename(whole)
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


def _as_json(judged: Judged) -> dict[str, Any]:
    return {"said": judged.said, "right": judged.right.tolist()}


def _from_json(found: Mapping[str, Any]) -> Judged:
    return Judged(found["said"], torch.tensor(found["right"]))


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
    if recipe.trainer.get("use_cpu") is not True:
        model.to(PartialState().device)
    known = problems_of(recipe.task, tokenizer)
    if problems > len(known.test):
        raise InputError(f"there are {len(known.test)} test problems, not {problems}.")
    found = judge(
        model, tokenizer, known.test[:problems], known.reward, each=each, seed=seed,
        most_words=recipe.trainer.get("max_completion_length", LONGEST),
        temperature=temperature, batch_size=recipe.evaluation.batch_size,
    )  # fmt: skip
    return {"problems": problems, **found.numbers()}
