"""The frame that all reports share: a head, and sections of blocks, as one page that works offline.

A block is a macro of `blocks.html.j2` and what it shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import entroflow
from entroflow.runs.folder import REPORT, RunFolder
from entroflow.streams import HANDLER
from entroflow.wording import Interval
from entroflow.writing import write_text

Block = tuple[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the page; blocks without content are left out, and so is a section of them."""

    id: str
    link: str
    title: str
    lead: str
    blocks: Sequence[Block]


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> Block:
    """A table whose first column names the rows; nothing if there are none."""
    return "table", (heads, rows) if rows else None


def compared(of: str, scores: Mapping[str, Mapping[str, Interval | str]]) -> Block:
    """A table of scores of models beside each other: model -> what was scored -> score."""
    first, *_ = scores.values()
    rows = [[name, *(each.get(name, "") for each in scores.values())] for name in first]
    return table([of if len(first) > 1 else "", *scores], rows)


def write_page(folder: RunFolder, sections: Sequence[Section], **head: object) -> Path:
    """Write `report.html` into a run folder; `head` is its `kind`, `title`, `run` and `notes`."""
    # Only pages need plotly: importing it takes longer than most commands do.
    from plotly.offline import get_plotlyjs

    strict: Any = {"autoescape": True, "undefined": StrictUndefined}
    loader = PackageLoader("entroflow", "report")
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **strict)
    shown = [section for section in sections if any(content for _, content in section.blocks)]
    page = environment.get_template("page.html.j2").render(
        sections=shown, version=entroflow.__version__, plotly_js=get_plotlyjs(), **head
    )
    # A folder's name may be in another encoding than the page.
    written = page.encode("utf-8", HANDLER).decode("utf-8", "replace")
    write_text(folder.path / REPORT, written)
    return folder.path / REPORT
