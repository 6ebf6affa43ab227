"""The command line: all commands, and how failures end."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import traceback
from types import TracebackType
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from entroflow.cli import base_models, checks, compare, llm, recipes, runs
from entroflow.errors import InputError, one_line, printable
from entroflow.redaction import without_secrets
from entroflow.streams import lasting_output

ORDER = (
    "train", "sample", "evaluate", "compare", "export", "doctor", "stand-in", "report", "recipes",
    "pretrain", "llm", "reward",
)  # fmt: skip
"""Of the commands in the help."""


class _Commands(TyperGroup):
    """All commands; what is called in one can't end the program as if all were well."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands."""
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        """Run a command.

        Raises:
            InputError: the user's own code raised SystemExit or the like.
        """
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            from entroflow.recipe.imports import raised

            raise InputError(f"what was called {raised(error)}.") from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Post-train flow-matching image generators with reinforcement learning.\n\n"
    "Start here: `entroflow train` trains the embedded model on two cores in minutes.",
)
for part in (runs, compare, checks, base_models, recipes):
    app.add_typer(part.app)
app.add_typer(base_models.pretrain, name="pretrain")
app.add_typer(llm.app, name="llm")
app.add_typer(checks.rewards, name="reward")

DISK = (
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EACCES,
    errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO,
)  # fmt: skip
"""Failures of files and disks; others, as of a network, are not the user's input."""


INTERRUPTED = 130
"""Exit code after Ctrl-C."""


OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory")
"""What PyTorch says of it."""


class _StandardError(logging.Handler):
    """Writes to what `sys.stderr` is at the time: a live bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        try:
            lines = without_secrets(self.format(record)).splitlines()
            sys.stderr.write("\n".join(map(printable, lines)) + "\n")
        except Exception:
            self.handleError(record)


def _show_failure(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a traceback without the secrets that messages in it may quote."""
    lines = traceback.format_exception(kind, error, trace)
    print(without_secrets("".join(lines)), file=sys.stderr, end="")


def main() -> None:
    """Entry point: wrong input ends with one line and exit code 2, an interrupt with 130."""
    # At its import it warns of optional packages that nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[_StandardError()]
    )
    # A shell expands `~` where a word begins, but not in `--run=~/mine`.
    sys.argv[1:] = [
        re.sub(r"^(--[\w-]+=)(~.*)", lambda m: m[1] + os.path.expanduser(m[2]), argument)
        for argument in sys.argv[1:]
    ]
    with lasting_output():
        try:
            app()
        except InputError as error:
            _end_with(str(error))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK:
                # A folder that can't be written, a full disk: nothing a traceback would explain.
                _end_with(str(error))
            of_torch = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
            if isinstance(error, MemoryError) or of_torch:
                reason = one_line(str(error), 200) or type(error).__name__
                _end_with(
                    f"there is not enough memory for this ({reason}); `entroflow doctor RECIPE` "
                    "says what takes it."
                )
            # Here, as typer has a hook of its own.
            sys.excepthook = _show_failure
            raise
        except SystemExit as end:
            if end.code != INTERRUPTED:
                raise
            # All is closed and written by now. A thread that still waits, as for the name of a
            # server or in a reward of the user's, must not hold up the end.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)


def _end_with(reason: str) -> NoReturn:
    print(f"error: {one_line(without_secrets(reason))}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
