"""Threads that wait for others, as for a server, and that nobody has to wait for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from typing import Generic, TypeVar

T = TypeVar("T")


class Workers(Generic[T]):
    """A few threads that make calls, in the order in which they were handed in.

    Unlike those of `concurrent.futures`, they do not hold up the end of the program: a call that
    hangs can be left to itself.
    """

    def __init__(self, number: int, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[T], Callable[[], T]] | None]
        self._calls = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}_{i}", daemon=True)
            for i in range(number)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """What a call will return, or raise."""
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def close(self) -> None:
        """Begin no other call, and end the threads as soon as they make none; returns at once."""
        while True:
            try:
                waiting = self._calls.get_nowait()
            except queue.Empty:
                break
            if waiting is not None:
                waiting[0].cancel()
        for _ in self._threads:
            self._calls.put(None)

    def join(self, seconds: float | None = None) -> None:
        """Wait for the calls that are being made, but no longer than this."""
        end = None if seconds is None else monotonic() + seconds
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - monotonic()))

    def _work(self) -> None:
        while (waiting := self._calls.get()) is not None:
            future, call = waiting
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                # It is raised where the result is asked for.
                future.set_exception(error)
