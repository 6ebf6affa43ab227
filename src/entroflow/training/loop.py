"""A trainer in its run folder: iterations, evaluations, checkpoints, so that nothing is lost."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator

from entroflow.evaluation.base import Evaluated
from entroflow.runs.folder import RunFolder
from entroflow.training.checkpoint import state_of, tensors_of
from entroflow.training.forecast import start_metrics
from entroflow.training.metrics import Metrics, evaluation_metrics
from entroflow.training.trainer import Trainer

log = logging.getLogger(__name__)


def train_in(
    folder: RunFolder, trainer: Trainer, stop_after: int | None = None
) -> Generator[tuple[Metrics, Evaluated | None], None, None]:
    """Run a trainer in a run folder; yields the metrics of every iteration, from 0 on.

    A checkpoint comes after the yield: what it holds, the caller has written down as well. Closing
    the generator between two iterations leaves a checkpoint of the last one, throwing into it none.

    Args:
        stop_after: stop at this iteration as if interrupted there.
    """
    settings = trainer.recipe.run
    saved = -1

    def at_end() -> bool:
        return trainer.at_end or (stop_after is not None and trainer.iteration >= stop_after)

    def save() -> None:
        nonlocal saved
        if saved != trainer.iteration:
            folder.save_checkpoint(
                trainer.iteration, tensors_of(trainer), state_of(trainer), settings.keep_checkpoints
            )
            saved = trainer.iteration

    def keep(line: Metrics) -> None:
        """Save where it is due."""
        n = trainer.iteration
        by = trainer.recipe.monitors.best or "reward"
        standing = trainer.held_out.standing(line)
        if standing > -math.inf and standing > folder.best_score(by):
            save()
            folder.mark_best(n, standing, by)
            folder.prune(settings.keep_checkpoints)
        if n % settings.checkpoint_every == 0 or at_end():
            save()

    def to_come() -> Iterator[Metrics]:
        if trainer.iteration == 0 and not lines:
            yield start_metrics(trainer)
        while not at_end():
            yield trainer.step()

    lines = [line for line in folder.metrics() if line["iteration"] == trainer.iteration]
    try:
        if lines:
            (line,), saved = lines, trainer.iteration
            if trainer.at_end and "eval/score" not in line:
                # The run was cut short to where it stands: what was no end is one now.
                found = _evaluated(trainer, line)
                folder.replace_metrics(line)
                yield line, found
            keep(line)
        for line in to_come():
            found = _evaluated(trainer, line)
            folder.append_metrics(line)
            yield line, found
            keep(line)
    except GeneratorExit:
        # Closed between two iterations; after an error the last checkpoint stands instead.
        keep(line)
        save()
        raise


def _evaluated(trainer: Trainer, line: Metrics) -> Evaluated | None:
    """Evaluate where it is due, and add that to the line."""
    n = trainer.iteration
    if n % trainer.recipe.run.evaluate_every and trainer.share_done < 1:
        return None
    found = trainer.held_out.evaluate()
    line |= {**evaluation_metrics(found), **trainer.held_out.watch(found, n)}
    line["selected_by"] = trainer.held_out.criterion(line)
    spent = trainer.held_out.ledger
    line["ledger/held_out_network_evaluations"] = spent.network_evaluations
    line["ledger/held_out_reward_calls"] = spent.reward_calls
    if trainer.held_out.standing(line) == -math.inf:
        log.warning(
            "iteration %d: no held-out image has a %s, so this checkpoint can't be the best.",
            n,
            trainer.recipe.monitors.best or "reward",
        )
    return found
