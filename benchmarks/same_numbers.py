"""Does a change of the code leave every number as it is?

    python benchmarks/same_numbers.py write FILE --pipelines FOLDER [--only NAME ...]
    python benchmarks/same_numbers.py compare BEFORE AFTER [--renamed OLD=NEW ...]

`write` trains by every shipped recipe, cut to two iterations of four prompts (groups as in the recipe):
on the embedded model, and for SD3.5 and FLUX on tiny random pipelines of the same classes; then small
language models with each clip. Of each it keeps the metrics without seconds, and a digest of the live
and the EMA weights: minutes on one core. The pipelines are made in the folder where it lacks them, and
must be the same for both files: their tokenizers come out differently in every process. `compare` holds
two such files against each other to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from entroflow.recipe.load import chosen_type, shipped_recipes
from entroflow.rewards.base import Status
from entroflow.rewards.preferences.models import Answers
from entroflow.runs.folder import RunFolder
from entroflow.training.launch import train
from entroflow.writing import write_text

SMALL = (
    "run.iterations=2", "run.evaluate_every=1", "prompts.per_iteration=4", "evaluation.images=8",
    "evaluation.test_images=8", "evaluation.steps=4", "evaluation.guidance_tried=[]",
)  # fmt: skip
EMBEDDED = ("evaluation.images=24", "evaluation.test_images=24", "evaluation.prompts_per_skill=4")
WITHOUT = ("seconds", "step_time", "recipe_hash", "version")
"""Keys, or parts of them, that may differ between two runs of the same code."""
CLIPS = ("none", "b", "v")


class ByBrightness:
    """A judge that prefers the brighter of two images."""

    def compare(self, images: Tensor, sides: Tensor, prompts: Sequence[Any]) -> Answers:
        """See `Judge`."""
        level = images.flatten(1).double().mean(dim=1)
        first, second = sides.unbind(1)
        points = 0.5 + 0.5 * (level[first] - level[second]).sign()
        return Answers(points, (Status.OK,) * len(sides))


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    """A reward that any image has."""
    values: list[float] = images.flatten(1).double().mean(dim=1).tolist()
    return values


def changes(name: str, pipelines: Mapping[str, Path]) -> list[str]:
    """Overrides that make a shipped recipe small."""
    policy = chosen_type(name, "policy") or "shapes"
    if policy not in pipelines:
        return [*SMALL, *EMBEDDED]
    here = Path(__file__).stem
    overrides = [*SMALL, f"policy.model={pipelines[policy]}", "policy.resolution=32"]
    reward = chosen_type(name, "reward")
    if reward == "pairwise":
        overrides += [f"reward.judge={{type: {here}.ByBrightness}}", "monitors.rewards={}"]
    elif reward == "mixture":
        overrides += [
            f"reward.rewards.preference.judge={{type: {here}.ByBrightness}}",
            f"reward.rewards.clip={{type: {here}.brightness}}",
        ]
    return overrides


def digest(file: Path) -> str:
    """Of all tensors in a file, with their names."""
    summary = hashlib.blake2b(digest_size=12)
    for key, tensor in sorted(load_file(file).items()):
        summary.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        summary.update(tensor.contiguous().view(-1).numpy().tobytes())
    return summary.hexdigest()


def numbers_of(folder: RunFolder) -> dict[str, Any]:
    """What must stay the same of a run."""
    lines = [
        {key: value for key, value in line.items() if not any(part in key for part in WITHOUT)}
        for line in folder.metrics()
    ]
    weights = {
        file.stem: digest(file)
        for file in sorted(folder.latest().glob("*.safetensors"))
        if file.stem != "optimizer"
    }
    return {"metrics": lines, "weights": weights}


def runs(scratch: Path, made: Path, only: Sequence[str]) -> Iterator[tuple[str, RunFolder]]:
    """Every run, by its name.

    Args:
        scratch: folder for the runs.
        made: folder of the tiny pipelines.
    """
    from entroflow.llm import recipe as llm_recipe
    from entroflow.llm.run import train as train_llm
    from entroflow.policies.diffusers.stand_ins import STAND_INS

    pipelines = {kind: made / kind for kind in STAND_INS}
    for kind, place in pipelines.items():
        if not place.exists():
            STAND_INS[kind]().save_pretrained(place)
    for name in sorted(shipped_recipes()):
        if not only or name in only:
            yield name, train(name, changes(name, pipelines), run=scratch / name)
    for clip in CLIPS:
        if not only or f"countdown_{clip}" in only:
            recipe = llm_recipe.load("countdown", [
                "run.updates=2", f"clip.type={clip}", "evaluation.problems=8", "evaluation.each=2",
                "trainer.per_device_train_batch_size=64", "evaluation.every=1",
            ])  # fmt: skip
            yield f"countdown_{clip}", train_llm(recipe, scratch / f"countdown_{clip}")


def differences(before: Any, after: Any, renamed: Mapping[str, str], where: str) -> Iterator[str]:
    """Where two values of JSON differ, keys under their new names."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        old = {renamed.get(key, key): value for key, value in before.items()}
        for key in sorted({*old, *after}):
            if key not in old or key not in after:
                yield f"{where}.{key} is {'new' if key in after else 'gone'}"
            else:
                yield from differences(old[key], after[key], renamed, f"{where}.{key}")
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{where}: {len(after)} entries instead of {len(before)}"
        for number, (one, other) in enumerate(zip(before, after, strict=False)):
            yield from differences(one, other, renamed, f"{where}[{number}]")
    elif before != after and not _both_nan(before, after):
        yield f"{where}: {after!r} instead of {before!r}"


def _both_nan(one: Any, other: Any) -> bool:
    return all(isinstance(value, float) and math.isnan(value) for value in (one, other))


def write(out: Path, made: Path, only: Sequence[str]) -> None:
    """Make the runs, and keep their numbers."""
    kept: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in runs(Path(scratch), made, only):
            kept[name] = numbers_of(folder)
            print(name, *kept[name]["weights"].values(), flush=True)
            write_text(out, json.dumps(kept, indent=1) + "\n")


def compare(before: Path, after: Path, renamed: Mapping[str, str]) -> int:
    """Print a table of the runs; 1 if anything differs, else 0."""
    one, other = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    failed = False
    for name in sorted({*one, *other}):
        if name not in one or name not in other:
            print(f"{name:28} only {'before' if name in one else 'after'}")
            failed = True
            continue
        apart = list(differences(one[name], other[name], renamed, ""))
        count = sum(len(line) for line in other[name]["metrics"])
        print(f"{name:28} {count:5} numbers  {'the same' if not apart else 'DIFFERENT'}")
        for line in apart[:5]:
            print(f"    {line}")
        failed = failed or bool(apart)
    return int(failed)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("out", type=Path)
    writing.add_argument("--pipelines", type=Path, required=True)
    writing.add_argument("--only", nargs="*", default=[])
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--renamed", nargs="*", default=[])
    options = parser.parse_args()
    if options.command == "write":
        write(options.out, options.pipelines, options.only)
    else:
        renamed = dict(each.split("=", 1) for each in options.renamed)
        sys.exit(compare(options.before, options.after, renamed))


if __name__ == "__main__":
    # The judge and the reward of this file are found by its name.
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    main()
