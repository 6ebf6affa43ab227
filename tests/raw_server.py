"""A server that sends bytes as it is told, right or wrong, and keeps what it was sent."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterable


class RawServer:
    """Answers each request on 127.0.0.1 with the pieces that `reply(head, body)` yields.

    Attributes:
        requests: heads and bodies of what it was sent.
    """

    def __init__(self, reply: Callable[[str, bytes], Iterable[bytes]]) -> None:
        self.reply, self.requests = reply, []
        self.over = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with (
            connection,
            contextlib.suppress(OSError, ValueError),
            connection.makefile("rb") as read,
        ):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                line = read.readline()
                if not line:
                    return
                head += line
            text = head.decode("latin1")
            lengths = [
                li.split(":")[1] for li in text.lower().splitlines() if "content-length" in li
            ]
            body = read.read(int(lengths[0]) if lengths else 0)
            self.requests.append((text, body))
            for piece in self.reply(text, body):
                if self.over.is_set():
                    return
                connection.sendall(piece)


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """A whole response."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chat(content: object, **more: object) -> bytes:
    """A whole response with an answer."""
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop", **more}
    return http(json.dumps({"choices": [choice]}).encode())
