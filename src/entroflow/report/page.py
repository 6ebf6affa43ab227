"""The HTML report of a run."""

from __future__ import annotations

from pathlib import Path

from entroflow.runs import RunFolder


def write_report(folder: RunFolder) -> Path:
    return folder.path / "report.html"
