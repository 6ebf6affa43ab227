"""A data set by path or by name: files are read by their suffix, all else by `datasets`.

`datasets` keeps what it has read under the last part of its name, and takes from there what it
can't find: the data of another folder with the same name. So what is no name on a hub never gets
there, and what is local is read anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from entroflow.errors import InputError
from entroflow.records import Record, read_records

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = ("arrow", "csv", "json", "parquet", "text")
"""Names that stand for no data set, but for what its files are."""
HUB_NAME = re.compile(r"(hf://datasets/)?[\w.-]+/[\w.-]+")


def read_data_set(
    name: str, config: str | None, split: str, key: str, files: Sequence[str] = ()
) -> list[Record]:
    """All records of a data set.

    Args:
        name, config, split, files: see `load_data_set`.
        key: see `read_records`.

    Raises:
        InputError: there is none, or it can't be read.
        ImportError: `datasets` is needed and missing.
    """
    if os.path.isfile(name):
        if config is not None or split != "train" or files:
            raise InputError(f"{name} is one file: it has no config, split or data_files.")
        return read_records(Path(name), key)
    table = load_data_set(name, config, split, files)
    return [Record(f"{name}[{number}]", dict(row)) for number, row in enumerate(table)]


def load_data_set(name: str, config: str | None, split: str, files: Sequence[str] = ()) -> Dataset:
    """What `datasets.load_dataset` makes of a folder, a format, or a name on the hub.

    Args:
        name: a folder, one of `FORMATS`, or `user/name`.
        config: of the data set, if it has several.
        split: of the data set.
        files: of a format: paths or patterns; else of the data set.

    Raises:
        InputError: there is none, or it can't be read.
        ImportError: `datasets` is missing.
    """
    import datasets

    local = os.path.exists(name) or (name in FORMATS and not any("://" in file for file in files))
    if not local and name not in FORMATS and not HUB_NAME.fullmatch(name):
        raise InputError(
            f"there is no data set {name!r}: neither a file nor a folder is there (it is looked "
            "for beside the recipe and in the current folder), and a name on the hub has the "
            "form user/name."
        )
    with ExitStack() as scratch:
        cache = scratch.enter_context(TemporaryDirectory()) if local else None
        try:
            return datasets.load_dataset(
                name, config, split=split, data_files=list(files) or None, cache_dir=cache,
                keep_in_memory=local,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"can't load the data set {name!r}: {reason}") from error
