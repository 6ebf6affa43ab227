"""Being asked to stop: by Ctrl-C, a scheduler, a terminal that goes away, a parent that dies."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from entroflow.runs.folder import RunFolder
from entroflow.signals import asked_to_stop, end_group, interrupted

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def handlers():
    return [signal.getsignal(number) for number in ALL]


def until(condition, process=None, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("first", ALL)
def test_the_first_signal_asks_to_stop_and_only_ctrl_c_interrupts(first):
    before = handlers()
    with asked_to_stop() as stopping:
        assert not stopping()
        signal.raise_signal(first)
        assert stopping()
        for other in (signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):
            signal.raise_signal(other)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert handlers() == before


@pytest.mark.parametrize("first", ALL)
def test_what_can_be_left_out_is_interrupted_once(first):
    before = handlers()
    with interrupted():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(first)
        for other in (signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(other)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert handlers() == before


@pytest.mark.parametrize("within", [asked_to_stop, interrupted])
def test_a_hangup_that_is_ignored_stays_so(monkeypatch, within):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with within():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_signals_are_left_alone():
    before, within = handlers(), []

    def look():
        with asked_to_stop() as stopping, interrupted():
            within.append((handlers(), stopping()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert within == [(before, False)]


CHILD = """
import subprocess, sys, time
from pathlib import Path
from entroflow.signals import asked_to_stop, stop_with_parent
stop_with_parent()
grandchild = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL)
place = Path(sys.argv[1])
def ready():
    place.with_suffix(".pid").write_text(str(grandchild.pid))
if sys.argv[2] == "saves":
    with asked_to_stop() as stopping:
        ready()
        while not stopping():
            time.sleep(0.01)
        place.write_text("saved")
else:
    ready()
    time.sleep(1000)
"""


@pytest.mark.parametrize("kind", ["saves", "has nothing to save"])
def test_a_child_stops_when_its_parent_is_killed(tmp_path, kind):
    """With all that it has started itself; the parent has no chance to say anything."""
    place = tmp_path / "place"
    parent = f"""
import subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-c", {CHILD!r}, {str(place)!r}, {kind!r}],
    stdin=subprocess.PIPE, start_new_session=True,
)
print(child.pid, flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        pid = place.with_suffix(".pid")
        until(lambda: pid.exists() and pid.read_text(), process)
        grandchild = int(pid.read_text())
        assert psutil.pid_exists(child)
        assert psutil.pid_exists(grandchild)
        process.kill()
    until(lambda: gone(child) and gone(grandchild), seconds=30)
    assert place.exists() == (kind == "saves")


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_group_that_is_gone_is_no_error():
    with subprocess.Popen(["true"], start_new_session=True) as process:
        process.wait()
    end_group(process.pid)


TINY = (
    "prompts.per_iteration=2", "allocation.group_size=2", "sampling.steps=2",
    "exploration.type=window", "exploration.size=1", "evaluation.images=1",
    "evaluation.test_images=1", "evaluation.steps=1", "evaluation.guidance_tried=[1.0]",
)  # fmt: skip


def started(*arguments, **options):
    command = [sys.executable, "-m", "entroflow.cli.main", *map(str, arguments)]
    return subprocess.Popen(command, **options)


def iterations(run):
    path = run / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def test_a_run_whose_terminal_goes_away_is_saved(tmp_path):
    """The terminal sends SIGHUP, and then refuses all that is written to it."""
    run, (here, there) = tmp_path / "run", pty.openpty()
    process = started(
        "train", "quickstart", *TINY, "run.iterations=100000", "run.checkpoint_every=100000",
        "run.evaluate_every=100000", "--run", run,
        stdin=there, stdout=there, stderr=there,
        preexec_fn=lambda: (os.setsid(), os.close(os.open(os.ttyname(0), os.O_RDWR))),
    )  # fmt: skip
    os.close(there)
    # Whoever looks at a terminal reads from it; else what is written waits at some point.
    reader = threading.Thread(target=drain, args=(here, lambda: iterations(run) > 3), daemon=True)
    reader.start()
    until(lambda: iterations(run) > 3, process)
    reader.join()
    os.close(here)
    assert process.wait(timeout=120) == 0
    folder = RunFolder.open(run)
    done = folder.metrics()[-1]["iteration"]
    assert 3 <= done < 100000
    assert folder.latest().name == f"{done:08d}"
    assert (run / "report.html").exists()
    assert not [*run.rglob("*.part"), *run.rglob("*.old")]


def drain(terminal, enough):
    while not enough():
        os.read(terminal, 4096)


@pytest.mark.slow
def test_under_nohup_a_run_outlives_its_terminal(tmp_path):
    run = tmp_path / "run"
    process = started(
        "train", "quickstart", *TINY, "run.iterations=6", "--run", run,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    while process.poll() is None:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
    assert process.stderr.read() == b""
    assert process.returncode == 0
    assert RunFolder.open(run).latest().name == "00000006"


def comparison(out):
    return (
        "compare", "flow_grpo_fast", *TINY, "exploration.move=fixed", "exploration.last_start=null",
        "run.checkpoint_every=100000", "run.evaluate_every=100000",
        "--updates", 100000, "--seeds", 2, "--at-once", 2, "--out", out,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_comparison_that_is_killed_leaves_no_child_and_all_are_saved(tmp_path, number):
    process = started(*comparison(tmp_path / "out"), stdout=subprocess.DEVNULL)
    runs = tmp_path / "out" / "runs"

    def both_go():
        found = [iterations(folder) for folder in runs.glob("*-seed[01]")]
        return len(found) == 2 and min(found) > 2

    until(both_go, process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(number)
    code = process.wait(timeout=120)
    assert code == (-number if number == signal.SIGKILL else 0)
    until(lambda: all(gone(child.pid) for child in children), seconds=120)
    for run in runs.glob("*-seed[01]"):
        folder = RunFolder.open(run)
        done = folder.metrics()[-1]["iteration"]
        assert folder.latest().name == f"{done:08d}"
        assert not [*run.rglob("*.part"), *run.rglob("*.old")]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_comparison_at_once(tmp_path):
    """Also one whose runs do not hear: their reward sleeps, and what it has started lives on."""
    (tmp_path / "deaf.py").write_text(
        "import subprocess, time\n"
        "from pathlib import Path\n"
        "def reward(images, prompts, metadata):\n"
        "    subprocess.Popen(['sleep', '1000'])\n"
        "    Path(__file__).with_name('asleep').touch()\n"
        "    while True:\n"
        "        try:\n"
        "            time.sleep(1000)\n"
        "        except BaseException:\n"
        "            pass\n"
    )
    process = started(
        *comparison(tmp_path / "out"), "reward.type=deaf.reward", cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until((tmp_path / "asleep").exists, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "press Ctrl-C again" in said
    until(lambda: all(gone(child.pid) for child in children), seconds=10)
