"""All prompts are looked at before a run: tokens, repetitions, and what is on both sides."""

from __future__ import annotations

import random
import re

import pytest
import torch

import entroflow
from entroflow.checks.doctor import Verdict, examine
from entroflow.errors import InputError
from entroflow.evaluation.prompt_checks import remarks_on_prompts, remarks_on_texts, same
from entroflow.evaluation.reward import RewardEvaluation
from entroflow.policies.base import Reading
from entroflow.prompts import TextPrompts
from entroflow.recipe.load import load_recipe
from entroflow.shapes import grammar
from entroflow.shapes.prompts import ShapesPrompts
from tiny_run import PixelPolicy, train

LIMITS = {"short": 3, "long": 5}


class Reader(PixelPolicy):
    """Reads words with two encoders, and can't read Greek."""

    def readings(self, prompts):
        if any("α" in prompt for prompt in prompts):
            raise InputError("there is Greek in 'α'.")
        counts = [len(prompt.split()) for prompt in prompts]
        return [Reading(name, limit, counts) for name, limit in LIMITS.items()]


def written(path, texts):
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def remarks(tmp_path, trained, held_out, policy=None):
    source = TextPrompts(path=written(tmp_path / "train.txt", trained))
    evaluation = RewardEvaluation(path=written(tmp_path / "held_out.txt", held_out))
    return remarks_on_prompts(source, evaluation, policy or Reader())


def test_nothing_is_said_of_prompts_that_are_well(tmp_path):
    assert remarks(tmp_path, ["a b c", "d"], ["e", "f", "g", "h"]) == []
    assert remarks(tmp_path, ["a b c d e f"], ["e", "f", "g", "h"], PixelPolicy()) == []


def test_prompts_that_are_cut_are_counted_by_encoder_and_kind(tmp_path):
    source = random.Random(0)
    texts = [" ".join(f"w{n}x{i}" for i in range(source.randrange(1, 8))) for n in range(60)]
    trained, held_out = texts[:40], texts[40:]
    found = remarks(tmp_path, trained, held_out)
    assert len(found) == 2
    for line, (name, limit) in zip(found, LIMITS.items(), strict=True):
        cut = [[t for t in kind if len(t.split()) > limit] for kind in (trained, held_out)]
        longest = max(texts, key=lambda text: len(text.split()))
        assert line.startswith(
            f"{len(cut[0])} of 40 training prompts and {len(cut[1])} of 20 held-out prompts have "
            f"more than the {limit} tokens that {name} reads"
        )
        assert f"the longest has {len(longest.split())}: " in line


@pytest.mark.parametrize(("trained", "held_out"), [(["a α"], "efgh"), (["a"], ["α", *"fgh"])])
def test_a_prompt_that_can_not_be_read_is_refused(tmp_path, trained, held_out):
    kind = "training" if "α" in trained[0] else "held-out"
    with pytest.raises(InputError, match=f"{kind} prompts: there is Greek"):
        remarks(tmp_path, trained, held_out)


def test_repetitions_and_overlaps_are_counted_whatever_case_and_spaces():
    """Against counting by hand, letter by letter."""
    source = random.Random(1)

    def dressed(letter):
        upper = source.choice([letter, letter.upper()])
        return source.choice([upper, f" {upper}", f"{upper}  x".replace("  x", " ")])

    for _ in range(30):
        sides = {
            name: [source.choice("abcdefghij") for _ in range(source.randrange(1, 9))]
            for name in ("trained", "validation", "test")
        }
        shown = {name: [dressed(letter) for letter in letters] for name, letters in sides.items()}
        trained, validation, test = sides.values()
        found = "\n".join(
            remarks_on_texts(
                shown["trained"], {"validation": shown["validation"], "test": shown["test"]}
            )
        )
        counts = [sum(letter in trained for letter in held) for held in (validation, test)]
        both = sum(letter in validation for letter in test)
        repeated = len(set(trained)) < len(trained)
        assert (f"of {len(trained)} training prompts {len(set(trained))} are" in found) == repeated
        assert ("are trained on" in found) == any(counts)
        for number, held, split in zip(
            counts, (validation, test), ("validation", "test"), strict=True
        ):
            assert (f"{number} of {len(held)} for the {split}" in found) == (number > 0)
        assert (f"{both} of {len(test)} prompts for the test are among" in found) == (both > 0)


def test_what_counts_as_the_same_prompt():
    assert same("A  Red\tBall ") == same("a red ball")
    assert same("Cafe\u0301") == same("CAFÉ") == same("café")
    assert same("a red ball") != same("a red ball.")


def test_captions_of_the_shapes_world_are_held_out_too(tmp_path):
    recipe = load_recipe("quickstart")
    (validation, *_), (test, *_) = recipe.evaluation.held_out().values()
    path = written(tmp_path / "train.txt", [validation.text, test.text.upper(), "a blue ring"])
    assert grammar.split_of(grammar.parse("a blue ring")) == "train"
    (line,) = remarks_on_prompts(TextPrompts(path=path), recipe.evaluation, PixelPolicy())
    assert re.search(r"1 of \d+ for the validation, 1 of \d+ for the test", line)
    assert remarks_on_prompts(ShapesPrompts(), recipe.evaluation, recipe.policy.build()) == []


def test_a_caption_outside_the_grammar_is_found_before_the_run(tmp_path):
    """The last of many, which the first iterations would not have come to; held-out ones too."""
    fine = ["a red circle", "a blue ring", "a green square", "two red circles"]
    path = written(tmp_path / "train.txt", [*fine * 5, "a red zebra"])
    kept = written(tmp_path / "held_out.txt", fine)
    changes = ["prompts.type=text", "evaluation.type=reward", "prompts.per_iteration=1"]
    for wrong in ("train", "held_out"):
        chosen = {"prompts": path if wrong == "train" else kept}
        chosen["evaluation"] = kept if wrong == "train" else path
        files = [f"{section}.path={file}" for section, file in chosen.items()]
        with pytest.raises(InputError, match="no word 'zebra'"):
            entroflow.train("quickstart", [*changes, *files], run=tmp_path / "run")
        assert not (tmp_path / "run").exists()
    findings = examine(load_recipe("quickstart", [*changes, *files]))
    finding = next(each for each in findings if each.check == "prompts")
    assert finding.verdict is Verdict.FAILED
    assert "zebra" in finding.said


def sections(tmp_path, trained, held_out):
    return {
        "prompts": {"type": "text", "path": str(written(tmp_path / "train.txt", trained))},
        "evaluation": {
            "type": "reward", "path": str(written(tmp_path / "held_out.txt", held_out)),
            "images": 4, "test_images": 4, "steps": 2, "guidance_tried": [1.0],
        },
        "run": {"iterations": 1},
    }  # fmt: skip


def test_train_warns_once_and_goes_on(tmp_path, caplog):
    given = sections(tmp_path, ["a", "b", "b", "one two three four"], ["A", "x", "z", "y"])
    train(tmp_path / "run", policy=Reader(), **given)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("1 of 4 training prompts have more than the 3 tokens" in line for line in lines) == 1
    assert sum("of 4 training prompts 3 are different" in line for line in lines) == 1
    assert sum("1 of 2 for the validation (as 'A')" in line for line in lines) == 1
    assert not any("for the test are among" in line for line in lines)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_what_a_pipeline_is_said_to_cut_does_not_reach_it(folders, kind):
    """A prompt is as long as is said if its last letter counts just up to the limit.

    CLIP alone makes the pooled embedding, and T5 alone the last tokens of the others.
    """
    pytest.importorskip("diffusers")
    from entroflow.policies.diffusers.flux import FluxConfig
    from entroflow.policies.diffusers.sd3 import SD3Config

    config = {"sd3": SD3Config, "flux": FluxConfig}[kind]
    policy = config(model=str(folders[kind]), resolution=32, tokens=24, precision="fp32").build()
    seen = {"CLIP": set(), "T5": set()}
    by_length = {}
    for letter in "abcdefghijklmnop":
        lengths = tuple(r.tokens[0] for r in policy.readings([letter]))
        by_length.setdefault(lengths, []).append(letter)
    last = by_length[min(lengths for lengths, letters in by_length.items() if len(letters) > 1)]
    for words in range(1, 90):
        texts = [f"{'a ' * words}{letter}" for letter in last[:2]]
        near = [r for r in policy.readings(texts) if abs(r.tokens[0] - r.limit) <= 2]
        if not near:
            continue
        cond = policy.encode(texts).tensors
        made = {"CLIP": cond["pooled"], "T5": cond["embedded"][:, -24:]}
        for reading in near:
            assert reading.limit == {"CLIP": 77, "T5": 24}[reading.encoder]
            assert reading.tokens[0] == reading.tokens[1]
            one, other = made[reading.encoder]
            assert torch.equal(one, other) == (reading.tokens[0] > reading.limit)
            seen[reading.encoder].add(reading.tokens[0] > reading.limit)
    assert seen == {"CLIP": {True, False}, "T5": {True, False}}
