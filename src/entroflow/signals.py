"""Signals that ask to stop, and the end of the process that started this one."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

log = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], None]

ASKING = ("SIGINT", "SIGTERM", "SIGHUP")
"""Ctrl-C, a scheduler, and a terminal that goes away; not every system has all of them."""


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGINT, SIGTERM or SIGHUP asks to stop after the present iteration.

    A second SIGINT interrupts at once. A SIGHUP that is ignored (nohup) stays so. Outside the main
    thread signals are left alone.

    Yields:
        Whether a signal has come.
    """
    asked = False

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        asked = True
        log.warning("finishing the iteration, then saving; press Ctrl-C again to stop at once.")

    with _handled_by(ask):
        yield lambda: asked


@contextmanager
def interrupted() -> Iterator[None]:
    """Within, the first of these signals, and every SIGINT, raises KeyboardInterrupt.

    Others that follow change nothing: a terminal that goes away may say so twice. See
    `asked_to_stop` for the rest.
    """
    asked = False

    def interrupt(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        first, asked = not asked, True
        if first or number == signal.SIGINT:
            raise KeyboardInterrupt

    with _handled_by(interrupt):
        yield


@contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: current
        for number in signal.Signals
        if number.name in ASKING
        and (current := signal.getsignal(number)) is not None
        # Who ignores a hangup (nohup) wants the run to outlive the terminal.
        and not (number.name == "SIGHUP" and current is signal.SIG_IGN)
    }
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def stop_with_parent() -> None:
    """From now on, the end of standard input stops this process as SIGTERM does.

    Whoever started it holds the other end of that pipe, and lets go of it even when killed. For the
    first process of a session; what it has started itself ends after it.
    """
    alone, leader = threading.Event(), os.getpid()

    def watch() -> None:
        while os.read(0, 1024):
            pass
        alone.set()
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            # Nothing is begun that could be saved.
            end_group(leader)
        os.kill(leader, signal.SIGTERM)

    def leave_nothing() -> None:
        if alone.is_set():
            end_group(leader)

    atexit.register(leave_nothing)
    threading.Thread(target=watch, name="stop with parent", daemon=True).start()


def end_group(leader: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send a signal to what there is of a process and those that it has started.

    Args:
        leader: it began a session, and so a group of processes.
    """
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, number)
