"""Servers that misbehave on the wire: no other reply is lost, and all bounds hold."""

from __future__ import annotations

import gc
import gzip
import itertools
import logging
import resource
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest

from entroflow.rewards import asking
from entroflow.rewards.asking import MOST_BYTES, Asker, Limits, retry_after
from entroflow.rewards.base import Status
from raw_server import RawServer, http

GOOD = http(b'{"good": true}')


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(asking, "LONGEST_WAIT", 0.05)


def ask(reply, count=1, headers=None, **limits):
    """Replies to so many questions; the odd ones get what `reply` yields, the others `GOOD`."""

    def of(head, body):
        odd = int(body.decode().strip('{}"n: ')) % 2 if count > 1 else True
        return reply(head, body) if odd else [GOOD]

    settings = {"in_flight": 8, "per_second": None, "timeout": 5.0, "deadline": 9.0, "attempts": 1}
    with RawServer(of) as server:
        asker = Asker(f"{server.address}/v1", headers or {}, Limits(**{**settings, **limits}))
        start = time.monotonic()
        replies = asker.ask_all([{"n": n} for n in range(count)])
        seconds = time.monotonic() - start
        asker.close()
    return replies, seconds, server


def late(number):
    return [http(b"{}", "503 Busy", f"Retry-After: {number}")]


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([http(b'{"a":' * 90_000 + b"1" + b"}" * 90_000)], "RecursionError"),
        ([http(b"9" * 5000)], "no JSON"),
        ([http(b'{"a": "\xff"}')], "no JSON"),
        ([http(b"")], "no JSON"),
        ([http(b"gone", "418 Teapot")], "418"),
        ([http(b"x" * 20, "200 OK", "Content-Encoding: gzip")], "incorrect header"),
        ([http(b"x" * 20, "200 OK", "Content-Encoding: br")], "not asked for"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"], "peer closed"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: minus\r\n\r\n{}"], "RemoteProtocolError"),
        ([b"NOTHTTP\r\n\r\n"], "RemoteProtocolError"),
        ([], "Server disconnected"),
        (late("Thu, 01 Jan 1970 00:00:00 +9999999999999999"), "503"),
        (late("Fri, 31 Dec 9999 23:59:59 -2359"), "503"),
    ],
)
def test_one_odd_reply_loses_no_other(pieces, why, caplog):
    replies, _, _ = ask(lambda *_: pieces, count=9, attempts=2)
    assert [reply.status for reply in replies] == [Status.OK, Status.ERROR] * 4 + [Status.OK]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    # One for all four.
    assert len(warnings) == 1
    assert why in warnings[0]


def test_a_reply_may_be_packed():
    body = b'{"text": "' + b"well " * 1000 + b'"}'
    for packed, name in ((gzip.compress(body), "gzip"), (zlib.compress(body), "deflate")):
        (reply,), _, _ = ask(
            lambda *_, p=packed, n=name: [http(p, "200", f"Content-Encoding: {n}")]
        )
        assert reply.body == {"text": "well " * 1000}


def bomb(mebibytes):
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(bytes(2**20)) for _ in range(mebibytes)]
    return b"".join([*parts, packer.flush()])


@pytest.mark.parametrize("kind", ["long", "packed"])
def test_a_reply_is_read_to_a_bound(kind, caplog):
    """A third of a gigabyte, as it is or unpacked; eight at a time would be more than 2 GiB."""
    sent = []
    packed = http(bomb(300), "200 OK", "Content-Encoding: gzip")

    def reply(*_):
        if kind == "packed":
            yield packed
            return
        yield b"HTTP/1.1 200 OK\r\n\r\n"
        for _ in range(300):
            sent.append(1)
            yield bytes(2**20)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    replies, _, _ = ask(reply, count=16)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert [reply.status for reply in replies] == [Status.OK, Status.ERROR] * 8
    assert f"larger than {MOST_BYTES // 2**20} MiB" in caplog.text
    assert grown < 300 * 1024  # In KiB.
    # Sockets hold some MiB beside what was read.
    assert len(sent) < 8 * 60


@pytest.mark.parametrize("where", ["head", "body", "nothing"])
def test_an_attempt_ends_in_time_whatever_drips(where):
    """Every piece is in time; the whole never comes."""

    def drip(*_):
        yield b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: 9999\r\n\r\n" if where == "body" else b"")
        for i in itertools.count():
            time.sleep(0.1)
            yield b"" if where == "nothing" else b" " if where == "body" else b"x%d: y\r\n" % i

    replies, seconds, server = ask(drip, count=2, timeout=0.5, deadline=30.0, attempts=2)
    assert [reply.status for reply in replies] == [Status.OK, Status.TIMEOUT]
    assert seconds < 8
    # The good one, and both attempts of the other.
    assert len(server.requests) == 3


@pytest.mark.parametrize("pause", ["3600", "inf", "1e999", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_a_pause_beyond_the_deadline_is_not_begun(pause, caplog):
    (reply,), seconds, server = ask(lambda *_: late(pause), attempts=5, deadline=20.0)
    assert reply.status is Status.ERROR
    assert seconds < 8
    assert len(server.requests) == 1
    assert "asks to wait" in caplog.text


@pytest.mark.parametrize(
    "header", ["nan", "-inf", "Fri, 99 Foo 2020", "Mon, 01 Jan 2020 00:00 +1e9"]
)
def test_a_pause_that_is_none_is_no_pause(header):
    import httpx

    assert retry_after(httpx.Response(429, headers={"Retry-After": header})) == 0


@pytest.mark.parametrize("code", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"])
def test_a_redirect_takes_the_key_nowhere(code, caplog):
    with RawServer(lambda *_: [GOOD]) as elsewhere:
        answer = http(b"", code, f"Location: {elsewhere.address}/v1")
        (reply,), _, server = ask(lambda *_: [answer], headers={"Authorization": "Bearer sk-1"})
        assert reply.status is Status.ERROR
        assert "sk-1" in server.requests[0][0]
        assert elsewhere.requests == []
        assert f"redirects to {elsewhere.address}" in caplog.text


def test_who_is_cancelled_has_all_skipped():
    with RawServer(lambda *_: time.sleep(20) or []) as server:
        asker = Asker(server.address, {}, Limits(8, None, 60.0, 60.0, 1))
        threading.Timer(0.5, asker.cancel).start()
        start = time.monotonic()
        replies = asker.ask_all([{}] * 20)
        assert time.monotonic() - start < 10
        assert [reply.status for reply in replies] == [Status.SKIPPED] * 20
        asker.close()


ENDS = {
    "while questions are open": "begin(); time.sleep(0.5)",
    "at once": "begin()",
    "while others go on asking": "[begin(forever=True) for _ in range(4)]; time.sleep(0.5)",
    "interrupted": """
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
with contextlib.suppress(KeyboardInterrupt):
    asker.ask_all([{}] * 20)
""",
    # As on a machine that is busy with other things.
    "while its thread is held up": """
asker._read = lambda body: time.sleep(3)
good.set()
begin(); time.sleep(0.5)
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends_without_a_word_whatever_is_open(end):
    program = f"""
import contextlib, gc, os, signal, sys, threading, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from entroflow.rewards.asking import Asker, Limits
from raw_server import RawServer, http

good = threading.Event()
server = RawServer(lambda *_: [http(b"{{}}")] if good.is_set() else (time.sleep(60),))
asker = Asker(server.address, {{}}, Limits(8, None, 60.0, 60.0, 1))

def ask(forever):
    while True:
        asker.ask_all([{{}}] * 20)
        if not forever:
            break

def begin(forever=False):
    threading.Thread(target=ask, args=(forever,), daemon=True).start()

{ENDS[end]}
print("over")
"""
    # A hanging server answers after 60 seconds: whoever waits for it runs into the limit.
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False
    )
    assert (ended.stdout, ended.stderr, ended.returncode) == ("over\n", "", 0)


def test_an_asker_may_be_collected_in_its_own_thread(capfd):
    """The garbage collector runs wherever something is made."""
    asker = Asker("http://127.0.0.1:9", {}, Limits(8, None, 60.0, 60.0, 1))
    thread, asker.itself = asker._thread, asker
    gc.disable()
    try:
        del asker
        thread._loop.call_soon_threadsafe(gc.collect)
        thread._thread.join(10)
    finally:
        gc.enable()
    assert thread._loop.is_closed()
    assert capfd.readouterr().err == ""
