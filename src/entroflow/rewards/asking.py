"""Questions to a server, many at once: none is lost, none hangs, and none is asked forever."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import tenacity

from entroflow.rewards.base import Status

log = logging.getLogger(__name__)

T = TypeVar("T")
TRANSIENT = frozenset({408, 425, 429, *range(500, 600)})
"""HTTP statuses after which the same question may be answered; all others are final."""
LONGEST_WAIT = 30.0
"""Seconds between two attempts, unless the server asks for more."""


@dataclass(frozen=True)
class Reply:
    """What came of one question: the body of the response, or why there is none."""

    body: Mapping[str, Any] | None
    status: Status


@dataclass(frozen=True)
class Limits:
    """How hard a server may be pressed.

    Attributes:
        in_flight: most questions at the same time.
        per_second: most questions begun in a second on average; None: no such limit.
        timeout: seconds that one attempt may take.
        deadline: seconds that one question may take, attempts and waits together.
        attempts: most attempts of one question.
    """

    in_flight: int
    per_second: float | None
    timeout: float
    deadline: float
    attempts: int


class Pace:
    """Lets at most so many through per second, the first `burst` at once (token bucket)."""

    def __init__(
        self,
        per_second: float,
        burst: int = 1,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._per_second, self._burst = per_second, burst
        self._clock, self._sleep = clock, sleep
        self._free, self._since = float(burst), clock()

    async def turn(self) -> None:
        """Return when it is one's turn."""
        now = self._clock()
        self._free = min(self._burst, self._free + (now - self._since) * self._per_second)
        self._since = now
        # A negative number is a queue: who comes later waits longer.
        self._free -= 1
        if self._free < 0:
            await self._sleep(-self._free / self._per_second)


class Breaker:
    """Stops asking a server that fails more often than not, and tries again after a rest."""

    WINDOW, SHARE, REST = 50, 0.5, 30.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._outcomes: deque[bool] = deque(maxlen=self.WINDOW)
        self._closed_until = -float("inf")

    @property
    def resting(self) -> bool:
        """Whether nothing is to be asked now."""
        return self._clock() < self._closed_until

    def learn(self, answered: bool) -> None:
        """Take note of one outcome."""
        self._outcomes.append(answered)
        failed = self._outcomes.count(False)
        if len(self._outcomes) == self.WINDOW and failed > self.SHARE * self.WINDOW:
            log.warning(
                "of the last %d questions %d failed: none are asked for %.0f s.",
                self.WINDOW, failed, self.REST,
            )  # fmt: skip
            self._closed_until = self._clock() + self.REST
            self._outcomes.clear()


def wait_before(retry: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt: doubling with full jitter, or what the server asks for."""
    jitter = random.uniform(0, min(LONGEST_WAIT, 2.0 ** (retry.attempt_number - 1)))
    error = retry.outcome.exception() if retry.outcome else None
    asked = retry_after(error.response) if isinstance(error, httpx.HTTPStatusError) else 0.0
    return max(jitter, asked)


def retry_after(response: httpx.Response) -> float:
    """Seconds that the header `Retry-After` asks to wait, as a number or a date; 0 without."""
    said = response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(said)
    except (TypeError, ValueError):
        return 0.0
    return max(0.0, until.timestamp() - time.time())


def _worth_another(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in TRANSIENT
    return isinstance(error, httpx.TransportError)


class Asker:
    """Posts JSON to one address and waits for JSON, from any thread.

    A thread of its own runs the event loop, so questions of several callers share the limits. It
    ends with the object.
    """

    def __init__(self, url: str, headers: Mapping[str, str], limits: Limits) -> None:
        self._url, self._limits = url, limits
        self._loop = asyncio.new_event_loop()
        self._client = httpx.AsyncClient(
            headers=dict(headers),
            timeout=limits.timeout,
            trust_env=False,
            limits=httpx.Limits(max_connections=limits.in_flight),
        )
        self._free = asyncio.Semaphore(limits.in_flight)
        self._pace = None if limits.per_second is None else Pace(limits.per_second)
        self._breaker = Breaker()
        thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="asker")
        thread.start()
        self._end = weakref.finalize(self, _ended, self._loop, self._client, thread)

    def ask_all(self, bodies: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """Replies to all, in their order; none raises, and none takes longer than the deadline."""
        return self._run(self._ask_all(bodies))

    def close(self) -> None:
        """End the thread and its connections."""
        self._end()

    def _run(self, task: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(task, self._loop).result()

    async def _ask_all(self, bodies: Sequence[Mapping[str, Any]]) -> list[Reply]:
        return list(await asyncio.gather(*map(self._ask, bodies)))

    async def _ask(self, body: Mapping[str, Any]) -> Reply:
        async with self._free:
            if self._breaker.resting:
                return Reply(None, Status.SKIPPED)
            reply = await self._answered(body)
            self._breaker.learn(reply.status is Status.OK)
            return reply

    async def _answered(self, body: Mapping[str, Any]) -> Reply:
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_worth_another),
            stop=tenacity.stop_after_attempt(self._limits.attempts),
            wait=wait_before,
            reraise=True,
        )
        try:
            async with asyncio.timeout(self._limits.deadline):
                found: Any = await attempts(self._posted, body)
        except (TimeoutError, httpx.TimeoutException) as error:
            log.warning("a question to %s timed out (%s).", self._url, type(error).__name__)
            return Reply(None, Status.TIMEOUT)
        except httpx.HTTPStatusError as error:
            log.warning(
                "%s refused a question: %d %.200s",
                self._url, error.response.status_code, error.response.text,
            )  # fmt: skip
            return Reply(None, Status.ERROR)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            log.warning("a question to %s failed: %s: %s", self._url, type(error).__name__, error)
            return Reply(None, Status.ERROR)
        if not isinstance(found, dict):
            return Reply(None, Status.UNPARSED)
        return Reply(found, Status.OK)

    async def _posted(self, body: Mapping[str, Any]) -> Any:
        if self._pace is not None:
            await self._pace.turn()
        response = await self._client.post(self._url, json=dict(body))
        response.raise_for_status()
        return response.json()


def _ended(
    loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient, thread: threading.Thread
) -> None:
    asyncio.run_coroutine_threadsafe(client.aclose(), loop).result(timeout=5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5)
    loop.close()
