"""What a recipe names and a run reads, by content: a name stays when its file is edited.

Every checkpoint holds digests of it, and a run is resumed only with the same.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entroflow.component import Component
from entroflow.errors import InputError
from entroflow.evaluation.base import HeldOutEvaluation
from entroflow.policies.base import SAMPLED
from entroflow.prompts import Prompt
from entroflow.rewards.parts import Part

log = logging.getLogger(__name__)

Inputs = Mapping[str, Mapping[str, str]]
"""Key of the recipe -> `of`: the file or name that stands there; `digest` of its content."""


def digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    """Of texts and metadata, in their order."""
    return digest_of_records([prompt.text, prompt.metadata] for prompt in prompts)


def digest_of_records(records: Iterable[Any]) -> str:
    """Of records as JSON or a table holds them, in their order."""
    summary = hashlib.blake2b(digest_size=12)
    for record in records:
        # Surrogates may stand in metadata, which nothing has to encode.
        summary.update(_canonical(record).encode(errors="surrogatepass") + b"\n")
    return summary.hexdigest()


def digest_of_file(path: Path) -> str:
    """Of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=12)).hexdigest()


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes and a sample of the values."""
    summary = hashlib.blake2b(digest_size=12)
    for key, tensor in sorted(tensors.items()):
        sample = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // SAMPLED)]
        summary.update(f"{key} {tuple(tensor.shape)}".encode())
        summary.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return summary.hexdigest()


def files_of(component: Any, where: str) -> dict[str, dict[str, str]]:
    """The files that a component and its parts read, as inputs.

    Args:
        where: key of the component in the recipe.
    """
    if not isinstance(component, Component):
        return {}
    inputs: dict[str, dict[str, str]] = {}
    for key in component.read_from:
        path = getattr(component, key)
        if isinstance(path, Path) and path.is_file():
            inputs[f"{where}.{key}"] = {"of": str(path), "digest": digest_of_file(path)}
    for key, part in _parts_of(component, where):
        inputs |= files_of(part, key)
    return inputs


def check_parts(component: Any, where: str) -> None:
    """Let a component and its parts read what they will need; see `Component.check`.

    Args:
        where: key of the component in the recipe.

    Raises:
        InputError: a file is missing or wrong; the message says of which part.
    """
    if not isinstance(component, Component):
        return
    try:
        component.check()
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(where) else f"{where}: {message}") from None
    for key, part in _parts_of(component, where):
        check_parts(part, key)


def _parts_of(component: Component, where: str) -> Iterator[tuple[str, Any]]:
    """The parts of a component, by their keys in the recipe."""
    for key in component.parts:
        part = getattr(component, key)
        named = part if isinstance(part, Mapping) else {"": part}
        for name, each in named.items():
            reward = each.reward if isinstance(each, Part) else each
            yield f"{where}.{key}.{name}".rstrip("."), reward


def held_out_of(evaluation: Any) -> dict[str, dict[str, str]]:
    """The held-out prompts that an evaluation reads from a file, as inputs."""
    if not isinstance(evaluation, HeldOutEvaluation) or evaluation.prompts_from is None:
        return {}
    of = str(getattr(evaluation, evaluation.prompts_from))
    return {
        f"evaluation, {split}": {"of": of, "digest": digest_of_prompts(prompts)}
        for split, prompts in evaluation.held_out().items()
    }


def code_of(resolved: Any) -> dict[str, dict[str, str]]:
    """The modules that dotted paths of a resolved recipe name, by those paths, as inputs.

    What such a module imports in turn is not looked at.
    """
    if not isinstance(resolved, Mapping):
        return {}
    kind = resolved.get("type")
    modules = module_of(kind) if isinstance(kind, str) and "." in kind else {}
    for part in resolved.values():
        modules |= code_of(part)
    return modules


def module_of(path: str) -> dict[str, dict[str, str]]:
    """The module that a dotted path leads to, by that path, as an input.

    Nothing is imported: of a module that is not loaded, or has no file, there is none.
    """
    module = sys.modules.get(path.rpartition(".")[0])
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        return {}
    return {path: {"of": file, "digest": digest_of_file(Path(file))}}


def warn_of_changed_code(before: Inputs, now: Inputs, checkpoint: Path) -> None:
    """Warn where code that a recipe names was changed: it may be a fault that was mended."""
    for key in sorted(before.keys() & now.keys()):
        if before[key]["digest"] != now[key]["digest"]:
            log.warning(
                "%s: %s was changed since %s; the run goes on with what is there now.",
                key, now[key]["of"], checkpoint,
            )  # fmt: skip


def check_inputs(before: Inputs | None, now: Inputs, checkpoint: Path) -> None:
    """Compare what a checkpoint was trained with with what is there now.

    Args:
        before: None where a checkpoint of an older version does not say; that is warned of.

    Raises:
        InputError: something differs, or is gone.
    """
    if before is None:
        if now:
            log.warning(
                "%s is of an older version, which kept no digests: whether prompts and other files "
                "have changed since can't be told.",
                checkpoint,
            )
        return
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if old is None or new is None or old["digest"] != new["digest"]:
            of = (new or old or {})["of"]
            raise InputError(
                f"{key}: what {of} holds is not what {checkpoint} was trained with; restore it to "
                "go on, or start a new run."
            )


def _canonical(value: Any) -> str:
    """A text that is the same for equal values, in every process."""
    if isinstance(value, Mapping):
        entries = sorted((_canonical(str(key)), _canonical(each)) for key, each in value.items())
        return "{" + ",".join(f"{key}:{each}" for key, each in entries) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_canonical, value)) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ",".join(sorted(map(_canonical, value))) + "}"
    if value is None or isinstance(value, str | bool | int | float | bytes | Decimal | date | time):
        return repr(value)
    # Others, as pictures, may print where they lie in memory.
    return f"<{type(value).__name__}>"
