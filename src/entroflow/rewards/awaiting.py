"""Async functions of a user's: what they return is waited for, wherever they are called from."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable
from typing import Any

import torch


def awaited(returned: Any) -> Any:
    """What an awaitable brings; anything else as it is.

    All are awaited in one event loop in a thread of its own, which stays: so it works from any
    thread, inside of a running loop (Jupyter) too, and a client that keeps its connections between
    calls finds them in the same loop.

    Raises:
        BaseException: as the awaitable raised it.
    """
    if not inspect.isawaitable(returned):
        return returned
    waiting = asyncio.run_coroutine_threadsafe(_brought(returned), _loop())
    try:
        return waiting.result()
    except BaseException:
        # Ctrl-C, while it goes on.
        waiting.cancel()
        raise


async def _brought(awaitable: Awaitable[Any]) -> Any:
    torch.set_grad_enabled(False)  # of this thread
    return await awaitable


_made: list[asyncio.AbstractEventLoop] = []
_MAKING = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    with _MAKING:
        if not _made:
            _made.append(asyncio.new_event_loop())
            threading.Thread(target=_run, args=_made, daemon=True, name="awaiting").start()
        return _made[0]


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            # They end the loop. Who waits for the task that raised them is told when it goes on.
            continue
