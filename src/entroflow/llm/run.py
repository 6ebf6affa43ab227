"""A run of `EntropyGRPOTrainer` in its folder, begun or gone on with.

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

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerState,
)
from transformers.utils.logging import disable_progress_bar

from entroflow.checkpoints import (
    DIGESTS,
    PROGRESS,
    TRAINER_STATE,
    check_digests,
)
from entroflow.errors import InputError
from entroflow.llm.embedded import BASE, Sampling
from entroflow.llm.grpo import EntropyGRPOConfig
from entroflow.llm.problems import Problems, judge, problems_of
from entroflow.llm.recipe import EMBEDDED, LLMRecipe, Model, load
from entroflow.llm.recorder import LONGEST, Recorder, Watch, read_base_answers
from entroflow.llm.state import ResumableTrainer, check_state, inputs_of
from entroflow.places import hinting_at_moved, paths_in
from entroflow.recipe.kinds import RECIPE, Kind
from entroflow.runs.folder import (
    EVALUATION,
    RunFolder,
    folder_name,
)
from entroflow.runs.inputs import check_inputs, digest_of_tensors, module_of
from entroflow.runs.llm_files import logged_at
from entroflow.signals import asked_to_stop

log = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"


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
        place = str(RunFolder.open(Path(place), Kind.LANGUAGE_MODEL).latest())
    if (Path(place) / PROGRESS).is_file() or (Path(place) / DIGESTS).is_file():
        check_digests(Path(place))
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
    except ImportError:
        raise
    except Exception as error:  # what the libraries raise of damaged files is written down nowhere
        reason = " ".join(str(error).split())
        known = "" if Path(place).exists() else ", which is no folder here, so a name on the hub"
        raise InputError(
            f"no language model can be loaded from {path!r}{known}: {reason}"
        ) from None
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
    recipe = _of_checkpoint(recipe)
    # What TRL itself may want to write goes nowhere: the run folder has its own files.
    with TemporaryDirectory() as scratch:
        trainer, problems = _prepared(recipe, Path(scratch))
        for remark in problems.remarks() if trainer.accelerator.is_main_process else ():
            log.warning("%s.", remark)

        def new() -> RunFolder:
            named = f"{folder_name(recipe.name)}-{datetime.now():%Y%m%d-%H%M%S}"
            place = run or Path("runs") / named
            return RunFolder.create(place, recipe.to_yaml())

        folder = _shared(new, trainer.accelerator.is_main_process)
        _run(recipe, trainer, problems, folder, None, watch)
    return folder


def _of_checkpoint(recipe: LLMRecipe) -> LLMRecipe:
    """A recipe whose model is no run, which may go on, but the checkpoint where that is now."""
    if not (Path(recipe.model.path) / RECIPE).is_file():
        return recipe
    source = RunFolder.open(Path(recipe.model.path), Kind.LANGUAGE_MODEL)
    place = str(source.latest().resolve())
    return replace(recipe, model=recipe.model.model_copy(update={"path": place}))


def resume(
    path: Path,
    overrides: Sequence[str] = (),
    watch: Watch | None = None,
    *,
    trust: bool = False,
) -> RunFolder:
    """Go on from the last checkpoint of a run, with the same weights as if it never stopped.

    Args:
        path: the run folder.
        overrides: `run.updates=N` to go further than it was meant to, which moves the end of a
            falling learning rate; `model.path` and `task.path` where what was moved holds the same;
            no other, as that would make it another run.
        watch: see `train`.
        trust: see `recipe.load`.

    Raises:
        InputError: no run folder, no checkpoint, a torn one, or nothing left to do.
    """
    folder = RunFolder.open(path, Kind.LANGUAGE_MODEL)
    for override in overrides:
        if override.partition("=")[0] not in ("run.updates", "model.path", "task.path"):
            raise InputError(
                "a resumed run can change run.updates, and model.path and task.path if they were "
                f"moved, not {override!r}; start a new run for another recipe."
            )
    recipe = _of_checkpoint(load(path / RECIPE, overrides, trust=trust))
    checkpoint = folder.latest()
    check_digests(checkpoint)
    paths = {"model": {"path": recipe.model.path}, "task": {"path": recipe.task.path}}
    with TemporaryDirectory() as scratch:
        with hinting_at_moved(paths_in(paths)):
            trainer, problems = _prepared(recipe, Path(scratch))
        processes = trainer.accelerator.num_processes
        done = check_state(checkpoint, processes, recipe.identity, trainer.inputs, trainer.code)
        if done >= recipe.run.updates and (path / EVALUATION).exists():
            raise InputError(f"{path} has made its {done} updates; go further with run.updates=N.")
        read_base_answers(path)
        _run(recipe, trainer, problems, folder, checkpoint, watch)
    return folder


def _prepared(recipe: LLMRecipe, scratch: Path) -> tuple[ResumableTrainer, Problems]:
    """TRL's trainer, which says nothing by itself, and what it is to solve.

    Raises:
        InputError: a model, a task or a setting is wrong.
    """
    recipe.refuse_strangers()
    model, tokenizer = load_model(recipe.model.path, recipe.model.dtype, scratch / "merged")
    problems = problems_of(recipe.task, tokenizer)
    inputs = {
        "model": {"of": recipe.model.path, "digest": digest_of_tensors(model.state_dict())},
        "task": _task_input(recipe, problems),
    }
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
    trainer.identity = recipe.identity
    trainer.inputs = inputs
    trainer.code = module_of(recipe.task.reward) if recipe.has_own_reward else {}
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


def _task_input(recipe: LLMRecipe, problems: Problems) -> dict[str, str]:
    return {"of": recipe.task.path or recipe.task.type, "digest": problems.digest()}


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
            folder.metrics_until(int(checkpoint.name), logged_at(checkpoint))
            folder.cut_after(int(checkpoint.name))
            folder.write_recipe(recipe.to_yaml())
        recorder = Recorder(folder, recipe, trainer, problems, watch, stopping)
        trainer.add_callback(recorder)
        if checkpoint is not None and int(checkpoint.name) >= recipe.run.updates:
            # Only the end was missing.
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
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


def recipe_of(path: str, trust: bool = False) -> LLMRecipe:
    """What a model is judged by: the recipe of its run, or countdown; see `load`."""
    of_run = Path(path) / RECIPE
    if not of_run.is_file():
        return load("countdown", trust=trust)
    RunFolder.open(Path(path), Kind.LANGUAGE_MODEL)
    return load(of_run, trust=trust)


def evaluate(
    path: str,
    *,
    problems: int,
    each: int,
    temperature: float,
    seed: int,
    trust: bool = False,
) -> dict[str, Any]:
    """A model on test problems: those of its run's recipe, or of countdown.

    Args:
        path: see `load_model`.
        problems, each: how many, and answers to each.
        temperature, seed: see `embedded.Sampling`.
        trust: see `recipe.load`.

    Returns:
        `problems`, and by measure (`avg@16`, `pass@4`) its value and 95% interval over problems.

    Raises:
        InputError: there is no such model, or not as many problems.
    """
    recipe, state = recipe_of(path, trust), TrainerState()
    recipe.refuse_strangers()
    checkpoint = RunFolder(Path(path)).latest() if (Path(path) / RECIPE).is_file() else None
    if checkpoint is not None:
        state.global_step, state.max_steps = int(checkpoint.name), recipe.run.updates
    model, tokenizer = load_model(path, recipe.model.dtype)
    if recipe.trainer.get("use_cpu") is not True:
        model.to(PartialState().device)
    known = problems_of(recipe.task, tokenizer)
    if checkpoint is not None:
        # Of edited data other problems are held out: some that the run was trained on.
        before = inputs_of(checkpoint) or {}
        check_inputs(
            {key: each for key, each in before.items() if key == "task"},
            {"task": _task_input(recipe, known)} if "task" in before else {},
            checkpoint,
        )
    if problems > len(known.test):
        raise InputError(f"there are {len(known.test)} test problems, not {problems}.")
    longest = recipe.trainer.get("max_completion_length", LONGEST)
    sampling = Sampling(each, longest, temperature, seed, recipe.evaluation.batch_size)
    judged = judge(model, tokenizer, known.test[:problems], known.reward, sampling, state)
    return {"problems": problems, **judged.numbers()}
