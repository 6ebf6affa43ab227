"""Reports of runs with very many iterations: what is left out, and what never is."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from entroflow.report.figures import MOST_POINTS, figure_of, moving_mean, thinned
from entroflow.report.page import write_report
from entroflow.report.thinning import MOST_DETAILS, mean_by_step, thinned_metrics
from entroflow.runs.folder import RunError
from tiny_run import train


def many(folder, count, **more):
    """The metrics of a run as if it had made `count` iterations; its numbers vary."""
    start, *lines = folder.metrics()
    source = random.Random(0)

    def varied(value):
        if isinstance(value, dict):
            return {key: varied(each) for key, each in value.items()}
        return value * source.uniform(0.9, 1.1) if isinstance(value, float) else value

    with (folder.path / "metrics.jsonl").open("w", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")
        for n in range(1, count + 1):
            line = varied(lines[n % len(lines)]) | {"iteration": n, "seconds": n / 5}
            line |= {key: make(n) for key, make in more.items()}
            file.write(json.dumps(line) + "\n")


def attention(n):
    return {
        "prompt": [str(n), "a ring"], "entropy": [0.5] * 4, "explored": [n % 2, 3],
        "shift": [n / 2, 1.0], "size": [2, 4], "spread": [0.1, 0.2],
    }  # fmt: skip


def test_a_long_line_keeps_its_ends_and_the_extremes_of_every_stretch():
    count = 17 * MOST_POINTS
    y = np.random.default_rng(0).standard_normal(count)
    y[12_345], y[23_456] = 40, -50
    trace = thinned({"x": list(range(count)), "y": y.tolist(), "customdata": y.tolist()})
    assert len(trace["x"]) <= MOST_POINTS + 2
    assert trace["x"] == sorted(trace["x"])
    assert trace["y"] == trace["customdata"] == [y[x] for x in trace["x"]]
    assert (trace["x"][0], trace["x"][-1]) == (0, count - 1)
    shown = set(trace["x"])
    for stretch in np.split(np.arange(count), MOST_POINTS // 2):
        assert stretch[y[stretch].argmin()] in shown
        assert stretch[y[stretch].argmax()] in shown


def test_a_short_line_is_drawn_whole_and_a_cloud_is_thinned_evenly():
    x = [float(n % 7) for n in range(4 * MOST_POINTS)]
    y = [float(n) for n in range(4 * MOST_POINTS)]
    (cloud,) = figure_of([{"x": x, "y": y}])["data"]
    assert cloud["y"] == y[::4]
    (short,) = figure_of([{"x": y[:MOST_POINTS], "y": x[:MOST_POINTS]}])["data"]
    assert short["y"] == x[:MOST_POINTS]


@pytest.mark.parametrize(("count", "window"), [(1, 3), (10, 2), (57, 5), (12, 40)])
def test_the_moving_mean_is_that_of_the_neighbours(count, window):
    values = np.random.default_rng(count).standard_normal(count)
    ones = np.ones(2 * window + 1)
    sums, counts = (np.convolve(each, ones)[window:][:count] for each in (values, np.ones(count)))
    moving = moving_mean(values.tolist(), window)
    np.testing.assert_allclose(moving, sums / counts, atol=1e-12)


def test_what_is_known_by_step_is_the_mean_of_a_stretch():
    lines = [
        {"kl": {"0": 1.0, "1": None}, "loss": {"0": 0.1}},
        {"kl": {"0": 2.0, "1": 4.0}, "loss": {"0": 0.1}},
        {"kl": {"0": 6.0, "2": None}, "loss": {"0": 0.1}},
    ]
    assert mean_by_step(lines) == {"kl": {"0": 3.0, "1": 4.0, "2": None}, "loss": {"0": 0.1}}


def test_details_are_thinned_and_numbers_are_not(tmp_path):
    folder = train(tmp_path / "run", stop_after=2)
    count = 3 * MOST_DETAILS + 100
    many(
        folder, count,
        by_step=lambda n: {"kl": {"0": float(n), "1": 2.0}},
        attention=lambda n: attention(n) if n % 7 == 0 else None,
    )  # fmt: skip
    whole, lean = folder.metrics(), thinned_metrics(folder)
    nested = ("by_step", "attention")
    numbers = [[{k: v for k, v in line.items() if k not in nested} for line in m]
               for m in (whole, lean)]  # fmt: skip
    assert numbers[0] == numbers[1]
    shown = [line for line in lean if line.get("by_step")]
    assert len(shown) <= MOST_DETAILS
    assert shown[-1]["iteration"] == count
    assert {line["by_step"]["kl"]["1"] for line in shown} == {2.0}
    begin = 0
    for line in shown:
        mean = np.arange(begin + 1, line["iteration"] + 1).mean()
        assert line["by_step"]["kl"]["0"] == pytest.approx(mean, rel=1e-12)
        begin = line["iteration"]
    # There were fewer of these than are shown at most.
    assert [line["attention"] for line in lean if line.get("attention")] == [
        attention(n) for n in range(7, count + 1, 7)
    ]
    page = write_report(folder).read_text(encoding="utf-8")
    assert f"Of {count + 1:,} iterations" in page


def test_a_report_of_few_iterations_says_nothing_of_it_and_torn_lines_are_as_before(tmp_path):
    folder = train(tmp_path / "run")
    assert thinned_metrics(folder) == folder.metrics()
    assert "of its stretch" not in write_report(folder).read_text(encoding="utf-8")
    path = folder.path / "metrics.jsonl"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + '{"iteration": 9, "by', encoding="utf-8")
    assert thinned_metrics(folder) == folder.metrics()
    path.write_text('{"iter\n' + whole, encoding="utf-8")
    with pytest.raises(RunError, match=r"metrics\.jsonl:1 is torn"):
        thinned_metrics(folder)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured as Linux does")
def test_a_report_of_20000_iterations_takes_seconds_and_little_memory(tmp_path):
    """Bounds are for the whole process, imports included; seconds are those of the processor."""
    folder = train(tmp_path / "run")
    steps = {str(step): 0.1 * step for step in range(4)}
    many(
        folder, 20_000,
        by_step=lambda n: {
            name: {step: value * n for step, value in steps.items()}
            for name in ("ratio", "clipped", "advantage_size", "loss", "kl", "weighted_kl")
        },
    )  # fmt: skip
    program = f"""
import sys, time
from pathlib import Path
from entroflow.cli.main import main
sys.argv = ["entroflow", "report", {str(folder.path)!r}]
try:
    main()
finally:
    # Not that of getrusage, which knows the process from which this one was forked.
    (peak,) = (line for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024, time.process_time(), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True
    )
    mebibytes, seconds = map(float, done.stderr.splitlines()[-1].split())
    assert mebibytes < 500
    assert seconds < 10
    assert (folder.path / "report.html").stat().st_size < 10e6
