"""Standard output and error that end no program, whatever becomes of them.

A run of days may lose its terminal, its reader or the disk of its log, or print to something that
shows ASCII alone. None of that is a reason to lose the run.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PLAIN = {
    "−": "-", "–": "-", "—": "-", "·": "*", "•": "*", "×": "x", "±": "+-", "≤": "<=", "≥": ">=",
    "→": "->", "…": "...", "Δ": "d", "σ": "s", "“": '"', "”": '"', "‘": "'", "’": "'",
}  # fmt: skip
"""What is written where a character can't be; for others a question mark."""

HANDLER = "entroflow.plain"


def plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    """Handler of encoding errors: one character, in ASCII; the bytes of a file name as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return PLAIN.get(character, "?"), error.start + 1


codecs.register_error(HANDLER, plainly)


class Forgiving(io.RawIOBase):
    """Writes all it is given, or else remembers why it could not."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        # A terminal that is gone gives EIO; so does a broken disk, which is not forgotten.
        self._no_reader = {errno.EPIPE, *([errno.EIO] if inner.isatty() else [])}
        self.lost: OSError | None = None
        """The first failure, but for readers that have gone."""

    def writable(self) -> bool:
        """Yes."""
        return True

    def fileno(self) -> int:
        """That of the stream itself."""
        return int(self._inner.fileno())

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return bool(self._inner.isatty())

    def write(self, data: Any) -> int:
        """All of `data`."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                written = self._inner.write(rest)
                if written is None:
                    # Someone who shares it has made it one that doesn't wait.
                    select.select([], [self._inner], [])
                    continue
                rest = rest[written:]
        except OSError as error:
            if error.errno not in self._no_reader:
                self.lost = self.lost or error
        return size


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within, no output ends the program; where some was lost on the way, it ends with code 1.

    Streams that are not those of the process itself (a notebook's, a test's) are left alone.
    """
    _open_closed()
    output = _lasting("stdout", 1)
    _lasting("stderr", 2)
    try:
        yield
    except SystemExit as end:
        if output is not None and output.lost is not None and not end.code:
            print(f"error: the output can't be written ({output.lost}).", file=sys.stderr)
            raise SystemExit(1) from None
        raise


def _open_closed() -> None:
    """Give standard streams that are closed a place: the next file would get their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _lasting(name: str, number: int) -> Forgiving | None:
    """Put a lasting stream in the place of the process's own, which is None if it was closed."""
    stream: Any = getattr(sys, name)
    inner: Any
    if stream is not getattr(sys, f"__{name}__"):
        return None
    if stream is None:
        inner, encoding = io.FileIO(number, "w", closefd=False), "utf-8"
    elif isinstance(stream, io.TextIOWrapper):
        inner, encoding = getattr(stream.buffer, "raw", stream.buffer), stream.encoding
    else:
        return None
    raw = Forgiving(inner)
    # Without a buffer: what the handler of a signal writes may come in the midst of a write.
    lasting = io.TextIOWrapper(raw, encoding, HANDLER, write_through=True)  # type: ignore[type-var]
    setattr(sys, name, lasting)
    return raw
