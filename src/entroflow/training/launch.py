"""Start or resume a run in its folder, write everything down, and end it well."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from entroflow.checkpoints import check_digests
from entroflow.errors import InputError
from entroflow.evaluation.base import Evaluated, HeldOutEvaluation
from entroflow.evaluation.base_and_tuned import compare_with_base
from entroflow.ledger import Ledger
from entroflow.places import hinting_at_moved, is_path, paths_in
from entroflow.policies.base import Policy
from entroflow.recipe.kinds import RECIPE, Kind
from entroflow.recipe.load import Recipe, chosen_type, load_recipe
from entroflow.recipe.registry import SECTIONS
from entroflow.report.page import write_report
from entroflow.rewards.combined import AnyReward
from entroflow.runs.events import Events
from entroflow.runs.folder import (
    EVALUATION,
    RunFolder,
    folder_name,
)
from entroflow.signals import asked_to_stop, interrupted
from entroflow.training.checkpoint import load
from entroflow.training.forecast import rehearse
from entroflow.training.loop import train_in
from entroflow.training.metrics import Metrics
from entroflow.training.trainer import Trainer
from entroflow.writing import (
    to_json,
    write_text,
    writing,
)

log = logging.getLogger(__name__)


def train(
    recipe: str | Path = "quickstart",
    overrides: Sequence[str] = (),
    *,
    policy: Policy | None = None,
    reward: AnyReward | None = None,
    run: Path | str | None = None,
    stop_after: int | None = None,
    watch: Callable[[Metrics, Evaluated | None], None] | None = None,
    trust: bool = False,
) -> RunFolder:
    """Train by a recipe in a new run folder.

    Args:
        recipe: the name of a shipped recipe, or a file.
        overrides: `section.key=value`, as on the command line.
        policy: a policy of your own instead of the recipe's.
        reward: a reward of your own instead of the recipe's: an object (`Reward`, `GroupReward` or
            `Mixture`), or a plain function (images [n, 3, H, W] in [0, 1], prompts, metadata) ->
            n numbers.
        run: folder, `runs/<recipe>-<time>` if None; never overwritten.
        stop_after: stop after this iteration, as if interrupted there.
        watch: called with the metrics (and evaluation, if there was one) of every iteration.
        trust: import what the recipe names also from a folder that is not below the current one.

    Returns:
        The run folder.

    Raises:
        InputError: a recipe, folder or prompt is wrong.
    """
    loaded = load_recipe(recipe, overrides, _given(policy, reward), trust=trust)
    trainer = Trainer(loaded, policy)
    for remark in rehearse(trainer):
        log.warning("%s.", remark)
    folder = RunFolder.create(
        Path(run).expanduser() if run else new_folder(loaded), loaded.to_yaml()
    )
    with folder.held():
        return _run(folder, trainer, stop_after, watch)


def resume(
    run: Path | str,
    overrides: Sequence[str] = (),
    *,
    policy: Policy | None = None,
    reward: AnyReward | None = None,
    stop_after: int | None = None,
    watch: Callable[[Metrics, Evaluated | None], None] | None = None,
    trust: bool = False,
) -> RunFolder:
    """Go on from the latest checkpoint of a run, with the same weights as if it never stopped.

    Args:
        run: the run folder.
        overrides: of the sections `run` and `monitors`, as `run.iterations=200`, and of paths, as
            `prompts.path=new/place.txt`, where what was moved holds the same; other keys would make
            it another run.
        policy, reward: needed again where the run was started with objects of your own.
        stop_after, watch, trust: see `train`.

    Raises:
        InputError: no run folder, no checkpoint, or a torn one; another policy or reward; a run
            that an older version began.
    """
    folder = RunFolder.open(Path(run).expanduser(), Kind.IMAGES)
    folder.start()
    given = _given(policy, reward)
    place = folder.path / RECIPE
    keys = [override.partition("=")[0] for override in overrides]
    free = [key for key in keys if key.startswith(("run.", "monitors.")) and key != "run.seed"]
    paths = [key for key in keys if key not in free]
    if paths:
        _refuse_another_run(paths, load_recipe(place, (), given, trust=trust))
    recipe = load_recipe(place, overrides, given, trust=trust)
    _refuse_another_run(paths, recipe)
    for section in given:
        before, now = chosen_type(place, section), recipe.resolved[section]["type"]
        if before != now:
            raise InputError(f"{run} was started with the {section} {before}, not {now}.")
    there = [(key, path) for key, path in paths_in(recipe.resolved) if _is_path(recipe, key)]
    with folder.held():
        with hinting_at_moved(there):
            trainer = Trainer(recipe, policy)
            trainer.named.check()
            checkpoint = folder.latest()
            load(trainer, checkpoint)
        for key, path in trainer.named.unverified:
            if any(f"{key}.".startswith(f"{each}.") for each in paths):
                log.warning(
                    "%s: whether %s holds what the run was trained with can't be told; the run "
                    "goes on with what is there now.",
                    key, path,
                )  # fmt: skip
        folder.metrics_until(trainer.iteration, trainer.taken())
        folder.mend_best()
        folder.choose_best_by(recipe.monitors.best or "reward")
        # For it, others are removed.
        if (best := folder.best()) is not None and best != checkpoint:
            check_digests(best)
        folder.cut_after(trainer.iteration)
        folder.write_recipe(recipe.to_yaml())
        return _run(folder, trainer, stop_after, watch)


def _refuse_another_run(keys: Sequence[str], recipe: Recipe) -> None:
    """Refuse to change what is no path in a recipe."""
    for key in keys:
        if not _is_path(recipe, key):
            raise InputError(
                "a resumed run can change keys of 'run' except the seed, keys of 'monitors', and "
                f"paths to what was moved, not {key!r}; start a new run for another recipe."
            )


def _is_path(recipe: Recipe, key: str) -> bool:
    for part in (*recipe.reward.parts.values(), *recipe.monitors.rewards.values()):
        if key.startswith(f"{part.key}."):
            return is_path(part.reward, key.removeprefix(f"{part.key}.").split("."))
    section, *keys = key.split(".")
    return section in SECTIONS and is_path(getattr(recipe, section), keys)


def new_folder(recipe: Recipe) -> Path:
    """A new folder `runs/<recipe>-<time>`, with a number where several start at once."""
    name = f"{folder_name(recipe.name)}-{datetime.now():%Y%m%d-%H%M%S}"
    place, number = Path("runs") / name, 1
    with writing(place):
        place.parent.mkdir(exist_ok=True)
        while True:
            try:
                place.mkdir()
                return place
            except FileExistsError:
                number += 1
                place = place.with_name(f"{name}-{number}")


def _given(policy: Policy | None, reward: AnyReward | None) -> dict[str, Any]:
    """The caller's objects by section."""
    given: dict[str, Any] = {}
    if policy is not None:
        given["policy"] = policy
    if reward is not None:
        given["reward"] = reward
    return given


def _run(
    folder: RunFolder,
    trainer: Trainer,
    stop_after: int | None,
    watch: Callable[[Metrics, Evaluated | None], None] | None,
) -> RunFolder:
    with asked_to_stop() as stopping:
        _iterate(folder, trainer, train_in(folder, trainer, stop_after), watch, stopping)
        _report(folder)
        comparable = isinstance(trainer.recipe.evaluation, HeldOutEvaluation)
        if comparable and trainer.at_end:
            try:
                with interrupted():
                    if stopping():
                        raise KeyboardInterrupt
                    _compare(folder, trainer)
            except KeyboardInterrupt:
                log.warning(
                    "the comparison with the base was left out; everything else is saved, and "
                    "--resume %s makes it.",
                    folder.path,
                )
            else:
                _report(folder)
    return folder


def _iterate(
    folder: RunFolder,
    trainer: Trainer,
    iterations: Generator[tuple[Metrics, Evaluated | None], None, None],
    watch: Callable[[Metrics, Evaluated | None], None] | None,
    stopping: Callable[[], bool],
) -> None:
    """All iterations, until it is to stop; each is written down and shown."""
    events = Events(folder.tensorboard)
    try:
        for metrics, evaluated in iterations:
            try:
                events.numbers(metrics)
                if evaluated is not None and len(evaluated.images):
                    _keep_examples(folder, events, metrics["iteration"], evaluated)
                if trainer.trajectories and (evaluated or metrics["iteration"] == 1):
                    folder.save_trajectories(metrics["iteration"], trainer.trajectories)
            except BaseException as error:
                # A checkpoint would keep a resumed run from writing it.
                iterations.throw(error)
            if watch is not None:
                watch(metrics, evaluated)
            if stopping():
                break
    finally:
        iterations.close()
        events.close()


def _report(folder: RunFolder) -> None:
    """Write the report; what it can't read ends no run."""
    try:
        write_report(folder)
    except InputError as error:
        log.warning("there is no new report: %s", str(error))


def _keep_examples(folder: RunFolder, events: Events, iteration: int, evaluated: Evaluated) -> None:
    folder.save_examples(f"{iteration:08d}", evaluated)
    events.picture("examples", folder.save_sheet(f"{iteration:08d}", evaluated), iteration)


def _compare(folder: RunFolder, trainer: Trainer) -> None:
    recipe, cost = trainer.recipe, Ledger()
    assert isinstance(recipe.evaluation, HeldOutEvaluation)
    with cost.timed("compare"):
        summary, found = compare_with_base(
            trainer.policy,
            recipe.evaluation.on_test_prompts(),
            seed=recipe.run.test_seed,
            batch_size=recipe.sampling.batch_size,
            reward=trainer.reward,
            monitors=recipe.monitors.rewards,
            ledger=cost,
        )
    known = {"iteration": trainer.iteration, "recipe_hash": recipe.hash, "cost": cost.state()}
    summary = {**known, **summary}
    write_text(folder.path / EVALUATION, to_json(summary, indent=1) + "\n")
    for name, evaluated in found.items():
        folder.save_examples(f"test_{name}", evaluated)
        folder.save_sheet(f"test_{name}", evaluated)
