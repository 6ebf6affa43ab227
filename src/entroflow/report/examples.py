"""Example images of a run as small pictures inside the page."""

from __future__ import annotations

import io
import logging
from base64 import b64encode
from collections.abc import Mapping, Sequence
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
    """The same captions in every column: [n] rows of a caption and [c] images.

    `right` has how many images of a column are strictly right (None: not scored); `large` images
    have more pixels than `SMALL` along a side, `reduced` ones are shown smaller than they are.
    """

    columns: Sequence[str]
    right: Sequence[int | None]
    rows: Sequence[tuple[str, Sequence[Example]]]
    large: bool
    reduced: bool


def over_iterations(folder: RunFolder, last: int) -> ExampleGrid | None:
    """The examples at the first and last evaluation up to iteration `last`, and some in between."""
    names = numbered(folder.examples, last)
    most = min(len(names), MOST_BETWEEN + 2)
    shown = [names[round(i * (len(names) - 1) / max(1, most - 1))] for i in range(most)]
    return example_grid(folder, {name: f"iteration {int(name)}" for name in shown})


def example_grid(folder: RunFolder, columns: Mapping[str, str]) -> ExampleGrid | None:
    """A grid of the saved examples named in `columns`, name -> heading; None if there are none.

    Columns whose files are missing, or whose captions differ from the last column's, are left out.
    """
    names = _whole(folder.examples, list(columns))
    read = [(columns[name], *_read(folder.examples, name)) for name in names]
    whole = [column for column in read if column[1]]
    if not whole:
        return None
    captions = whole[-1][1]
    for heading, others, *_ in whole:
        if others != captions:
            log.warning("%s: the images of %s have other captions.", folder.examples, heading)
    whole = [column for column in whole if column[1] == captions]
    parts = [examples for _, _, examples, _ in whole]
    scored = [[passed for _, passed in part if passed is not None] for part in parts]
    return ExampleGrid(
        columns=[heading for heading, *_ in whole],
        right=[sum(passed) if passed else None for passed in scored],
        rows=list(zip(captions, zip(*parts, strict=True), strict=True)),
        large=any(side > SMALL for *_, side in whole),
        reduced=any(side > LARGEST for *_, side in whole),
    )


def numbered(folder: Path, last: int) -> list[str]:
    """Names of what is saved up to iteration `last`, in order."""
    stems = {path.stem for path in folder.glob("[0-9]*") if path.suffix in (PNG, RECORD)}
    names = (name for name in stems if name.isdecimal() and int(name) <= last)
    return _whole(folder, sorted(names, key=int))


def _whole(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of which there are a picture and its record; one without the other is warned of."""
    missing = {name: [end for end in (PNG, RECORD) if not (folder / f"{name}{end}").exists()]
               for name in names}  # fmt: skip
    for lost in (folder / f"{name}{ends[0]}" for name, ends in missing.items() if len(ends) == 1):
        log.warning("%s is missing; the report does without what belongs to it.", lost)
    return [name for name, ends in missing.items() if not ends]


def _read(folder: Path, name: str) -> tuple[list[str], list[Example], int]:
    """Captions, examples and side in pixels of one strip; empty if they are not as many."""
    content = read_object(folder / f"{name}{RECORD}", Examples)
    captions, passed = content["captions"], content.get("passed") or []
    strip = read_picture(folder / f"{name}{PNG}", content.get("picture"))
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
