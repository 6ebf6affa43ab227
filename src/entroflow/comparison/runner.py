"""Compare recipes at equal cost: several seeds each, as separate processes, one thread each.

    arms -> runs that end with the budget -> results.json -> table

Every run is a run folder of its own, made by the command line, so each can be looked at, and what
was stopped goes on. A result is kept under recipe hash, seed and base weights (with
the contents of the files that the recipe names) and never made twice.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

from entroflow.comparison.jobs import Arm, Job, Terms, key_of, planned
from entroflow.comparison.results import RESULTS, result_of, stored_results
from entroflow.comparison.table import best_by_validation
from entroflow.errors import InputError
from entroflow.locks import one_writer
from entroflow.runs.folder import EVALUATION, RunFolder
from entroflow.signals import end_group, interrupted
from entroflow.writing import to_json, write_text

log = logging.getLogger(__name__)


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
        kept = {key_of(result): result for result in stored_results(out)}
        lock = threading.Lock()

        def run(job: Job) -> dict[str, Any] | None:
            result = kept.get(key_of(job.key))
            if result is None:
                result = _run(job, out, children, trust)
                if result is not None:
                    with lock:
                        kept[key_of(job.key)] = result
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
        return [{**kept[key_of(job.key)], **job.named} for job in jobs if key_of(job.key) in kept]


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
        arguments = ["--resume", str(folder)]
        if not RunFolder(folder).all_checkpoints():
            # What was killed before its first checkpoint begins anew.
            shutil.rmtree(folder, ignore_errors=True)
            arguments = [job.arm.recipe, *job.overrides, "--run", str(folder)]
        if trust:
            arguments.append("--trust")
        with folder.with_suffix(".log").open("ab") as output:
            children.run(
                [sys.executable, "-m", "entroflow.cli.child", "train", *arguments],
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
    terms: Terms,
    out: Path,
    *,
    learning_rates: Sequence[str] = (),
    at_once: int | None = None,
    progress: Progress,
) -> tuple[list[dict[str, Any]], list[Job]]:
    """Run every arm with every seed at equal cost.

    Args:
        out: see `run_all`.
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
        jobs = planned(chosen, which, terms)
        progress.begin(jobs)
        results = run_all(jobs, out, at_once=cores, done=progress.done, trust=terms.trust)
        there = {key_of(result) for result in results}
        return results, [job for job in jobs if key_of(job.key) not in there]

    if learning_rates:
        for override in [*terms.shared, *(change for arm in arms for change in arm.overrides)]:
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
