"""Compare recipes at equal cost: several seeds each, as separate processes, one thread each.

    arms -> runs that end with the budget -> results.json -> table

Every run is a run folder of its own, made by the command line, so each can be looked at, and what
was stopped goes on. A result is kept under recipe hash, seed and base weights and never made twice.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import scipy.stats
import torch

from entroflow.checkpoints import one_writer, to_json, write_text
from entroflow.errors import InputError
from entroflow.evaluation.base import HeldOutEvaluation
from entroflow.recipe import load_recipe
from entroflow.runs import EVALUATION, RunFolder, read_object
from entroflow.trainer import Trainer

RESULTS = "results.json"
CURVE = (
    "iteration", "seconds", "eval/strict", "eval/strict_low", "eval/strict_high", "eval/score",
    "eval/texture", "eval/contrast", "eval/diversity", "ledger/weighted_evaluations",
)  # fmt: skip


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
class Budget:
    """What one run may spend: exactly one of the three.

    Attributes:
        weighted_evaluations: a forward and backward pass counts three.
        updates: optimizer steps.
        minutes: of training on one thread of this machine, as two iterations make one expect.
    """

    weighted_evaluations: float | None = None
    updates: int | None = None
    minutes: float | None = None

    def end(self, trainer: Trainer) -> list[str]:
        """The keys of `run` that end a recipe with the budget; for minutes the trainer takes two.

        Raises:
            InputError: it is less than one iteration.
        """
        iterations = self._iterations(trainer)
        if iterations < 1:
            raise InputError(f"{trainer.recipe.name}: the budget is less than one iteration.")
        if self.weighted_evaluations is not None:
            # By the ledger and not by its plan: a transition without advantage costs nothing.
            return ["run.iterations=null", f"run.budget={self.weighted_evaluations:.0f}"]
        return [f"run.iterations={math.floor(iterations)}", "run.budget=null"]

    def _iterations(self, trainer: Trainer) -> float:
        """How many iterations fit, by the plan of the first or, for minutes, the time of two."""
        objective, expected = trainer.recipe.objective, trainer.expected()
        if self.weighted_evaluations is not None:
            return self.weighted_evaluations / float(expected["weighted_evaluations"])
        if self.updates is not None:
            parts = objective.minibatches
            per_pass = len({s["start"] for s in expected["steps"]}) if parts == "by_step" else parts
            return self.updates / (per_pass * objective.epochs)
        assert self.minutes is not None
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        trainer.step()
        trainer.step()
        torch.set_num_threads(threads)
        return 60 * self.minutes / (trainer.seconds / 2)


@dataclass(frozen=True)
class Job:
    """One run: an arm with a seed, cut to the budget."""

    arm: Arm
    overrides: tuple[str, ...]
    recipe_hash: str
    seed: int
    base: str

    @property
    def key(self) -> dict[str, Any]:
        """Under which its result is kept."""
        return {"recipe_hash": self.recipe_hash, "seed": self.seed, "base": self.base}

    def folder(self, out: Path) -> Path:
        """Where it is run."""
        name = f"{Path(self.arm.recipe).stem}-{self.recipe_hash}-{self.base}-seed{self.seed}"
        return out / "runs" / name


def amount(text: str) -> float:
    """The number that `300k`, `1.5M` or `40000` stands for.

    Raises:
        InputError: none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text.strip())
    if not found or float(found[1]) <= 0:
        raise InputError(f"a budget is a number like 300k or 1.5M, not {text!r}.")
    return float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]]


def planned(
    arms: Sequence[Arm], seeds: Sequence[int], budget: Budget, shared: Sequence[str] = ()
) -> list[Job]:
    """All runs of a comparison, arm by arm.

    Args:
        shared: overrides of every arm.

    Raises:
        InputError: a recipe is wrong, given twice, or can't be run within the budget.
    """
    jobs: list[Job] = []
    for arm in arms:
        recipe = load_recipe(arm.recipe, [*arm.overrides, *shared])
        if not isinstance(recipe.evaluation, HeldOutEvaluation):
            raise InputError(
                f"{arm.name}: its evaluation has no test prompts to compare on; derive it from "
                "entroflow.evaluation.base.HeldOutEvaluation."
            )
        trainer = Trainer(recipe)
        base = trainer.policy.weights.digest("reference")
        end = budget.end(trainer)
        for seed in seeds:
            overrides = (*arm.overrides, *shared, *end, f"run.seed={seed}")
            hashed = load_recipe(arm.recipe, overrides).hash
            jobs.append(Job(arm, overrides, hashed, seed, base))
    keys = [tuple(job.key.values()) for job in jobs]
    if len(set(keys)) < len(keys):
        raise InputError("two of the recipes are the same.")
    return jobs


def run_all(
    jobs: Sequence[Job],
    out: Path,
    *,
    at_once: int,
    done: Callable[[Job, Mapping[str, Any] | None], None],
) -> list[dict[str, Any]]:
    """Run what has no result yet, `at_once` processes at a time, one thread each.

    Interrupted by SIGINT or SIGTERM, the runs finish their iterations and are saved; the same call
    goes on with them.

    Args:
        out: holds `results.json`, and the run folders and their output in `runs/`.
        done: called with every job and its result, or None where it failed.

    Returns:
        The results of the jobs, in their order, without those that failed.

    Raises:
        KeyboardInterrupt: after the runs have stopped.
    """
    children = _Children()
    with one_writer(out), _terminated_as_interrupted():
        stored: list[dict[str, Any]] = []
        if (out / RESULTS).exists():
            stored = read_object(out / RESULTS)["results"]
        kept = {_key(result): result for result in stored}
        lock = threading.Lock()

        def run(job: Job) -> dict[str, Any] | None:
            result = kept.get(_key(job.key))
            if result is None:
                result = _run(job, out, children)
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
                children.stop()
                pool.shutdown(cancel_futures=True)
                raise
        # One result serves all arms that resolve to its recipe, each under its own name.
        return [{**kept[_key(job.key)], **_named(job)} for job in jobs if _key(job.key) in kept]


def _named(job: Job) -> dict[str, Any]:
    """What a run was asked for as."""
    return {
        "arm": {"recipe": job.arm.recipe, "overrides": list(job.arm.overrides)},
        "overrides": list(job.overrides),
    }


def _key(content: Mapping[str, Any]) -> tuple[Any, ...]:
    return (content["recipe_hash"], content["seed"], content["base"])


class _Children:
    """Processes in sessions of their own, so that a signal reaches them once: through `stop`."""

    def __init__(self) -> None:
        self._alive: list[subprocess.Popen[bytes]] = []
        self._stopped = False
        self._lock = threading.Lock()

    def run(self, command: Sequence[str], **options: Any) -> None:
        """Run to the end; at once over when all were asked to stop."""
        with self._lock:
            if self._stopped:
                return
            process = subprocess.Popen(command, start_new_session=True, **options)
            self._alive.append(process)
        process.wait()

    def stop(self) -> None:
        """Ask all to finish their iteration, save and exit; start no more."""
        with self._lock:
            self._stopped = True
            for process in self._alive:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Within, SIGTERM raises KeyboardInterrupt, as SIGINT does."""

    def interrupt(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(job: Job, out: Path, children: _Children) -> dict[str, Any] | None:
    """The result of one run, or None if it failed; its output is in a file beside its folder."""
    folder = job.folder(out)
    if not (folder / EVALUATION).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        goes_on = folder.exists() and bool(RunFolder(folder).all_checkpoints())
        asked = (
            ["--resume", str(folder)]
            if goes_on
            else [job.arm.recipe, *job.overrides, "--run", str(folder)]
        )
        with folder.with_suffix(".log").open("ab") as log:
            children.run(
                [sys.executable, "-m", "entroflow.cli", "train", *asked],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        if not (folder / EVALUATION).exists():
            return None
    return result_of(folder, job)


def result_of(folder: Path, job: Job) -> dict[str, Any]:
    """What a finished run left behind, without pictures; ready for JSON."""
    metrics = RunFolder.open(folder).metrics()
    last = metrics[-1]
    return {
        **job.key,
        **_named(job),
        "version": metrics[0]["version"],
        "iterations": last["iteration"],
        "training_seconds": last["seconds"],
        "ledger": {key: value for key, value in last.items() if key.startswith("ledger/")},
        "curve": [
            {key: line.get(key) for key in CURVE} for line in metrics if "eval/strict" in line
        ],
        "test": json.loads((folder / EVALUATION).read_text(encoding="utf-8")),
    }


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """An arm over its seeds, on test prompts.

    Attributes:
        iterations, weighted_evaluations, minutes: means of what training took.
        strict, gain: means over seeds; `spread`: standard deviation (of n - 1) of the strict score.
        texture, diversity: means of tuned over base.
        versions: of the package, that began the runs.
    """

    name: str
    seeds: int
    iterations: float
    weighted_evaluations: float
    strict: float
    spread: float
    gain: float
    texture: float
    diversity: float
    minutes: float
    versions: frozenset[str]


def rows(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row per arm, the best first."""
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        arm = result["arm"]
        arms.setdefault(",".join([arm["recipe"], *arm["overrides"]]), []).append(result)
    return sorted((_row(name, found) for name, found in arms.items()), key=lambda row: -row.strict)


def _row(name: str, found: Sequence[Mapping[str, Any]]) -> Row:
    def mean(value: Callable[[Mapping[str, Any]], float]) -> float:
        return statistics.fmean(value(result) for result in found)

    def ratio(monitor: str) -> float:
        def of(result: Mapping[str, Any]) -> float:
            models = result["test"]["models"]
            tuned, base = (models[name]["monitors"].get(monitor) for name in ("tuned", "base"))
            return float(tuned / base) if tuned is not None and base else math.nan

        return mean(of)

    scores = [r["test"]["models"]["tuned"]["scores"]["overall"]["strict"] for r in found]
    return Row(
        name=name,
        seeds=len(found),
        iterations=mean(lambda r: r["iterations"]),
        weighted_evaluations=mean(lambda r: r["ledger"]["ledger/weighted_evaluations"]),
        strict=statistics.fmean(scores),
        spread=statistics.stdev(scores) if len(scores) > 1 else math.nan,
        gain=mean(lambda r: r["test"]["gain"]["strict"]),
        texture=ratio("texture"),
        diversity=ratio("diversity"),
        minutes=mean(lambda r: r["training_seconds"]) / 60,
        versions=frozenset(result["version"] for result in found),
    )


def smallest_difference(table: Sequence[Row], power: float = 0.8, level: float = 0.05) -> float:
    """The difference between two arms that the comparison would have shown with given power.

    Two-sided t-test of two arms with as many seeds as the smallest has, and the spread pooled over
    all arms: (t_(1 - level / 2) + t_power) s sqrt(2 / n). NaN with fewer than two seeds.
    """
    freedom = sum(row.seeds - 1 for row in table)
    if freedom < 1 or min(row.seeds for row in table) < 2:
        return math.nan
    pooled = sum((row.seeds - 1) * row.spread**2 for row in table if row.seeds > 1) / freedom
    quantiles = [float(scipy.stats.t.ppf(q, freedom)) for q in (1 - level / 2, power)]
    n = min(row.seeds for row in table)
    return float(quantiles[0] + quantiles[1]) * math.sqrt(2 * pooled / n)


def best_by_validation(results: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The result whose last evaluation on validation prompts is the best."""
    return max(results, key=lambda result: float(result["curve"][-1]["eval/strict"]))


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
    budget: Budget,
    out: Path,
    *,
    shared: Sequence[str] = (),
    learning_rates: Sequence[str] = (),
    at_once: int | None = None,
    progress: Progress,
) -> tuple[list[dict[str, Any]], list[Job]]:
    """Run every arm with every seed within the budget.

    Args:
        out: see `run_all`.
        shared: overrides of every arm.
        learning_rates: if given, every arm is run with each of them and the first seed, and goes on
            with the one whose last score on validation prompts is the best.
        at_once: processes; as many as there are cores if None.

    Returns:
        The results, and the runs that failed.

    Raises:
        InputError: see `planned`.
        KeyboardInterrupt: after the runs have stopped; the same call goes on.
    """
    cores = at_once or os.cpu_count() or 1

    def made(chosen: Sequence[Arm], which: Sequence[int]) -> tuple[list[dict[str, Any]], list[Job]]:
        jobs = planned(chosen, which, budget, shared)
        progress.begin(jobs)
        results = run_all(jobs, out, at_once=cores, done=progress.done)
        there = {_key(result) for result in results}
        return results, [job for job in jobs if _key(job.key) not in there]

    if learning_rates:
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
