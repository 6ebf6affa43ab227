"""Command lines in processes that have imported everything already, to be killed at any moment."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import time

WAYS = (signal.SIGKILL,) * 4 + (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
"""Nobody can prepare for the first."""


def command_line(arguments, output):
    """Run `entroflow` with its output in a file, as a process of its own."""
    os.setsid()
    # Until the program handles it, Ctrl-C ends the process without a word of Python's.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    opened = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(opened, number)
    from entroflow.cli.main import main

    sys.argv = ["entroflow", *map(str, arguments)]
    main()


class Starter:
    """Starts command lines from a server that has the modules `preload`."""

    def __init__(self, preload):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))

    def start(self, arguments, output):
        process = self._context.Process(target=command_line, args=(arguments, output))
        process.start()
        return process

    def run(self, arguments, output):
        """To the end; how many seconds it took."""
        begin = time.monotonic()
        process = self.start(arguments, output)
        process.join()
        assert process.exitcode == 0, output.read_text(encoding="utf-8")
        return time.monotonic() - begin


def killed_and_resumed(starter, begin, resume, folder, output, source, seconds, kills):
    """A run that is killed so often, each time within `seconds`, and then goes to its end.

    Args:
        begin, resume: arguments of the two command lines.
        source: of all randomness.

    Returns:
        How it was ended each time: signal and exit code.
    """
    ends = []
    while len(ends) < kills:
        process = starter.start(next_of(folder, begin, resume), output)
        process.join(source.uniform(0, seconds))
        if not process.is_alive():
            break
        way = source.choice(WAYS)
        os.kill(process.pid, way)
        process.join(120)
        assert process.exitcode is not None, f"it outlives {way!r}"
        ends.append((way, process.exitcode))
    process = starter.start(next_of(folder, begin, resume), output)
    process.join()
    said = output.read_text(encoding="utf-8")
    # A language model's run that was only asked to stop after its last update is complete.
    assert process.exitcode == 0 or "has made its" in said.splitlines()[-1], said
    return ends


def next_of(folder, begin, resume):
    """Go on, or begin anew where it was killed before its first checkpoint."""
    if [*folder.glob("checkpoints/[0-9]*")]:
        return resume
    shutil.rmtree(folder, ignore_errors=True)
    return begin
