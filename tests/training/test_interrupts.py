"""Ctrl-C while a server does not answer: the end comes at once, and the run folder stays whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from entroflow.rewards.workers import Workers
from entroflow.runs.folder import RunFolder
from raw_server import RawServer, chat
from tiny_run import Brightness

TESTS = Path(__file__).parents[1]
PROMPT = {"PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])}


class Judge:
    """A server that answers the first questions, and then no more."""

    def __init__(self, answers=0):
        self.silent, self._left = threading.Event(), answers
        self.server = RawServer(self._reply)

    def _reply(self, head, body):
        self._left -= 1
        if self._left >= 0:
            return [chat("Final Score: 3 <answer>Image 1 is better</answer>")]
        self.silent.set()
        time.sleep(60)
        return []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.close()


def interrupted(command, judge, folder, times=1):
    """Exit code, seconds after the last of so many interrupts, and what was printed."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env={**os.environ, **PROMPT},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert judge.silent.wait(120), process.communicate(timeout=10)
        for _ in range(times):
            time.sleep(1)
            process.send_signal(signal.SIGINT)
        start = time.monotonic()
        printed, _ = process.communicate(timeout=40)
    finally:
        process.kill()
    return process.returncode, time.monotonic() - start, printed


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("reward test openai", marks=pytest.mark.slow),
        pytest.param("reward floors openai", marks=pytest.mark.slow),
        pytest.param("doctor quickstart reward.type=openai", marks=pytest.mark.slow),
    ],
)
def test_one_interrupt_ends_a_command_that_asks(tmp_path, command):
    with Judge() as judge:
        settings = [f"reward.url={judge.server.address}/v1", "reward.model=m"]
        command = ["-m", "entroflow.cli.main", *command.split(), *settings]
        code, seconds, printed = interrupted(command, judge, tmp_path)
    assert code == 130, printed
    assert seconds < 10
    assert "Traceback" not in printed


RUN = """
    import sys
    from entroflow.rewards.served_judge import ServedJudge
    from entroflow.rewards.served_score import ServedScore
    from entroflow.rewards.pairwise import Pairwise
    from test_interrupts import Sleepy
    from tiny_run import PixelPolicy, train
    from pathlib import Path

    url, kind = sys.argv[1:]
    reward = Sleepy(url) if kind == "own" else ServedScore(url=url, model="m")
    if kind == "judge":
        judge = ServedJudge(url=url, model="m")
        reward = Pairwise(order="fixed").model_copy(update={"judge": judge})
    train(Path("run"), reward=reward, policy=PixelPolicy(), run={"iterations": 9})
"""


class Sleepy(Brightness):
    """A user's reward that waits, and can't be told to stop."""

    waits = True

    def __init__(self, url):
        self._url, self._calls = url, 0

    def score(self, images, prompts):
        import httpx

        self._calls += 1
        if self._calls > 4:
            httpx.post(self._url, json={}, timeout=None)
        return super().score(images, prompts)


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("score", 20),
        pytest.param("judge", 40, marks=pytest.mark.slow),
        pytest.param("own", 0, marks=pytest.mark.slow),
    ],
)
def test_the_second_interrupt_ends_a_run_whose_judge_hangs(tmp_path, kind, answers):
    """From Python, where the interpreter ends by itself; what was saved is whole."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(RUN))
    with Judge(answers) as judge:
        command = [str(script), f"{judge.server.address}/v1", kind]
        path = os.pathsep.join([PROMPT["PYTHONPATH"], str(TESTS / "training")])
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PROMPT, "PYTHONPATH", path)
            code, seconds, printed = interrupted(command, judge, tmp_path, times=2)
    assert code in (130, -signal.SIGINT), printed
    assert seconds < 10
    assert "press Ctrl-C again" in printed
    folder = RunFolder.open(tmp_path / "run")
    assert [line["iteration"] for line in folder.metrics()] == list(range(len(folder.metrics())))
    assert not list(folder.path.rglob("*.part"))


@pytest.mark.slow
def test_the_first_interrupt_waits_and_saves(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(RUN).replace("Sleepy(url)", "Slow(url)"))
    script.write_text(script.read_text().replace("import Sleepy", "import Slow"))
    with Judge() as judge:
        path = os.pathsep.join([PROMPT["PYTHONPATH"], str(TESTS / "training")])
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PROMPT, "PYTHONPATH", path)
            command = [str(script), f"{judge.server.address}/v1", "own"]
            code, _, printed = interrupted(command, judge, tmp_path)
    assert code == 0, printed
    folder = RunFolder.open(tmp_path / "run")
    assert folder.latest().name == f"{folder.metrics()[-1]['iteration']:08d}"


class Slow(Brightness):
    """Tells the server that it has begun, and answers two seconds later."""

    waits = True

    def __init__(self, url):
        self._url = url

    def score(self, images, prompts):
        import httpx

        with suppress(httpx.TimeoutException):
            httpx.post(self._url, json={}, timeout=2)
        return super().score(images, prompts)


def test_workers_hold_up_neither_a_close_nor_what_comes_first():
    workers = Workers(2, "some")
    never = threading.Event()
    futures = [workers.submit(call) for call in (never.wait, lambda: 3, never.wait, lambda: 5)]
    assert futures[1].result(10) == 3
    start = time.monotonic()
    workers.close()
    workers.join(0.1)
    assert time.monotonic() - start < 5
    assert futures[3].cancelled()
    never.set()
    workers.join(10)
    assert futures[0].result() is True
    with pytest.raises(ZeroDivisionError):
        Workers(1, "one").submit(lambda: 1 // 0).result(10)
