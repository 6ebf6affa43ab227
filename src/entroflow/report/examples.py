"""Example images of a run as small pictures inside the page."""

from __future__ import annotations

import io
import logging
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from entroflow.contents import read_object
from entroflow.pictures import read_picture
from entroflow.runs.files import Examples
from entroflow.runs.folder import RunFolder

log = logging.getLogger(__name__)

SMALL = 96
"""Pixels; images up to this are shown so wide, pixel by pixel."""
LARGEST = 192
"""Pixels; larger images are shown reduced to this, so that the page stays small."""
MOST_BETWEEN = 3
PNG, RECORD = ".png", ".json"


Example = tuple[str, bool | None]
"""One image: its `data:` address and whether it is strictly right (None: not scored)."""


@dataclass(frozen=True)
class ExampleGrid:
    """The same captions in every column.

    Attributes:
        columns: [c] headings.
        right: [c] how many images of the column are strictly right (None: not scored).
        rows: [n] caption and one image per column.
        large: whether images have more pixels than `SMALL` along a side.
        reduced: whether the images are shown smaller than they are.
    """

    columns: Sequence[str]
    right: Sequence[int | None]
    rows: Sequence[tuple[str, Sequence[Example]]]
    large: bool
    reduced: bool

    @property
    def abreast(self) -> int:
        """How many parts of the grid fit side by side on a wide screen."""
        return max(1, (6 if self.large else 12) // (len(self.columns) + 1))

    @property
    def scored(self) -> bool:
        """Whether any image was scored."""
        return any(number is not None for number in self.right)


def over_iterations(folder: RunFolder, last: int) -> ExampleGrid | None:
    """The examples at the first and last evaluation up to iteration `last`, and some in between."""
    names = numbered(folder.examples, last)
    most = min(len(names), MOST_BETWEEN + 2)
    shown = [names[round(i * (len(names) - 1) / max(1, most - 1))] for i in range(most)]
    return example_grid(folder, [(name, f"iteration {int(name)}") for name in shown])


def example_grid(folder: RunFolder, columns: Sequence[tuple[str, str]]) -> ExampleGrid | None:
    """A grid of the saved examples named in `columns` (name, heading); None if there are none.

    Columns whose files are missing, or whose captions differ from the last column's, are left out.
    """
    read = [(heading, *_read(folder.examples, name)) for name, heading in columns]
    whole = [column for column in read if column[1]]
    if not whole:
        return None
    captions = whole[-1][1]
    for heading, others, *_ in whole:
        if others != captions:
            log.warning("%s: the images of %s have other captions.", folder.examples, heading)
    whole = [column for column in whole if column[1] == captions]
    parts = [examples for _, _, examples, _ in whole]
    return ExampleGrid(
        columns=[heading for heading, *_ in whole],
        right=[_right(examples) for examples in parts],
        rows=list(zip(captions, zip(*parts, strict=True), strict=True)),
        large=any(side > SMALL for *_, side in whole),
        reduced=any(side > LARGEST for *_, side in whole),
    )


def numbered(folder: Path, last: int) -> list[str]:
    """Names of what is saved up to iteration `last`, in order: pictures with their records.

    One without the other is left out, which is warned of.
    """
    kinds = [{path.stem for path in folder.glob(f"[0-9]*{end}")} for end in (PNG, RECORD)]
    names = {name for name in kinds[0] | kinds[1] if name.isdecimal() and int(name) <= last}
    for name in sorted(names - (kinds[0] & kinds[1])):
        _warn_without(folder / f"{name}{RECORD if name in kinds[0] else PNG}")
    return sorted(names & kinds[0] & kinds[1], key=int)


def _warn_without(path: Path) -> None:
    log.warning("%s is missing; the report does without what belongs to it.", path)


def _read(folder: Path, name: str) -> tuple[list[str], list[Example], int]:
    """Captions, examples and side in pixels of one strip; empty if it is not there."""
    picture, record = folder / f"{name}{PNG}", folder / f"{name}{RECORD}"
    if not (picture.exists() and record.exists()):
        if picture.exists() or record.exists():
            _warn_without(record if picture.exists() else picture)
        return [], [], 0
    content = read_object(record, Examples)
    captions, passed = content["captions"], content.get("passed") or []
    strip = read_picture(picture, content.get("picture"))
    side = strip.height
    if strip.width != side * len(captions):
        return [], [], 0
    examples = [
        (data_address(strip.crop((i * side, 0, (i + 1) * side, side))), right)
        for i, right in enumerate([*passed, *[None] * len(captions)][: len(captions)])
    ]
    return captions, examples, side


def data_address(image: Image.Image) -> str:
    """An image as a `data:` address; a large one reduced."""
    buffer = io.BytesIO()
    large = image.height > LARGEST
    if large:
        image.resize((LARGEST, LARGEST), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=85)
    else:
        image.save(buffer, "PNG", optimize=True)
    return f"data:image/{'jpeg' if large else 'png'};base64,{b64encode(buffer.getvalue()).decode()}"


def _right(examples: Sequence[Example]) -> int | None:
    scored = [passed for _, passed in examples if passed is not None]
    return sum(scored) if scored else None
