"""What a check found, and how to run one so that it always ends in a finding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from entroflow.errors import InputError
from entroflow.redaction import without_secrets


class Verdict(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """What a check found, in a line or two."""

    check: str
    verdict: Verdict
    said: str


class DoubtfulError(Exception):
    """Ends a check with a warning."""


class NotPossibleError(Exception):
    """Ends a check that can't be made."""


def finding_of(name: str, check: Callable[[], str]) -> Finding:
    """What a check returns, or what it raised, whatever that is."""
    try:
        return Finding(name, Verdict.OK, check())
    except NotPossibleError as reason:
        return Finding(name, Verdict.SKIPPED, str(reason))
    except DoubtfulError as warning:
        return Finding(name, Verdict.WARNING, str(warning))
    except InputError as error:
        return Finding(name, Verdict.FAILED, str(error))
    except Exception as error:
        # Whatever a model, a reward or a device may raise is what is to be found.
        return Finding(name, Verdict.FAILED, without_secrets(f"{type(error).__name__}: {error}"))
