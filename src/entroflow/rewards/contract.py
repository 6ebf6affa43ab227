"""The contract with whoever writes a reward, a judge or a monitor, of images or of texts.

What they are given is theirs to change: nobody else sees it. They may return numbers in any form;
here these become float64 on the CPU, NaN where there is none, and anything else is refused in one
line. What they raise is a failure; of images it is masked (scoring.py), of texts it ends the run.
"""

from __future__ import annotations

import numbers
import reprlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entroflow.errors import InputError
from entroflow.prompts import Prompt

LARGEST = torch.finfo(torch.float32).max
"""A larger value counts as infinite: the statistics of its group would overflow."""

# --- what they get --------------------------------------------------------------------------------


def own(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with metadata that may be changed."""
    return [own_prompt(prompt) for prompt in prompts]


def own_prompt(prompt: Prompt) -> Prompt:
    """A prompt with metadata that may be changed, nested ones too."""
    metadata = {key: own_copy(value) for key, value in prompt.metadata.items()}
    return replace(prompt, metadata=metadata)


def own_copy(value: Any) -> Any:
    """A deep copy; what can't be copied, as an open file, is handed over itself."""
    try:
        return deepcopy(value)
    except Exception:
        return value


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within, their code runs without gradients; what it sets for all of torch is set back."""
    device = torch.get_default_device()
    try:
        with _same_type, torch.no_grad():
            yield
    finally:
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)


class _SameType:
    """When the last has left, the default type is the one from before the first came in.

    Unlike the gradient mode and the default device, it is not a thread's own.
    """

    def __init__(self) -> None:
        self._one, self._inside, self._before = threading.Lock(), 0, torch.float32

    def __enter__(self) -> None:
        with self._one:
            if not self._inside:
                self._before = torch.get_default_dtype()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._one:
            self._inside -= 1
            if not self._inside:
                torch.set_default_dtype(self._before)


_same_type = _SameType()


# --- what they return -----------------------------------------------------------------------------


def numbers_of(
    returned: object, count: int, who: str, of: str = "image", each: str = "one number"
) -> Tensor:
    """[count] in float64 on the CPU; NaN where there is no number, or one that is not finite.

    Args:
        returned: a tensor or array [count] of any type on any device; or what can be iterated over
            (not a text, mapping or set) and holds numbers, None, and tensors or arrays of one
            element. An iterator is read up to one value too many.
        who: gave it, for messages.
        of: what one number is of, for messages.
        each: what there must be of each, for messages.

    Raises:
        InputError: it is none of that, or not of this number.
    """
    try:
        values = _tensor_of(returned, count)
    except _NotNumbersError as error:
        raise InputError(f"{who} must return {each} per {of}, not {error}.") from None
    if values.shape != (count,):
        raise InputError(
            f"{who} must return {each} per {of}: {count} {of}{'s' * (count != 1)}, but a result "
            f"of shape {tuple(values.shape)}."
        )
    return values.where(values.abs() <= LARGEST, torch.nan)


def number_of(value: object, who: str, of: str) -> float:
    """One number; NaN for none.

    Args:
        of: what it is of, for messages.

    Raises:
        InputError: it is no number.
    """
    try:
        return _number(value)
    except _NotNumbersError as error:
        raise InputError(f"{who} must return a number as its {of}, not {error}.") from None


def shown(value: object) -> str:
    """In one line that is not too long."""
    return " ".join(reprlib.repr(value).split())[:200]


def told(error: BaseException) -> str:
    """What was raised, in one line that is not too long."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(which can't be printed)"
    return f"{type(error).__name__}: {text[:500]}"


class _NotNumbersError(Exception):
    """Says what there is in the place of numbers; none that a user's iterator may raise itself."""


def _tensor_of(returned: Any, count: int) -> Tensor:
    """In float64 on the CPU, of any shape.

    Raises:
        _NotNumbersError: says what it is instead of numbers.
    """
    if isinstance(returned, Tensor):
        if returned.is_complex():
            raise _NotNumbersError("complex numbers")
        # One after the other: some devices know no float64.
        return returned.detach().cpu().to(torch.float64)
    if isinstance(returned, np.ndarray | np.generic) and returned.dtype.kind in "biuf":
        with np.errstate(over="ignore"):
            double = np.ma.asarray(returned).astype(np.float64)
        # Masked elements have no value.
        return torch.from_numpy(np.array(np.ma.filled(double, np.nan)))
    if isinstance(returned, numbers.Number) or getattr(returned, "ndim", 1) != 1:
        return torch.empty(getattr(returned, "shape", ()), device="meta")
    no_list = isinstance(returned, str | bytes | bytearray | Mapping | Set)
    if no_list or not isinstance(returned, Iterable):
        raise _NotNumbersError(shown(returned))
    read = [_number(each) for each in islice(returned, count + 1)]
    # Not where a reward has set the default to be.
    return torch.tensor(read, dtype=torch.float64, device="cpu")


def _number(value: Any) -> float:
    """One value; NaN for none.

    Raises:
        _NotNumbersError: says what it is instead of a number.
    """
    if value is None or value is np.ma.masked or type(value).__name__ == "NAType":
        return np.nan
    one = value
    if isinstance(value, Tensor | np.ndarray) and np.prod(value.shape) == 1:
        one = value.item()
        if one is None:
            return np.nan
    # A text or a date may be convertible, and so is a complex number in numpy: none is meant.
    of_numpy = isinstance(one, np.generic) and one.dtype.kind not in "biuf"
    if not of_numpy and not isinstance(one, str | bytes | bytearray):
        try:
            return float(one)
        except OverflowError:
            return np.nan
        except (TypeError, ValueError, RuntimeError):
            pass
    raise _NotNumbersError(shown(value))
