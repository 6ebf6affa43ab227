"""Which version of the package this is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__version__ = "0.2.0"


def package_version() -> str:
    """The commit of the package where it is in a git checkout, else its version."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        asked = ["git", "-C", str(here), *arguments]
        answer = subprocess.check_output(asked, stderr=subprocess.DEVNULL)
        return os.fsdecode(answer).strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) not in here.parents:
            return __version__
        changed = git("status", "--porcelain", "--", str(here))
        return git("rev-parse", "--short", "HEAD") + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return __version__
