"""Compare recipes at equal cost: several seeds each, as separate processes, one thread each.

    arms -> runs that end with the budget -> results.json -> table

Every run is a run folder of its own, made by the command line, so each can be looked at, and what
was stopped goes on. A result is kept under recipe hash, seed and base weights (with
the contents of the files that the recipe names) and never made twice.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from entroflow.comparison.results import Results
from entroflow.comparison.table import best_by_validation
from entroflow.contents import read_object
from entroflow.errors import InputError
from entroflow.evaluation.base import HeldOutEvaluation
from entroflow.locks import one_writer
from entroflow.recipe.load import load_recipe
from entroflow.runs.files import RunsComparison
from entroflow.runs.folder import EVALUATION, METRICS, RunFolder, folder_name
from entroflow.runs.inputs import digest_of_records
from entroflow.settings import ENDS
from entroflow.signals import end_group, interrupted
from entroflow.training.forecast import expected_of, rehearse
from entroflow.training.trainer import Trainer
from entroflow.writing import to_json, write_text

log = logging.getLogger(__name__)

RESULTS = "results.json"
OTHERWISE = "; restore it from a copy, or remove it: the runs beside it tell it anew."
CURVE = ("iteration", "seconds", "ledger/weighted_evaluations", "hacking")
"""What the curve of a result has besides the evaluations."""


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

    def folder(self, out: Path) -> Path:
        """Where it is run."""
        name = f"{Path(self.arm.recipe).stem}-{self.recipe_hash}-{self.base}-seed{self.seed}"
        return out / "runs" / folder_name(name)


def planned(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    end: Mapping[str, float | str],
    shared: Sequence[str] = (),
    trust: bool = False,
) -> list[Job]:
    """All runs of a comparison, arm by arm.

    Args:
        end: what every run may take: `budget`, `updates` or `minutes`, as in the section `run`.
        shared: overrides of every arm.
        trust: see `load_recipe`.

    Raises:
        InputError: a recipe is wrong, given twice, or can't be run within the budget.
    """
    ends = {key: end.get(key) for key in ENDS}
    ending = [f"run.{key}={'null' if value is None else value}" for key, value in ends.items()]
    jobs: dict[tuple[Any, ...], Job] = {}
    for arm in arms:
        overrides = (*arm.overrides, *shared)
        for override in overrides:
            if override.partition("=")[0] in {f"run.{key}" for key in (*ENDS, "seed")}:
                raise InputError(
                    f"{override}: how long runs are, and their seeds, are the same for all; give "
                    "--budget, --updates or --minutes, and --seeds."
                )
        with _said_of(arm):
            recipe = load_recipe(arm.recipe, (*overrides, *ending), trust=trust)
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
                ended = (*overrides, *ending, f"run.seed={seed}")
                job = Job(arm, ended, load_recipe(arm.recipe, ended, trust=trust).hash, seed, base)
                twin = jobs.setdefault(_key(job.key), job)
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


def run_all(
    jobs: Sequence[Job],
    out: Path,
    *,
    at_once: int,
    done: Callable[[Job, Mapping[str, Any] | None], None],
    trust: bool = False,
) -> list[dict[str, Any]]:
    """Run what has no result yet, `at_once` processes at a time, one thread each.

    Interrupted by SIGINT, SIGTERM or SIGHUP, the runs finish their iterations and are saved; the
    same call goes on with them. A second SIGINT ends them at once.

    Args:
        out: holds `results.json`, and the run folders and their output in `runs/`.
        done: called with every job and its result, or None where it failed.
        trust: see `load_recipe`.

    Returns:
        The results of the jobs, in their order, without those that failed.

    Raises:
        KeyboardInterrupt: after the runs have stopped.
    """
    children = _Children()
    with one_writer(out), interrupted():
        kept = {_key(result): result for result in stored_results(out)}
        lock = threading.Lock()

        def run(job: Job) -> dict[str, Any] | None:
            result = kept.get(_key(job.key))
            if result is None:
                result = _run(job, out, children, trust)
                if result is not None:
                    with lock:
                        kept[_key(job.key)] = result
                        content = {"results": list(kept.values())}
                        write_text(out / RESULTS, to_json(content, indent=1) + "\n")
            return result

        with ThreadPoolExecutor(at_once) as pool:
            running = {pool.submit(run, job): job for job in jobs}
            try:
                for finished in as_completed(running):
                    done(running[finished], finished.result())
            except BaseException:
                log.warning(
                    "the runs finish their iterations and are saved; press Ctrl-C again to end "
                    "them at once."
                )
                try:
                    children.stop()
                    pool.shutdown(cancel_futures=True)
                except KeyboardInterrupt:
                    children.kill()
                raise
        # One result serves all arms that resolve to its recipe, each under its own name.
        return [{**kept[_key(job.key)], **_named(job)} for job in jobs if _key(job.key) in kept]


def stored_results(out: Path) -> list[dict[str, Any]]:
    """What `results.json` holds; nothing where there is none yet.

    Raises:
        InputError: it is torn.
    """
    path = out / RESULTS
    if not path.exists():
        return []
    results: list[dict[str, Any]] = read_object(path, Results, remedy=OTHERWISE)["results"]
    if not all("measure" in result["test"] for result in results):
        raise InputError(f"{path} is of an older version; give another --out.")
    return results


def _named(job: Job) -> dict[str, Any]:
    """What a run was asked for as."""
    return {
        "arm": {"recipe": job.arm.recipe, "overrides": list(job.arm.overrides)},
        "overrides": list(job.overrides),
    }


def _key(content: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(content[name] for name in Job.KEY)


class _Children:
    """Processes in sessions of their own, so that a signal reaches them once: through `stop`.

    Each stops by itself where this process ends before it, as its standard input ends then.
    """

    def __init__(self) -> None:
        self._alive: list[subprocess.Popen[bytes]] = []
        self._stopped = False
        self._lock = threading.Lock()

    def run(self, command: Sequence[str], **options: Any) -> None:
        """Run to the end; at once over when all were asked to stop."""
        with self._lock:
            if self._stopped:
                return
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, start_new_session=True, **options
            )
            self._alive.append(process)
        process.wait()
        with self._lock:
            self._alive.remove(process)
            if self._stopped:
                end_group(process.pid)
        assert process.stdin is not None
        process.stdin.close()

    def stop(self) -> None:
        """Ask all to finish their iteration, save and exit; start no more."""
        with self._lock:
            self._stopped = True
            for process in self._alive:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End all at once, whatever they have started included; start no more."""
        with self._lock:
            self._stopped = True
            for process in self._alive:
                end_group(process.pid, signal.SIGKILL)
                process.kill()


def _run(job: Job, out: Path, children: _Children, trust: bool) -> dict[str, Any] | None:
    """The result of one run, or None if it failed; its output is in a file beside its folder."""
    folder = job.folder(out)
    if not (folder / EVALUATION).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        asked = ["--resume", str(folder)]
        if not RunFolder(folder).all_checkpoints():
            # What was killed before its first checkpoint begins anew.
            shutil.rmtree(folder, ignore_errors=True)
            asked = [job.arm.recipe, *job.overrides, "--run", str(folder)]
        if trust:
            asked.append("--trust")
        with folder.with_suffix(".log").open("ab") as output:
            children.run(
                [sys.executable, "-m", "entroflow.cli.child", "train", *asked],
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        if not (folder / EVALUATION).exists():
            return None
    try:
        return result_of(folder, job)
    except InputError as error:
        with folder.with_suffix(".log").open("a", encoding="utf-8") as output:
            output.write(f"{error}\n")
        return None


def result_of(folder: Path, job: Job) -> dict[str, Any]:
    """What a finished run left behind, without pictures; ready for JSON.

    Raises:
        InputError: no image of the comparison could be judged.
    """
    run = RunFolder.open(folder)
    metrics = run.metrics()
    if (gap := run.gap(metrics)) or not metrics:
        raise InputError(f"{folder / METRICS} {gap or 'is missing'}; restore it from a copy.")
    last = metrics[-1]
    test = read_object(folder / EVALUATION, RunsComparison)
    if test["gain"]["value"] is None:
        raise InputError(f"{folder}: no image of the comparison with the base has a score.")
    return {
        **job.key,
        **_named(job),
        "version": metrics[0].get("version", "unknown"),
        "iterations": last["iteration"],
        "training_seconds": last["seconds"],
        "ledger": {key: value for key, value in last.items() if key.startswith("ledger/")},
        "curve": curve_of(metrics),
        **attention_of(metrics),
        "test": test,
    }


def curve_of(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations of a run, and what it had taken until each."""
    return [
        {
            key: value
            for key, value in line.items()
            if key in CURVE or key.startswith(("eval/", "drift/"))
        }
        for line in metrics
        if "eval/score" in line
    ]


def attention_of(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of every iteration that measured attention, what chose and whether it was right to."""
    found = [line for line in metrics if line.get("attention")]
    if not found:
        return {}
    correlations = [line["attention/rank_correlation"] for line in found]
    explored = [line["attention"]["explored"] for line in found]
    return {"attention": {"rank_correlation": correlations, "explored": explored}}


# --- the whole ------------------------------------------------------------------------------------


class Progress(Protocol):
    """Shows a comparison as it goes."""

    def begin(self, jobs: Sequence[Job]) -> None:
        """These runs are to be done; called again where more follow from their results."""
        ...

    def done(self, job: Job, result: Mapping[str, Any] | None) -> None:
        """A run is finished, or failed."""
        ...


def compare(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    end: Mapping[str, float | str],
    out: Path,
    *,
    shared: Sequence[str] = (),
    learning_rates: Sequence[str] = (),
    at_once: int | None = None,
    progress: Progress,
    trust: bool = False,
) -> tuple[list[dict[str, Any]], list[Job]]:
    """Run every arm with every seed at equal cost.

    Args:
        end: see `planned`.
        out: see `run_all`.
        shared: overrides of every arm.
        learning_rates: if given, every arm is run with each of them and the first seed, and goes on
            with the one whose last score on validation prompts is the best.
        at_once: processes; as many as there are cores if None.
        trust: see `load_recipe`.

    Returns:
        The results, and the runs that failed.

    Raises:
        InputError: see `planned`.
        KeyboardInterrupt: after the runs have stopped; the same call goes on.
    """
    cores = at_once or os.cpu_count() or 1

    def made(chosen: Sequence[Arm], which: Sequence[int]) -> tuple[list[dict[str, Any]], list[Job]]:
        jobs = planned(chosen, which, end, shared, trust)
        progress.begin(jobs)
        results = run_all(jobs, out, at_once=cores, done=progress.done, trust=trust)
        there = {_key(result) for result in results}
        return results, [job for job in jobs if _key(job.key) not in there]

    if learning_rates:
        for override in [*shared, *(change for arm in arms for change in arm.overrides)]:
            if override.startswith("optimizer.learning_rate="):
                raise InputError(f"{override}: --learning-rates chooses it; give one of the two.")
        tried = {
            arm: [
                Arm(arm.recipe, (*arm.overrides, f"optimizer.learning_rate={rate}"))
                for rate in learning_rates
            ]
            for arm in arms
        }
        results, failed = made([arm for arms_ in tried.values() for arm in arms_], seeds[:1])
        if failed:
            return results, failed
        per_arm = len(learning_rates)
        arms = [
            Arm(best["arm"]["recipe"], tuple(best["arm"]["overrides"]))
            for best in (
                best_by_validation(results[first : first + per_arm])
                for first in range(0, len(results), per_arm)
            )
        ]
    return made(arms, seeds)
