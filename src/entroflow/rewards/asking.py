"""Questions to a server, many at once: none is lost, none hangs, and none is asked forever."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import random
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import tenacity

from entroflow.redaction import without_secrets
from entroflow.rewards.base import Status

log = logging.getLogger(__name__)

T = TypeVar("T")
MOST_BYTES = 4 * 2**20
"""Size of a response, also when it is unpacked; a longer one is not read to its end."""
TRANSIENT = frozenset({408, 425, 429, *range(500, 600)})
"""HTTP statuses after which the same question may be answered; all others are final."""
LONGEST_WAIT = 30.0
"""Seconds between two attempts, unless the server asks for more."""
SHOWN = 300
"""Characters of a server's text in a warning."""


class _WithoutSecrets(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record through, without what it quotes of secrets."""
        record.msg, record.args = without_secrets(record.getMessage()), None
        return True


for _name in ("httpx", "httpcore.connection", "httpcore.http11"):
    # They log what a server sends beside its content: the reason, and headers.
    logging.getLogger(_name).addFilter(_WithoutSecrets())


@dataclass(frozen=True)
class Reply:
    """What came of one question.

    Attributes:
        body: what was read of the response; None where the status is not ok.
        status: ok, or how it failed.
        why: of a response that holds no answer, why it holds none; continues "the reply".
        example: the end of what it holds instead.
        code: HTTP status of a response that was no success.
    """

    body: Any
    status: Status
    why: str = ""
    example: str = ""
    code: int | None = None


def any_object(body: Any) -> Reply:
    """A JSON object, as it is."""
    if isinstance(body, dict):
        return Reply(body, Status.OK)
    return Reply(None, Status.UNPARSED, "is no JSON object")


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


class Once:
    """Warns of each cause once: the same thousand times would hide all else."""

    def __init__(self) -> None:
        self._causes: set[Hashable] = set()

    def warn(self, cause: Hashable, text: str) -> None:
        """Log the text, without secrets, unless the cause was warned of before."""
        if cause not in self._causes:
            self._causes.add(cause)
            log.warning("%s", without_secrets(text))


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
    with suppress(ValueError):
        return max(0.0, float(said))
    with suppress(TypeError, ValueError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    return 0.0


def _worth_another(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in TRANSIENT
    return isinstance(error, httpx.TransportError | TimeoutError)


class Asker:
    """Posts JSON to one address and waits for JSON, from any thread.

    A thread of its own runs the event loop, so questions of several callers share the limits. It
    ends with the object. Redirects are not followed: the headers are for this address alone.

    Args:
        url: the address.
        headers: of every request.
        limits: how hard the server may be pressed.
        read: makes a reply of the JSON of a successful response.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        limits: Limits,
        read: Callable[[Any], Reply] = any_object,
    ) -> None:
        self._url, self._limits, self._read = url, limits, read
        self._client = httpx.AsyncClient(
            # What `_content` can unpack within bounds.
            headers={"Accept-Encoding": "gzip, deflate", **headers},
            timeout=limits.timeout,
            trust_env=False,
            limits=httpx.Limits(max_connections=limits.in_flight),
        )
        self._free = asyncio.Semaphore(limits.in_flight)
        self._pace = None if limits.per_second is None else Pace(limits.per_second)
        self._breaker = Breaker()
        self._once = Once()
        self._thread = _LoopThread(self._client)
        # At the end of the program, too.
        self._end = weakref.finalize(self, self._thread.end)

    def ask_all(self, bodies: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """Replies to all, in their order; none raises, and none takes longer than the deadline."""
        try:
            return self._thread.run(self._ask_all(bodies))
        except CancelledError:
            return [Reply(None, Status.SKIPPED)] * len(bodies)

    def look(self, url: str, timeout: float) -> Reply:
        """What another address of the same server shows (GET); one attempt, without a warning."""
        return self._thread.run(self._look(url, timeout))

    def cancel(self) -> None:
        """Give up all questions that are asked now; who waits for them has them skipped."""
        self._thread.cancel()

    def close(self) -> None:
        """End the thread and its connections; whatever is asked from now on is skipped."""
        self._end()

    async def _ask_all(self, bodies: Sequence[Mapping[str, Any]]) -> list[Reply]:
        return list(await asyncio.gather(*map(self._ask, bodies)))

    async def _ask(self, body: Mapping[str, Any]) -> Reply:
        async with self._free:
            if self._breaker.resting:
                return Reply(None, Status.SKIPPED)
            reply = await self._answered(body)
            self._breaker.learn(reply.status not in (Status.ERROR, Status.TIMEOUT))
            return reply

    async def _look(self, url: str, timeout: float) -> Reply:
        try:
            return any_object(_parsed(await self._response("GET", url, timeout)))
        except httpx.HTTPStatusError as error:
            return Reply(None, Status.ERROR, code=error.response.status_code)
        except Exception:
            return Reply(None, Status.ERROR)

    async def _answered(self, body: Mapping[str, Any]) -> Reply:
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_worth_another),
            # A wait that ends after the deadline is not begun.
            stop=tenacity.stop_after_attempt(self._limits.attempts)
            | tenacity.stop_before_delay(self._limits.deadline),
            wait=wait_before,
            reraise=True,
        )
        try:
            async with asyncio.timeout(self._limits.deadline):
                content: bytes = await attempts(self._posted, body)
            return self._read(_parsed(content))
        except (TimeoutError, httpx.TimeoutException) as error:
            limits = f"timeout {self._limits.timeout:g} s, deadline {self._limits.deadline:g} s"
            self._warn(Status.TIMEOUT, f"timed out ({type(error).__name__}; {limits})")
            return Reply(None, Status.TIMEOUT)
        except httpx.HTTPStatusError as error:
            code = error.response.status_code
            pause = retry_after(error.response)
            later = f"; it asks to wait {pause:g} s" if pause else ""
            self._warn(code, f"was refused: {code} {error}{later}")
            return Reply(None, Status.ERROR, code=code)
        except BadResponseError as error:
            self._warn(error.why, f"failed: its response {error}")
        except Exception as error:
            # Whatever a server may send: the other questions are not lost by it.
            kind = type(error).__name__
            self._warn(kind, f"failed: {kind}: {without_secrets(str(error))[:SHOWN]}")
        return Reply(None, Status.ERROR)

    def _warn(self, cause: Hashable, text: str) -> None:
        self._once.warn(cause, f"a question to {self._url} {text} (more of this kind are counted).")

    async def _posted(self, body: Mapping[str, Any]) -> bytes:
        if self._pace is not None:
            await self._pace.turn()
        return await self._response("POST", self._url, self._limits.timeout, json=dict(body))

    async def _response(self, method: str, url: str, timeout: float, **content: Any) -> bytes:
        """The content of a response.

        Raises:
            httpx.HTTPStatusError: it is no success; says what the server said.
            TimeoutError: it was not whole in time, however lively it began.
        """
        async with (
            asyncio.timeout(timeout),
            self._client.stream(method, url, **content) as response,
        ):
            found = await _content(response)
        if not response.is_success:
            said = found.decode("utf-8", "replace")
            if response.has_redirect_location:
                said = f"it redirects to {response.headers['location']}, which is not followed"
            raise httpx.HTTPStatusError(
                excerpt(said, SHOWN), request=response.request, response=response
            )
        return found


class BadResponseError(Exception):
    """A response that can't be read; `why` continues "the response"."""

    def __init__(self, why: str, example: str = "") -> None:
        super().__init__(f"{why}: {excerpt(example, SHOWN)}" if example else why)
        self.why = why


def _parsed(content: bytes) -> Any:
    """The JSON that a response holds.

    Raises:
        BadResponseError: it holds none.
    """
    try:
        return json.loads(content)
    except ValueError:
        raise BadResponseError("is no JSON", content.decode("utf-8", "replace")) from None


async def _content(response: httpx.Response) -> bytes:
    """The body of a response, unpacked.

    Raises:
        BadResponseError: it is larger than `MOST_BYTES`, or packed in another way than was asked
            for.
        zlib.error: it can't be unpacked.
    """
    too_large = BadResponseError(f"is larger than {MOST_BYTES // 2**20} MiB")
    packed = bytearray()
    async for part in response.aiter_raw():
        packed += part
        if len(packed) > MOST_BYTES:
            raise too_large
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        return bytes(packed)
    if encoding not in ("gzip", "deflate"):
        raise BadResponseError("is packed in a way that was not asked for", encoding)
    unpacking = zlib.decompressobj(zlib.MAX_WBITS | 32)
    content = unpacking.decompress(packed, MOST_BYTES)
    if unpacking.unconsumed_tail:
        raise too_large
    return content


def excerpt(text: str, most: int) -> str:
    """The beginning of a text on one line, without what a terminal would act upon."""
    return repr(without_secrets(" ".join(text.split()))[:most])


class _LoopThread:
    """An event loop in a thread of its own, which leaves no task behind when it ends.

    Args:
        client: is closed at the end.
    """

    PATIENCE = 2.0
    """Most seconds that `end` waits: at the end of the program nothing may wait for a server."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client, self._loop = client, asyncio.new_event_loop()
        self._is_open, self._lock = True, threading.Lock()
        self._thread = threading.Thread(target=self._work, daemon=True, name="asker")
        self._thread.start()

    def run(self, task: Coroutine[Any, Any, T]) -> T:
        """What a task returns; called from any other thread.

        Raises:
            CancelledError: it was cancelled, or the loop has ended.
        """
        with self._lock:
            if not self._is_open:
                task.close()
                raise CancelledError
            waiting = asyncio.run_coroutine_threadsafe(task, self._loop)
        try:
            return waiting.result()
        finally:
            # Left by an interrupt, nobody waits for the answers any more.
            waiting.cancel()

    def cancel(self) -> None:
        """Cancel all tasks; returns at once."""
        with self._lock:
            if self._is_open:
                self._loop.call_soon_threadsafe(_cancel_all, self._loop)

    def end(self) -> None:
        """Take no more tasks, cancel those that are there, and end; called from any thread.

        That may be the thread itself, where the garbage collector runs.
        """
        with self._lock:
            if self._is_open:
                self._is_open = False
                # Nothing is handed in after this.
                self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(self.PATIENCE)

    def _work(self) -> None:
        self._loop.run_forever()
        # Not from another thread with a time limit: the loop must not be closed before.
        self._loop.run_until_complete(self._finish())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _finish(self) -> None:
        await asyncio.gather(*_cancel_all(self._loop), return_exceptions=True)
        await self._client.aclose()


def _cancel_all(loop: asyncio.AbstractEventLoop) -> list[asyncio.Task[Any]]:
    """Cancel all tasks of a loop but the one that calls this."""
    others = [task for task in asyncio.all_tasks(loop) if task is not asyncio.current_task(loop)]
    for task in others:
        task.cancel()
    return others
