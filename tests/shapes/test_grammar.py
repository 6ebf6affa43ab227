"""The language: captions and meanings, held-out splits, label noise."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from entroflow.errors import InputError
from entroflow.shapes import grammar
from entroflow.shapes.grammar import (
    COLORS,
    COUNTS,
    RELATIONS,
    SHAPES,
    SIZES,
    SKILLS,
    SPLITS,
    WORDS,
    Spec,
    Thing,
    draw,
    one_attribute_wrong,
    parse,
    split_forms,
    split_of,
    text,
)

EVERY = [spec for forms in grammar.forms().values() for form in forms for spec in form]
PLURALS = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}


def situation(spec):
    """What a caption asks for, the same for captions that say the same in other words."""
    things, relation = spec.things, spec.relation
    if relation in ("right of", "below"):
        things = things[::-1]
        relation = {"right of": "left of", "below": "above"}[relation]
    return (frozenset(things) if relation is None else things, spec.count, relation)


def stated(spec):
    """Everything a caption states, as a flat dictionary."""
    values = {"count": spec.count if spec.count > 1 else None, "relation": spec.relation}
    for index, thing in enumerate(spec.things):
        values |= {
            ("shape", index): thing.shape,
            ("color", index): thing.color,
            ("size", index): thing.size,
        }
    return {name: value for name, value in values.items() if value is not None}


def changes(spec, other):
    """Names of what differs between two captions of the same form."""
    one, two = stated(spec), stated(other)
    assert one.keys() == two.keys()
    return [name for name in one if one[name] != two[name]]


def test_forms_list_exactly_the_captions_of_the_grammar():
    """Each skill's captions, written out independently from the grammar in words."""
    noun = {False: list(SHAPES), True: [f"{c} {s}" for c in COLORS for s in SHAPES]}

    def pairs(described, joint):
        return {
            f"a {one} {joint} a {two}"
            for one, two in itertools.permutations(described, 2)
            if one.split()[-1] != two.split()[-1]
            and (one.split()[0] != two.split()[0] or one.split()[0] not in COLORS)
        }

    sized = [f"{z} {s}" for z in SIZES for s in SHAPES]
    expected = {
        "single_object": {f"a {s}" for s in [*SHAPES, *sized]},
        "two_object": pairs(SHAPES, "and") | pairs(sized, "and"),
        "counting": {
            f"{n} {c}{PLURALS[s]}"
            for n in ("two", "three", "four")
            for c in ("", *(f"{c} " for c in COLORS))
            for s in SHAPES
        },
        "colors": {f"a {z}{d}" for z in ("", "small ", "large ") for d in noun[True]},
        "position": {caption for r in RELATIONS for d in noun.values() for caption in pairs(d, r)},
        "color_attr": pairs(noun[True], "and"),
    }
    for skill, forms in grammar.forms().items():
        captions = [text(spec) for form in forms for spec in form]
        assert len(set(captions)) == len(captions)
        assert set(captions) == expected[skill]


def test_text_and_parse_are_inverse_on_every_caption():
    assert len(EVERY) == 4620
    for spec in EVERY:
        assert parse(text(spec)) == spec
        assert text(parse(text(spec))) == text(spec)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=11))
def test_a_sentence_of_known_words_is_read_back_or_refused(words):
    """Any sequence of words either is a caption that `text` repeats verbatim, or a ValueError."""
    sentence = " ".join(words)
    try:
        spec = parse(sentence)
    except ValueError:
        return
    assert text(spec) == sentence


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(EVERY), st.data())
def test_case_commas_spaces_and_a_full_stop_do_not_change_the_meaning(spec, data):
    words = text(spec).split()
    gaps = data.draw(st.lists(st.sampled_from([" ", ", ", "  "]), min_size=len(words)))
    written = "".join(w.title() + g for w, g in zip(words, gaps, strict=False)).rstrip(", ")
    assert parse(written + data.draw(st.sampled_from(["", ".", " ."]))) == spec


def test_objects_repeats_a_thing_as_often_as_the_caption_counts():
    for word, count in COUNTS.items():
        assert parse(f"{word} red rings").objects == (Thing("ring", "red"),) * count
    assert parse("a ring above a cross").objects == (Thing("ring"), Thing("cross"))


@pytest.mark.parametrize(
    ("caption", "wrong", "meant"),
    [
        ("a red cirle", "cirle", "circle"),
        ("a gren square", "gren", "green"),
        ("tree circles", "tree", "three"),
        ("a ring abov a cross", "abov", "above"),
        ("a larg triangle", "larg", "large"),
        ("four crossses", "crossses", "crosses"),
    ],
)
def test_a_misspelt_word_is_named_with_the_nearest_known_one(caption, wrong, meant):
    with pytest.raises(ValueError, match=f"no word '{wrong}'.*Did you mean '{meant}'"):
        parse(caption)


@pytest.mark.parametrize("caption", ["a " + 50_000 * "x", 50_000 * "a ", "dragon " * 50_000])
def test_a_message_stays_short_whatever_the_caption(caption):
    with pytest.raises(InputError) as refused:
        grammar.parse(caption)
    assert len(str(refused.value)) < 600
    assert caption[:70] in str(refused.value)


def test_a_word_like_no_known_one_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no word 'xyzzy'.*Known words: a, and, small"):
        parse("a xyzzy")


@pytest.mark.parametrize(
    "caption",
    [
        "",
        " ",
        "a",
        "two",
        "circle",
        "circles",
        "two circle",
        "a circles",
        "a red",
        "a red small circle",
        "a circle and",
        "a circle and ring",
        "and a ring",
        "a circle left a ring",
        "a circle left of",
        "a circle left left a ring",
        "a circle and a ring and a cross",
        "a circle a ring",
        "two circles and a ring",
        "above",
    ],
)
def test_known_words_in_no_grammatical_order_are_refused_with_examples(caption):
    with pytest.raises(ValueError, match=r"can't read .*a small red circle"):
        parse(caption)


# --- splits ---------------------------------------------------------------------------------------


def test_splits_part_the_captions():
    parts = [
        [s for f in split_forms(split).values() for form in f for s in form] for split in SPLITS
    ]
    assert Counter(itertools.chain(*parts)) == Counter(EVERY)
    for split, part in zip(SPLITS, parts, strict=True):
        assert all(split_of(spec) == split for spec in part)


def test_no_meaning_is_in_two_splits():
    """Also not as 'X right of Y' for 'Y left of X', or 'Y and X' for 'X and Y'."""
    where = {}
    for spec in EVERY:
        assert where.setdefault(situation(spec), split_of(spec)) == split_of(spec)
    assert len(where) < len(EVERY)  # some meanings do have two captions


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_every_skill(split):
    forms = split_forms(split)
    assert set(forms) == set(SKILLS)
    assert all(len(form) >= 2 for skill in SKILLS for form in forms[skill])
    assert all(len(forms[skill]) >= 1 for skill in SKILLS)


def test_a_tenth_of_the_meanings_of_each_form_goes_to_either_held_out_split():
    for forms in grammar.forms().values():
        for form in forms:
            split = {situation(spec): split_of(spec) for spec in form}
            share = Counter(split.values())
            if len(split) < 8:
                assert share == {"train": len(split)}
                continue
            assert share["test"] == share["validation"]
            assert abs(share["test"] - 0.1 * len(split)) <= 1


def test_plain_single_objects_are_for_training():
    assert {split_of(parse(f"a {shape}")) for shape in SHAPES} == {"train"}


def test_captions_outside_the_listed_forms_count_as_test():
    assert split_of(parse("a small red circle left of a large blue ring")) == "test"
    assert split_of(parse("two small rings")) == "test"


@pytest.mark.parametrize("split", SPLITS)
def test_draw_takes_skill_then_form_then_caption_uniformly(split):
    """Chi-square on the skills, the forms within a skill, and the captions within a form."""
    rng = np.random.default_rng(3)
    drawn = Counter(draw(rng, split) for _ in range(12000))
    forms = split_forms(split)
    expected = {
        spec: 12000 / len(SKILLS) / len(forms[skill]) / len(form)
        for skill in SKILLS
        for form in forms[skill]
        for spec in form
    }
    assert drawn.keys() <= expected.keys()
    groups = [(skill, form) for skill in SKILLS for form in forms[skill]]
    seen = [sum(drawn[spec] for spec in form) for _, form in groups]
    meant = [12000 / len(SKILLS) / len(forms[skill]) for skill, _ in groups]
    assert stats.chisquare(seen, meant).pvalue > 1e-3
    common = [form for _, form in groups if expected[form[0]] >= 10]
    assert common
    for form in common:
        assert stats.chisquare([drawn[spec] for spec in form]).pvalue > 1e-4


def test_draw_can_be_kept_to_some_skills():
    rng = np.random.default_rng(0)
    drawn = [draw(rng, "test", ["counting", "colors"]).skill for _ in range(200)]
    assert set(drawn) == {"counting", "colors"}


# --- label noise ----------------------------------------------------------------------------------

TRAIN = [spec for spec in EVERY if split_of(spec) == "train"]


def neighbours(spec, split):
    """By brute force: {attribute: captions of the split that differ from `spec` in it alone}."""
    found = {}
    for other in EVERY:
        if other.skill != spec.skill or split_of(other) != split:
            continue
        if stated(other).keys() == stated(spec).keys() and len(changes(spec, other)) == 1:
            found.setdefault(changes(spec, other)[0], []).append(other)
    return found


def test_label_noise_changes_one_attribute_of_any_training_caption_and_stays_in_training():
    """Never a held-out prompt, never another form, never the caption itself."""
    rng = np.random.default_rng(0)
    known = {text(spec) for spec in TRAIN}
    for spec in TRAIN:
        for _ in range(3):
            wrong = one_attribute_wrong(spec, rng)
            assert text(wrong) in known
            assert wrong.skill == spec.skill
            assert len(changes(spec, wrong)) == 1


CAPTIONS = [
    "a red circle left of a blue square",
    "a circle left of a square",
    "a red circle and a blue square",
    "a small circle and a large ring",
    "two red circles",
    "three rings",
    "a red ring",
]


def test_label_noise_reaches_every_training_caption_one_attribute_away():
    """What is drawn is exactly the brute-force set of neighbours; values of one attribute alike."""
    rng = np.random.default_rng(1)
    for caption in CAPTIONS:
        spec = parse(caption)
        allowed = neighbours(spec, "train")
        drawn = Counter(one_attribute_wrong(spec, rng) for _ in range(2000))
        assert set(drawn) == {other for group in allowed.values() for other in group}
        for group in allowed.values():
            if len(group) > 1:
                assert stats.chisquare([drawn[other] for other in group]).pvalue > 1e-4


def test_label_noise_is_uniform_over_the_attributes_that_can_be_wrong():
    """Chi-square over the stated attributes with another value inside the training captions."""
    rng = np.random.default_rng(2)
    for spec in map(parse, CAPTIONS):
        names = list(neighbours(spec, "train"))
        wrong = Counter(changes(spec, one_attribute_wrong(spec, rng))[0] for _ in range(2000))
        assert stats.chisquare([wrong[name] for name in names]).pvalue > 1e-3


def test_label_noise_without_a_split_stays_in_the_grammar():
    rng = np.random.default_rng(4)
    every = set(EVERY)
    splits = set()
    for spec in EVERY[::7]:
        wrong = one_attribute_wrong(spec, rng, None)
        assert wrong in every
        assert len(changes(spec, wrong)) == 1
        splits.add(split_of(wrong))
    assert splits == set(SPLITS)


@pytest.mark.parametrize("spec", EVERY[::200])
def test_attributes_are_those_that_the_caption_states(spec):
    listed = [
        name if name in ("count", "relation") else (name, index)
        for name, index in grammar.attributes(spec)
    ]
    assert Counter(listed) == Counter(stated(spec).keys())


def test_specs_are_values():
    """Equal captions give equal, hashable meanings."""
    assert Spec("colors", (Thing("ring", "red"),)) == parse("a red ring")
    assert len({parse("a red ring"), parse("A red ring.")}) == 1
