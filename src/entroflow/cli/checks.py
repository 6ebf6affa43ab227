"""Commands that look before a run: doctor, reward test, reward floors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from entroflow.cli.trust import Trust, loaded
from entroflow.errors import InputError

if TYPE_CHECKING:
    from entroflow.recipe.load import Recipe

app = typer.Typer()
rewards = typer.Typer(no_args_is_help=True, help="Look into a reward before training on it.")


@app.command(
    epilog="Examples: `entroflow doctor my_recipe.yaml` · `entroflow doctor sd35_flow_grpo "
    "policy.model=models/sd35 --devices 8`"
)
def doctor(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [SECTION.KEY=VALUE]...", help="A recipe, and changes to it."
        ),
    ],
    devices: Annotated[
        int, typer.Option(min=1, help="That are to share the groups of an iteration.")
    ] = 1,
    trust: Trust = False,
) -> None:
    """Examine a recipe before a long run: does it start, is it right, what does it take?

    It loads the model, compares it with its own pipeline, scores two images, and makes one small
    iteration. Nothing is written. Memory is computed before any weights are loaded.
    """
    from entroflow.checks.doctor import examine
    from entroflow.cli.show import print_findings

    name, changes = _one_name(arguments, "name one recipe; `entroflow recipes` lists them.")
    recipe, _ = loaded(trust, name, changes)
    failed = print_findings(examine(recipe, devices))
    if failed:
        raise InputError(f"not ready to run: {', '.join(failed)}.")


RewardArguments = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME [SECTION.KEY=VALUE]...",
        help="A type of reward, the dotted path of your own, or a recipe; and changes to it.",
    ),
]


@rewards.command(
    "test",
    epilog="Examples: `entroflow reward test shapes` · `entroflow reward test my_reward.blue` · "
    "`entroflow reward test my_recipe.yaml reward.weights.style=0`",
)
def try_reward(
    arguments: RewardArguments,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts whose images are scored.")] = 4,
    images: Annotated[int, typer.Option(min=2, help="Images of each.")] = 4,
    trust: Trust = False,
) -> None:
    """Try a reward on images of the untrained model: is it fit to be trained on?

    Whether every image has one, whether it is the same when asked again and in other batches,
    whether it tells images from noise and from each other, and what it takes.
    """
    from entroflow.checks.examination import examine_recipe
    from entroflow.cli.show import print_findings

    failed = print_findings(examine_recipe(_recipe_with(arguments, trust), prompts, images))
    if failed:
        raise InputError(f"not fit to be trained on: {', '.join(failed)}.")


@rewards.command(
    "floors",
    epilog="Examples: `entroflow reward floors mixed_rewards` · "
    "`entroflow reward floors my_recipe.yaml --prompts 16`",
)
def calibrate(
    arguments: RewardArguments,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts whose images are scored.")] = 8,
    images: Annotated[int, typer.Option(min=2, help="Images of each.")] = 8,
    trust: Trust = False,
) -> None:
    """Calibrate the floors of a mixture: how much of each reward is noise?

    Scores images of the untrained model again under changes that no one would mind (JPEG, a shift
    by a pixel, 2% smaller or larger). A floor is twice the standard deviation that this alone
    makes; normalisation must not turn it into advantages.
    """
    from entroflow.checks.examination import all_rewards, untrained
    from entroflow.checks.noise_floors import as_yaml, floor_of
    from entroflow.cli.show import floors_table, print_table, working

    recipe = _recipe_with(arguments, trust)
    with working("drawing images"):
        groups, chosen = untrained(recipe, prompts, images)
    floors = {}
    for name, part in all_rewards(recipe).items():
        with working(f"scoring, {name}"):
            floors[name] = floor_of(part, groups, chosen)
    print_table(floors_table(floors))
    if recipe.reward.names:
        print(as_yaml({name: floors[name] for name in recipe.reward.names}))
    else:
        print("floors are keys of a mixture; one of this reward alone will do.")


def _recipe_with(arguments: list[str], trust: bool) -> Recipe:
    """The recipe that is named; of a reward, quickstart with it."""
    from entroflow.recipe.registry import COMPONENTS, IMAGES

    name, changes = _one_name(arguments, "name one reward, or a recipe.")
    own = "." in name and not os.path.exists(name) and not name.endswith((".yaml", ".yml"))
    if own or (name in COMPONENTS["reward"] and name not in IMAGES.recipes):
        name, changes = "quickstart", [f"reward.type={name}", *changes]
    return loaded(trust, name, changes)[0]


def _one_name(arguments: list[str], otherwise: str) -> tuple[str, list[str]]:
    """The one argument that is no `section.key=value`, and those that are."""
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) != 1:
        raise InputError(otherwise)
    return names[0], [argument for argument in arguments if "=" in argument]
