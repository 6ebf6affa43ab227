"""Pictures for people: image grids as PNG."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from entroflow.contents import TO_DO_WITHOUT, RunError
from entroflow.writing import write_bytes

LARGE = 128
"""Pixels; images that are at least so wide are not enlarged."""


def to_png(image: Tensor) -> bytes:
    """One image [3, H, W] in [0, 1] as PNG."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def grid(
    images: Tensor,
    columns: int,
    captions: Sequence[str] = (),
    passed: Sequence[bool | None] = (),
    scale: int | None = None,
) -> Image.Image:
    """Images [n, 3, H, W] in [0, 1] as one picture, row by row.

    Args:
        captions: [n] written under the images.
        passed: [n] a green or red bar between image and caption; none where it is None.
        scale: pixels per image pixel; None: as many as make a small image about `LARGE` wide.
    """
    n, _, height, width = images.shape
    scale = max(1, LARGE // width) if scale is None else scale
    gap, bar = 6, 3 if len(passed) else 0
    font = ImageFont.load_default(size=11)
    lines = [_wrapped(caption, width * scale, font) for caption in captions]
    label = 13 * max((len(text) for text in lines), default=0) + (4 if lines else 0)
    rows = (n + columns - 1) // columns
    cell_width, cell_height = width * scale + gap, height * scale + bar + label + gap
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(n):
        left = gap + (i % columns) * cell_width
        top = gap + (i // columns) * cell_height
        sheet.paste(_pillow(images[i], scale), (left, top))
        below = top + height * scale
        if bar and passed[i] is not None:
            color = "#2a9d4a" if passed[i] else "#d1495b"
            draw.rectangle((left, below, left + width * scale - 1, below + bar - 1), fill=color)
        if lines:
            text = "\n".join(lines[i])
            draw.multiline_text((left, below + bar + 2), text, fill="#333333", font=font, spacing=1)
    return sheet


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def digest_of(picture: bytes) -> str:
    """What is known of a picture besides, to tell whether it is still the one."""
    return hashlib.blake2b(picture, digest_size=16).hexdigest()


def read_picture(path: Path, digest: str | None = None) -> Image.Image:
    """A picture of a run folder.

    Args:
        digest: of its bytes; None where nobody has written it down.

    Raises:
        RunError: it is missing, torn, or another one.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            opened.verify()
        with Image.open(io.BytesIO(content)) as opened:
            picture = opened.convert("RGB")
    except Exception as error:  # what Pillow raises of damaged files is written down nowhere
        raise RunError(f"{path} is torn ({error}){TO_DO_WITHOUT}") from None
    if digest not in (None, digest_of(content)):
        raise RunError(f"{path} is torn (it is not what was written){TO_DO_WITHOUT}")
    return picture


def to_pil(image: Tensor) -> Image.Image:
    """One image [3, H, W] in [0, 1], rounded to 8 bits."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _pillow(image: Tensor, scale: int) -> Image.Image:
    picture = to_pil(image)
    if scale == 1:
        return picture
    size = (picture.width * scale, picture.height * scale)
    return picture.resize(size, Image.Resampling.NEAREST)


def _wrapped(
    text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
