"""The language of the shapes world: what a caption can say, and which captions are held out.

Captions come from a small grammar over the six skills of GenEval (Ghosh et al., 2023)::

    single_object   a [small|large] circle
    two_object      a [size] circle and a [size] ring
    counting        three [red] circles
    colors          a [size] red circle
    position        a [red] circle left of a [blue] square
    color_attr      a red circle and a blue square

Vocabulary used here: a `Thing` is one object as a caption describes it (shape, perhaps colour and
size); a `Spec` is the meaning of a caption (skill, things, count, relation); `text(spec)` and
`parse(text)` are inverse to each other.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal

import numpy as np

from entroflow.errors import InputError

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "black")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"two": 2, "three": 3, "four": 4}
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}

SKILLS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT_SHARE = 0.1
"""Share of the meanings of each caption form that goes to validation, and again to test."""
QUOTED = 80
"""Most characters of a caption in a message."""

WORDS = (
    "a",
    "and",
    *SIZES,
    *COLORS,
    *SHAPES,
    *PLURALS.values(),
    *COUNTS,
    "left",
    "right",
    "of",
    "above",
    "below",
)


@dataclass(frozen=True)
class Thing:
    """One object as a caption describes it; `None` means the caption leaves it open."""

    shape: str
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Spec:
    """The meaning of a caption: one or two things, or `count` times the same thing."""

    skill: str
    things: tuple[Thing, ...]
    count: int = 1
    relation: str | None = None

    @property
    def objects(self) -> tuple[Thing, ...]:
        """Every object the scene must hold: the things, repeated `count` times."""
        return self.things * self.count


def text(spec: Spec) -> str:
    """The caption of `spec`."""
    if spec.count > 1:
        thing = spec.things[0]
        number = next(word for word, count in COUNTS.items() if count == spec.count)
        return " ".join(filter(None, (number, thing.size, thing.color, PLURALS[thing.shape])))
    joint = f" {spec.relation or 'and'} "
    return joint.join(
        " ".join(filter(None, ("a", thing.size, thing.color, thing.shape))) for thing in spec.things
    )


def parse(caption: str) -> Spec:
    """The meaning of a caption.

    Raises:
        InputError: the caption is outside the grammar; the message names the word and the nearest
            known one.
    """
    words = caption.lower().replace(",", " ").rstrip(". ").split()
    for word in words:
        if word not in WORDS:
            near = get_close_matches(word, WORDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known words: {', '.join(WORDS)}."
            raise InputError(
                f"the shapes world has no word {_quoted(word)} (in {_quoted(caption)}).{hint}"
            )
    try:
        return _parse_words(words)
    except (IndexError, KeyError, ValueError):
        raise InputError(
            f"the shapes world can't read {_quoted(caption)}. Captions look like "
            "'a small red circle', 'three blue rings', 'a ring and a large cross', "
            "'a red circle left of a blue square'."
        ) from None


def _quoted(words: str) -> str:
    """In quotes, and no longer than a line of a message has room for."""
    return repr(words if len(words) <= QUOTED else f"{words[:QUOTED]}…")


def _parse_words(words: list[str]) -> Spec:
    if words[0] in COUNTS:
        singular = {plural: shape for shape, plural in PLURALS.items()}
        thing = _parse_thing([*words[1:-1], singular[words[-1]]])
        return Spec("counting", (thing,), count=COUNTS[words[0]])
    relation = None
    joint = next((i for i, word in enumerate(words) if word in _JOINTS), None)
    if joint is None:
        groups = [words]
    else:
        width = 2 if words[joint] in ("left", "right") else 1
        relation = " ".join(words[joint : joint + width])
        groups = [words[:joint], words[joint + width :]]
    things = []
    for group in groups:
        if group[0] != "a":
            raise ValueError(group)
        things.append(_parse_thing(group[1:]))
    colored = any(thing.color for thing in things)
    if relation is None:
        return Spec("colors" if colored else "single_object", tuple(things))
    if relation == "and":
        return Spec("color_attr" if colored else "two_object", tuple(things))
    if relation not in RELATIONS:
        raise ValueError(relation)
    return Spec("position", tuple(things), relation=relation)


_JOINTS = ("and", "left", "right", "above", "below")


def _parse_thing(words: list[str]) -> Thing:
    size = color = None
    *described, shape = words
    if described and described[0] in SIZES:
        size = described.pop(0)
    if described and described[0] in COLORS:
        color = described.pop(0)
    if described or shape not in SHAPES:
        raise ValueError(words)
    return Thing(shape, color, size)


# --- forms: how the captions of a skill look --------------------------------------------------
# A skill has one or more forms (position: with and without colours). Prompts are drawn by form
# first, so that a form with thousands of captions does not drown one with forty.


def _things(colors: Sequence[str | None], sizes: Sequence[str | None]) -> list[Thing]:
    return [Thing(s, c, z) for s, c, z in itertools.product(SHAPES, colors, sizes)]


def _pairs(things: list[Thing]) -> Iterator[tuple[Thing, Thing]]:
    """Ordered pairs that differ in shape and, where colours are named, in colour."""
    for one, other in itertools.permutations(things, 2):
        if one.shape != other.shape and (one.color is None or one.color != other.color):
            yield one, other


@cache
def forms() -> dict[str, tuple[tuple[Spec, ...], ...]]:
    """Every caption of every skill, form by form."""
    none = (None,)
    plain, sized = _things(none, none), _things(none, SIZES)
    colored, colored_sized = _things(COLORS, none), _things(COLORS, SIZES)
    return {
        "single_object": (
            tuple(Spec("single_object", (t,)) for t in plain),
            tuple(Spec("single_object", (t,)) for t in sized),
        ),
        "two_object": (
            tuple(Spec("two_object", pair) for pair in _pairs(plain)),
            tuple(Spec("two_object", pair) for pair in _pairs(sized)),
        ),
        "counting": (
            tuple(Spec("counting", (t,), count=n) for t in plain for n in COUNTS.values()),
            tuple(Spec("counting", (t,), count=n) for t in colored for n in COUNTS.values()),
        ),
        "colors": (
            tuple(Spec("colors", (t,)) for t in colored),
            tuple(Spec("colors", (t,)) for t in colored_sized),
        ),
        "position": (
            tuple(Spec("position", p, relation=r) for p in _pairs(plain) for r in RELATIONS),
            tuple(Spec("position", p, relation=r) for p in _pairs(colored) for r in RELATIONS),
        ),
        "color_attr": (tuple(Spec("color_attr", pair) for pair in _pairs(colored)),),
    }


def _meaning(spec: Spec) -> str:
    """One key for all captions that mean the same ("X left of Y" is "Y right of X")."""
    if spec.relation in ("right of", "below"):
        opposite = {"right of": "left of", "below": "above"}[spec.relation]
        return text(replace(spec, things=spec.things[::-1], relation=opposite))
    if len(spec.things) == 2 and spec.relation is None:
        return min(text(spec), text(replace(spec, things=spec.things[::-1])))
    return text(spec)


@cache
def split_forms(split: Split) -> dict[str, tuple[tuple[Spec, ...], ...]]:
    """The captions of one split, by skill and form. Meanings, not only strings, are disjoint.

    The plain form of `single_object` (five captions: "a circle") belongs to training alone: it
    teaches what the words mean.
    """
    return {
        skill: tuple(
            chosen
            for form in skill_forms
            if (chosen := tuple(spec for spec in form if split_of(spec) == split))
        )
        for skill, skill_forms in forms().items()
    }


@cache
def _split_by_meaning() -> dict[str, Split]:
    table: dict[str, Split] = {}
    for skill_forms in forms().values():
        for form in skill_forms:
            meanings = sorted({_meaning(spec) for spec in form}, key=_digest)
            held_out = 0 if len(meanings) < 8 else max(2, round(HELD_OUT_SHARE * len(meanings)))
            for position, meaning in enumerate(meanings):
                first_test = position < held_out
                first_validation = position < 2 * held_out
                table[meaning] = (
                    "test" if first_test else "validation" if first_validation else "train"
                )
    return table


def _digest(meaning: str) -> bytes:
    return hashlib.blake2b(meaning.encode(), digest_size=8).digest()


def split_of(spec: Spec) -> Split:
    """The split a caption belongs to; captions outside the listed forms count as test."""
    return _split_by_meaning().get(_meaning(spec), "test")


def draw(rng: np.random.Generator, split: Split, skills: Sequence[str] = SKILLS) -> Spec:
    """One caption: skill, then form, then caption, each uniformly."""
    skill_forms = split_forms(split)[skills[int(rng.integers(len(skills)))]]
    form = skill_forms[rng.integers(len(skill_forms))]
    return form[rng.integers(len(form))]


# --- label noise ------------------------------------------------------------------------------


def attributes(spec: Spec) -> list[tuple[str, int]]:
    """The attributes a caption states, as (name, index of the thing)."""
    found: list[tuple[str, int]] = []
    for index, thing in enumerate(spec.things):
        found += [
            (name, index) for name in ("shape", "color", "size") if getattr(thing, name) is not None
        ]
    if spec.count > 1:
        found.append(("count", 0))
    if spec.relation:
        found.append(("relation", 0))
    return found


def one_attribute_wrong(
    spec: Spec, rng: np.random.Generator, split: Split | None = "train"
) -> Spec:
    """A caption that differs from `spec` in one attribute, uniform over the attributes it states.

    The result stays inside the grammar and, unless `split` is None, inside `split`: label noise
    must not leak a held-out prompt into pretraining. An attribute none of whose other values allow
    that is left out.

    Raises:
        ValueError: no attribute can be changed.
    """
    neighbours = _neighbours(spec, split)
    if not neighbours:
        raise ValueError(f"{text(spec)!r} has no neighbour in the grammar and split {split}.")
    values = neighbours[int(rng.integers(len(neighbours)))]
    return values[int(rng.integers(len(values)))]


@cache
def _neighbours(spec: Spec, split: Split | None) -> tuple[tuple[Spec, ...], ...]:
    """Per attribute that `spec` states, the allowed captions that differ in it alone."""
    listed = _split_by_meaning()
    by_attribute = (
        tuple(
            other
            for other in _with_other_values(spec, name, index)
            if _meaning(other) in listed and split in (None, split_of(other))
        )
        for name, index in attributes(spec)
    )
    return tuple(values for values in by_attribute if values)


def _with_other_values(spec: Spec, name: str, index: int) -> Iterator[Spec]:
    every: dict[str, Sequence[str | int]] = {
        "shape": SHAPES,
        "color": COLORS,
        "size": SIZES,
        "count": tuple(COUNTS.values()),
        "relation": RELATIONS,
    }
    of_spec = name in ("count", "relation")
    present = getattr(spec if of_spec else spec.things[index], name)
    for value in every[name]:
        change: dict[str, Any] = {name: value}
        if value == present:
            continue
        if of_spec:
            yield replace(spec, **change)
        else:
            things = list(spec.things)
            things[index] = replace(things[index], **change)
            yield replace(spec, things=tuple(things))
