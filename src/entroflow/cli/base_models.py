"""Commands that make base models: pretrain, stand-in."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from entroflow.cli.options import Seed

app = typer.Typer()
pretrain = typer.Typer(no_args_is_help=True, help="Make base weights.")


class StandIn(StrEnum):
    """Kinds of policies that a tiny pipeline can stand in for."""

    SD3 = "sd3"
    FLUX = "flux"


@app.command(
    "stand-in",
    epilog="Example: `entroflow stand-in sd3 --out tiny`, then `entroflow doctor sd35_flow_grpo "
    "policy.model=tiny policy.resolution=32 policy.precision=fp32`",
)
def stand_in(
    kind: Annotated[StandIn, typer.Argument(help="Which model it stands in for.")],
    out: Annotated[Path, typer.Option(help="The new folder.")] = Path("stand-in"),
) -> None:
    """Write a tiny pipeline with random weights, to try commands without a model or a GPU.

    It is of the real classes, from tokenizers to VAE, but its images are noise.
    """
    from entroflow.recipe.imports import imported
    from entroflow.writing import whole_folder

    stand_ins = imported("entroflow.policies.diffusers.stand_ins.STAND_INS", "stand-in")
    with whole_folder(out) as made:
        stand_ins[kind.value]().save_pretrained(made)
    print(out)


@pretrain.command("shapes", epilog="Example: `entroflow pretrain shapes --folder base`")
def pretrain_shapes(
    folder: Annotated[Path, typer.Option(help="Where to train; the same folder goes on.")] = Path(
        "runs/pretrain-shapes"
    ),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Shorten or stretch all phases to about this total.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Train the embedded model from nothing, as the shipped weights were.

    Ctrl-C finishes the step, saves, and exits; the same command goes on.
    """
    from contextlib import closing

    from entroflow.cli.show import steps_progress
    from entroflow.locks import one_writer
    from entroflow.policies.shapes.pretrain import Pretraining, export_weights
    from entroflow.policies.shapes.pretrain import pretrain as train
    from entroflow.signals import asked_to_stop

    settings = Pretraining(seed=seed)
    if steps is not None:
        settings = settings.scaled_to(steps)
    with (
        one_writer(folder),
        steps_progress("pretraining", settings.steps, "loss") as advance,
        closing(train(settings, folder)) as training,
        asked_to_stop() as stopping,
    ):
        for step, loss in training:
            advance(step, loss)
            if stopping() and step < settings.steps:
                print(f"stopped at step {step}; the same command goes on.")
                return
    print(f"weights  {export_weights(folder)}")
    print(f"use them: entroflow train policy.weights={folder / 'base.safetensors'}")


@pretrain.command("preferences", epilog="Example: `entroflow pretrain preferences`")
def pretrain_preferences(
    folder: Annotated[Path, typer.Option(help="Where the weights are written.")] = Path(
        "runs/pretrain-preferences"
    ),
    seed: Seed = 0,
) -> None:
    """Learn the preferences that come with the package anew, from noisy comparisons.

    Some minutes on one core. Writes the weights of the score and of the judge, and how often they
    are right about held-out pairs.
    """
    from entroflow.cli.show import steps_progress
    from entroflow.rewards.preferences.learn import Learning, make

    shares = make(Learning(seed=seed), folder, steps_progress)
    for kind, right in shares.items():
        print(f"{kind}: right about {right['order']:.1%} of the held-out pairs")
    print(f"weights  {folder}")
    print(
        "use them: entroflow train pointwise_preference "
        f"reward.weights={folder / 'pointwise.safetensors'}"
    )
