"""Output that goes nowhere, or where not every character can: it ends nothing."""

from __future__ import annotations

import ast
import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import entroflow
from entroflow.report.page import write_report
from entroflow.runs.folder import RunFolder
from entroflow.streams import HANDLER, Forgiving
from tiny_run import train


class Inner:
    """A raw stream that takes a few bytes at a time, and gives what it is told to give."""

    def __init__(self, *answers, terminal=False):
        self.answers, self.terminal = list(answers), terminal
        self.written = b""

    def write(self, data):
        answer = self.answers.pop(0) if self.answers else 3
        if isinstance(answer, OSError):
            raise answer
        if answer is not None:
            self.written += bytes(data[:answer])
            answer = min(answer, len(data))
        return answer

    def isatty(self):
        return self.terminal

    def fileno(self):
        return 1


def test_what_is_written_in_parts_is_written_whole(monkeypatch):
    waits = []
    monkeypatch.setattr("select.select", lambda *streams: waits.append(streams))
    inner = Inner(2, None, None, 5)
    assert Forgiving(inner).write(b"0123456789") == 10
    assert inner.written == b"0123456789"
    assert waits == [([], [inner], [])] * 2


@pytest.mark.parametrize(
    ("number", "terminal", "remembered"),
    [
        (errno.EPIPE, False, False), (errno.EIO, True, False), (errno.EIO, False, True),
        (errno.ENOSPC, False, True), (errno.EBADF, False, True), (errno.EFBIG, True, True),
    ],
)  # fmt: skip
def test_what_can_not_be_written_is_remembered_unless_nobody_reads(number, terminal, remembered):
    inner = Inner(OSError(number, "no"), terminal=terminal)
    stream = Forgiving(inner)
    assert stream.write(b"lost") == 4
    assert (stream.lost is not None) == remembered
    stream.write(b"later")
    assert inner.written == b"later"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", b"-0.5 x ?? ? \xff e"), ("latin-1", b"-0.5 \xd7 ?? \xe9 \xff e"),
        ("cp1252", b"-0.5 \xd7 ?? \xe9 \xff e"), ("koi8-r", b"-0.5 x ?? ? \xff e"),
    ],
)  # fmt: skip
def test_what_can_not_be_shown_is_replaced_and_names_of_files_stay(encoding, shown):
    inner = io.BytesIO()
    stream = io.TextIOWrapper(inner, encoding, HANDLER)
    stream.write("−0.5 × 漢字 é \udcff e")
    stream.flush()
    assert inner.getvalue() == shown


def test_a_report_lies_in_folders_of_any_name(tmp_path):
    """File names are bytes, and not all of them are text."""
    folder = train(tmp_path / "run")
    odd = folder.path.rename(tmp_path / os.fsdecode(b"lauf\xff"))
    assert "lauf\ufffd" in write_report(RunFolder.open(odd)).read_text(encoding="utf-8")


PROGRAM = [sys.executable, "-m", "entroflow.cli.main"]


def cli(*arguments, shell=None, **environment):
    """The command line as a shell starts it; its output are bytes."""
    command = [*PROGRAM, *arguments]
    if shell is not None:
        command = ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *command]
    return subprocess.run(
        command, capture_output=True, timeout=120, env={**os.environ, **environment}, check=False
    )


def test_a_reader_that_leaves_is_no_error():
    done = cli("recipes", shell="| head -n 1")
    assert done.returncode == 0
    assert done.stderr == b""
    assert done.stdout.startswith(b"aegpo ")


def test_output_that_is_lost_is_told():
    done = cli("recipes", shell="> /dev/full")
    assert done.returncode == 1
    assert done.stderr.decode() == (
        "error: the output can't be written ([Errno 28] No space left on device).\n"
    )


def test_wrong_input_stays_that_without_a_place_to_say_so():
    assert cli("recipes", "nonsense", shell="> /dev/full 2> /dev/full").returncode == 2


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed):
    done = cli("recipes", shell=closed)
    assert done.returncode == 0
    assert done.stderr == b""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "shift_jis", "utf-16"])
def test_help_is_told_in_every_encoding(encoding):
    done = cli("train", "--help", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "Examples: entroflow train" in done.stdout.decode(encoding)


def test_recipes_and_errors_are_told_in_every_encoding(tmp_path):
    encoding, recipe = "ascii", tmp_path / "mine.yaml"
    recipe.write_text("title: ein Maß für σ\n", encoding="utf-8")
    done = cli("recipes", str(recipe), PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "title: ein Ma" in done.stdout.decode(encoding)
    recipe.write_text("σ: 1\n", encoding="utf-8")
    done = cli("recipes", str(recipe), PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert done.stderr.decode(encoding).startswith("error: ")


def unnamed(path):
    """Calls that read or write text in whatever encoding the locale has, as `file:line`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        named = {keyword.arg for keyword in node.keywords}
        match node.func:
            case ast.Attribute(ast.Name("subprocess"), name):
                wrong = bool({"text", "universal_newlines"} & named) and "encoding" not in named
            case ast.Attribute(ast.Name("os" | "Image" | "RunFolder" | "cls"), "open"):
                continue
            case ast.Attribute(_, "open" | "read_text" | "write_text" as name) | ast.Name(
                "open" as name
            ):
                mode = "".join(
                    each.value
                    for each in [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
                    if isinstance(each, ast.Constant) and isinstance(each.value, str)
                )
                wrong = "encoding" not in named and not (name == "open" and "b" in mode)
            case _:
                continue
        if wrong:
            yield f"{path.name}:{node.lineno}"


def test_every_file_is_read_and_written_in_an_encoding_that_is_named(tmp_path):
    """Else a run folder could not be read where another locale is set."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "path.open()\n(a / b).open('a')\nopen(path, mode='w')\npath.read_text()\n"
        "subprocess.run(x, text=True)\n"
        "path.open('rb')\nopen(p, encoding='utf-8')\nImage.open(p)\nsubprocess.run(x)\n"
        "write_text(path, 'x')\n",
        encoding="utf-8",
    )
    assert [*unnamed(wrong)] == [f"wrong.py:{line}" for line in range(1, 6)]
    package = Path(entroflow.__file__).parent
    assert [each for path in package.rglob("*.py") for each in unnamed(path)] == []
