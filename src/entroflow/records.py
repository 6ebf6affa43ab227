"""Records of a file as people have them: read by its suffix, whatever the suffix's case.

    .txt, .text, .lst, .list, .prompts, none    plain text, a record per line
    .json                                       a list of texts or objects; or JSON Lines
    .jsonl, .ndjson                             an object per line
    .csv, .tsv                                  a table with a header; every cell is a text
    .parquet                                    a table

Everything else is refused: nothing is taken for what it is not.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entroflow.errors import InputError

TEXT = ("", ".txt", ".text", ".lst", ".list", ".prompts")
JSON_LINES = (".jsonl", ".ndjson")
STRUCTURED = (".json", *JSON_LINES, ".csv", ".tsv", ".parquet")
"""Suffixes of files whose records have names for what they hold."""
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z")
UNREADABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Control characters, as of a binary file, and halves of pairs that UTF-8 can't hold."""
OPENING = re.compile(r"""[\[{(]+$|(\{|\[\s*\{?)\s*["']""")
"""How a list or an object in several lines begins, in JSON or as Python prints it."""
LFS_POINTER = "version https://git-lfs.github.com/spec/"
LONGEST_CELL = 2**27
"""Characters of a cell of a table; Python's own limit is 131,072."""


@dataclass(frozen=True)
class Record:
    """One of a file.

    Attributes:
        where: the file and the line or row, for messages.
        content: a mapping; or the text itself where the file gives texts without names.
    """

    where: str
    content: Any


def suffix_of(path: Path) -> str:
    """What a file is read by: the end of its name in lower case."""
    return path.suffix.lower()


def read_records(path: Path, key: str) -> list[Record]:
    """All records of a file.

    Args:
        path: of the file.
        key: under which a record holds its text; it tells a record from an object around a list.

    Raises:
        InputError: there is no such file, its suffix is none of those above, or it does not hold
            what its suffix says.
    """
    suffix = suffix_of(path)
    if suffix not in (*TEXT, *STRUCTURED):
        raise InputError(_refused(path))
    if suffix == ".parquet":
        return _of_parquet(path)
    text = read_plain(path)
    if suffix == ".json":
        return _of_json(path, text, key)
    if suffix in JSON_LINES:
        return _of_json_lines(path, text, key)
    if suffix in TEXT:
        return _of_lines(path, text)
    return _of_table(path, text, "," if suffix == ".csv" else "\t")


def read_plain(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        InputError: there is none, or it holds no text.
    """
    try:
        # Line ends stay as they are: a cell of a table may hold some.
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except FileNotFoundError:
        raise InputError(f"there is no prompt file {path}.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is not a text file in UTF-8: it is a folder.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file in UTF-8; save it as such.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read ({error}).") from None
    if odd := UNREADABLE.search(text):
        line = text.count("\n", 0, odd.start()) + 1
        raise InputError(
            f"{path} is not a text file in UTF-8: line {line} holds the character {odd[0]!r}."
        )
    _refuse_pointer(path, text)
    return text


def _refuse_pointer(path: Path, start: str) -> None:
    if start.startswith(LFS_POINTER):
        raise InputError(f"{path} is a pointer of Git LFS to the file; get it with: git lfs pull")


def _refused(path: Path) -> str:
    known = ", ".join([*TEXT[1:], *STRUCTURED])
    if suffix_of(path) in PACKED:
        return f"{path} is packed; unpack it first (files that are read: {known})."
    return (
        f"{path}: files that end in {path.suffix} are not read; give one of {known}, or plain text "
        "under a name without an ending."
    )


def _lines(text: str) -> list[str]:
    # Not `splitlines`: it also cuts at characters that a text, or JSON, may hold.
    return re.split(r"\r\n|\r|\n", text)


def _of_lines(path: Path, text: str) -> list[Record]:
    """Lines of plain text without their margins; blank ones are left out.

    Raises:
        InputError: the file is plainly no text of lines.
    """
    lines = [(n, line.strip()) for n, line in enumerate(_lines(text), start=1) if line.strip()]
    if not lines:
        return []
    start = lines[0][1]
    odd = next((number for number, line in lines if _is_structure(line)), None)
    if OPENING.match(start) or _is_structure(text):
        odd = lines[0][0]
    if odd is not None:
        raise InputError(
            f"{path}:{odd} holds JSON, not a text; give the file the ending .json, or .jsonl for "
            "an object in each line."
        )
    if re.match(r"<(!doctype|html|\?xml)", start, re.IGNORECASE):
        raise InputError(f"{path} holds a page of HTML or XML, not one text in a line.")
    return [Record(f"{path}:{number}", line) for number, line in lines]


def _is_structure(text: str) -> bool:
    """Whether a text is a list or an object in JSON, as `[a]` or `{red|blue} ball` are not."""
    if not text.lstrip().startswith(("[", "{")):
        return False
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def _of_json(path: Path, text: str, key: str) -> list[Record]:
    try:
        content = _parsed(text)
    except (ValueError, RecursionError) as error:
        lines = [line.strip() for line in _lines(text) if line.strip()]
        if len(lines) > 1 and lines[0].startswith("{") and lines[0].endswith("}"):
            # Many a program writes JSON Lines under this name.
            return _of_json_lines(path, text, key)
        raise InputError(f"{path} is not JSON: {error}.") from None
    entries = _listed(content, key)
    if entries is None:
        names = f" with {_named(content)}" if isinstance(content, dict) else ""
        raise InputError(
            f"{path} must hold a list of texts or of objects, or an object with one such list, not "
            f"{type(content).__name__}{names}."
        )
    return [Record(f"{path}[{number}]", entry) for number, entry in enumerate(entries)]


def _listed(content: Any, key: str) -> list[Any] | None:
    """The records that a JSON file holds, if it holds any."""
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        return None
    if isinstance(content.get(key), str):
        return [content]
    lists = [value for value in content.values() if isinstance(value, list)]
    return lists[0] if len(lists) == 1 else None


def _of_json_lines(path: Path, text: str, key: str) -> list[Record]:
    records = []
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        try:
            records.append(Record(f"{path}:{number}", _parsed(line)))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number} is not JSON: {error}.") from None
        if isinstance(records[-1].content, str):
            raise InputError(
                f"{path}:{number} has no text under {key!r}: it is a text, not an object; make the "
                "file one list under .json, or write texts without quotes under .txt."
            )
    return records


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which must not name anything twice: one of both would be lost."""
    if twice := _repeated([name for name, _ in pairs]):
        raise ValueError(f"an object names {twice!r} twice")
    return dict(pairs)


def _of_table(path: Path, text: str, separator: str) -> list[Record]:
    """Rows of a table in text; quotes as in RFC 4180. Rows without any cell filled are left out.

    Raises:
        InputError: no header, a name twice in it, or a row that does not fit it.
    """
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        rows = list(_rows(path, text, separator))
    finally:
        csv.field_size_limit(before)
    if not rows:
        return []
    (_, header), *body = rows
    if (twice := _repeated(header)) is not None:
        raise InputError(f"{path}: two columns are named {twice!r}; give each a name of its own.")
    records = []
    for line, cells in body:
        if len(cells) != len(header):
            raise InputError(
                f"{path}:{line} has {len(cells)} cells, but the header {len(header)}: "
                f"{', '.join(map(repr, header))}."
            )
        records.append(Record(f"{path}:{line}", dict(zip(header, cells, strict=True))))
    return records


def _rows(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Line in which a row begins, and its cells."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}:{line} is no row of a table: {error}; a quote within a cell is doubled, and "
            "the cell then stands in quotes."
        ) from None


def _of_parquet(path: Path) -> list[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(
            f"{path}: Parquet needs the extra: pip install 'entroflow[datasets]'"
        ) from None
    if not path.is_file():
        raise InputError(f"there is no prompt file {path}.")
    with path.open("rb") as file:
        _refuse_pointer(path, file.read(len(LFS_POINTER)).decode("latin-1"))
    try:
        # Of this one file: names of folders around it are no columns.
        table = parquet.ParquetFile(path).read()
    except (ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not Parquet, or torn: {reason}") from None
    if (twice := _repeated(table.column_names)) is not None:
        raise InputError(f"{path}: two columns are named {twice!r}; give each a name of its own.")
    return [Record(f"{path}, row {number}", row) for number, row in enumerate(table.to_pylist(), 1)]


def _repeated(names: Sequence[str]) -> str | None:
    """A name that comes more than once, if one does."""
    return next((name for name, number in Counter(names).items() if number > 1), None)


def _named(content: dict[str, Any]) -> str:
    names = [repr(name) for name in content]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing in it"
