"""A long run takes no more memory and no more files than a short one."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest

from tiny_run import train

SETTLED, END = 100, 400
MOST_GROWTH = 24 * 2**20
"""Bytes in 300 iterations: the process of all tests is not as still as one of its own."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="measured as Linux does")
def test_memory_and_descriptors_stay_flat(tmp_path):
    process, taken = psutil.Process(), {}

    def watch(metrics, _evaluated):
        if metrics["iteration"] in (SETTLED, END):
            gc.collect()
            taken[metrics["iteration"]] = process.memory_info().rss, process.num_fds()

    run = {"iterations": END, "evaluate_every": 10, "checkpoint_every": 5}
    train(tmp_path / "run", watch=watch, run=run)
    (before, files_before), (after, files_after) = taken[SETTLED], taken[END]
    assert files_after == files_before
    assert after - before < MOST_GROWTH
