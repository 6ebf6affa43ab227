"""Measure the shipped base weights and write their model card.

    python benchmarks/model_card.py --minutes MINUTES_OF_PRETRAINING [--images 384]

Writes docs/claims/base_model.json (raw results), docs/images/base_model.png (samples) and
src/entroflow/policies/shapes/MODEL_CARD.md.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from entroflow import pictures
from entroflow.evaluation.base import HeldOutEvaluation
from entroflow.evaluation.base_and_tuned import summary_of
from entroflow.evaluation.shapes import ShapesEvaluation
from entroflow.policies.shapes.policy import WEIGHTS, ShapesPolicyConfig
from entroflow.policies.shapes.pretrain import Pretraining
from entroflow.rewards.combined import as_rewards
from entroflow.rewards.shapes import ShapesReward
from entroflow.shapes.grammar import SKILLS

ROOT = Path(__file__).parents[1]
STEPS = (10, 30)


def measure(images: int) -> dict:
    """Scores by split, guidance scale and number of steps; saves the sample grid."""
    policy = ShapesPolicyConfig().build()
    results = []
    settings = [("validation", 10, scale) for scale in HeldOutEvaluation().guidance_tried]
    settings += [("test", steps, 1.0) for steps in STEPS]
    for split, steps, guidance in settings:
        evaluation = ShapesEvaluation(split=split, steps=steps, guidance=guidance, images=images)
        found = evaluation.run(policy, seed=1, batch_size=64, reward=as_rewards(ShapesReward()))
        results.append({"split": split, "steps": steps, "guidance": guidance, **summary_of(found)})
        print(split, steps, guidance, found.scores["overall"], flush=True)
        if split == "test" and steps == STEPS[0]:
            sheet = pictures.grid(found.images, 6, found.captions, found.passed)
            pictures.save(sheet, ROOT / "docs" / "images" / "base_model.png")
    return {
        "parameters": sum(p.numel() for p in policy.network.parameters()),
        "bytes": WEIGHTS.stat().st_size,
        "digest": policy.weights.digest("live"),
        "results": results,
    }


def card(measured: dict) -> str:
    """The model card as Markdown."""
    settings = Pretraining()
    phases = [
        f"| {phase.steps} | {phase.learning_rate:g} | {phase.label_noise:.0%} "
        f"| {'all' if phase.skills == SKILLS else ', '.join(f'`{skill}`' for skill in phase.skills)} "
        f"| {1 / (1 + math.exp(-phase.noisiness)):.2f} |"
        for phase in settings.phases
    ]
    lines = [
        "# Model card: the embedded base model",
        "",
        f"A text-to-image flow model of {measured['parameters'] / 1e6:.2f} million parameters for the "
        "shapes world (32x32 RGB): an MM-DiT of four blocks of width 128 on 4x4 patches, between "
        "convolutions at full resolution. Captions are up to ten words of the package's own grammar.",
        "",
        "- **Purpose**: a base to post-train on a laptop. It knows how to draw, and follows captions "
        "imperfectly on purpose. It is of no use for anything else.",
        "- **Data**: scenes rendered on the fly from training captions alone; "
        f"{settings.caption_dropout:.0%} of the captions are left out, and of the others a share (label "
        "noise) is wrong in one attribute, uniform over the attributes stated. Validation and test "
        "prompts never occur.",
        f"- **Training**: rectified flow with Muon and AdamW, {settings.steps} steps of batch "
        f"{settings.batch} in the phases below, each with a warm-up of {settings.warm_up} steps and a "
        f"cosine to zero; moving average {settings.ema:g}, bfloat16 products; "
        f"{measured['pretraining_minutes']:.0f} minutes on two CPU cores.",
        "- **Make it again**: `entroflow pretrain shapes --folder base`.",
        f"- **Weights**: `base.safetensors`, float16, {measured['bytes'] / 1e6:.1f} MB, "
        f"digest `{measured['digest']}`.",
        "",
        "| steps | learning rate | label noise | skills | median sigma |",
        "|---|---|---|---|---|",
        *phases,
        "",
        "The first phase teaches which object stands on which side: that is settled at much noise, "
        "where little of the loss of the others arises.",
        "",
        "## Scores",
        "",
        "Strict score (everything the caption says, and nothing else) with 95% intervals over images, "
        "ODE sampling. Rows of the table: split, ODE steps, guidance scale.",
        "",
        "| split | steps | guidance | overall | " + " | ".join(SKILLS) + " | graded |",
        "|---|---|---|---|" + "---|" * (len(SKILLS) + 1),
    ]
    for result in measured["results"]:
        scores = result["scores"]
        overall = scores["overall"]
        cells = [f"{scores[skill]['value']:.2f}" for skill in SKILLS]
        lines.append(
            f"| {result['split']} | {result['steps']} | {result['guidance']:g} "
            f"| **{overall['value']:.3f}** [{overall['low']:.2f}, {overall['high']:.2f}] | "
            + " | ".join(cells)
            + f" | {result['reward']:.3f} |"
        )
    monitors = next(r for r in measured["results"] if r["split"] == "test")["monitors"]
    lines += [
        "",
        f"Monitors on test prompts: diversity within a prompt {monitors['diversity']:.3f}, background "
        f"texture {monitors['texture']:.4f}, contrast {monitors['contrast']:.3f}.",
        "",
        "Samples for test prompts (10 steps, no guidance; a green bar marks strictly right ones) are in "
        "`docs/images/base_model.png` of the source repository; the raw results are in "
        "`docs/claims/base_model.json`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, required=True, help="pretraining took this long")
    parser.add_argument("--images", type=int, default=384, help="per skill")
    arguments = parser.parse_args()
    measured = {"pretraining_minutes": arguments.minutes, **measure(arguments.images)}
    claims = ROOT / "docs" / "claims" / "base_model.json"
    claims.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    (WEIGHTS.parent / "MODEL_CARD.md").write_text(card(measured), encoding="utf-8")


if __name__ == "__main__":
    main()
