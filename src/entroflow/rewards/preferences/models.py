"""The learnt preferences as a reward and as a judge."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from entroflow.checkpoints import read_tensors
from entroflow.component import Component
from entroflow.errors import InputError
from entroflow.prompts import Prompt
from entroflow.rewards.base import Scores, Status
from entroflow.rewards.pairwise import Answers
from entroflow.rewards.preferences.network import Pairwise, Pointwise, features

SHIPPED = Path(__file__).parent

NetworkT = TypeVar("NetworkT", bound=nn.Module)


class ShapesPreference(Component):
    """A score that was learnt from noisy comparisons of images, as HPS and PickScore were.

    For captions of the shapes world. It agrees with the truth often enough to be trained on, and
    can be hacked: see its model card, rewards/preferences/MODEL_CARD.md. Units are log-odds.
    """

    read_from: ClassVar[tuple[str, ...]] = ("weights",)

    type: Literal["shapes_preference"] = "shapes_preference"
    weights: Path | None = Field(None, description="safetensors of it; the shipped ones if unset")

    def check(self) -> None:
        """See `Component.check`."""
        super().check()
        _ = self._network

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """See `Reward.score`.

        Raises:
            InputError: a prompt is outside the grammar of the shapes world, or wrong weights.
        """
        network = self._network
        values = network(network.reader(features(images, [p.text for p in prompts])))
        return Scores(values.double(), (Status.OK,) * len(prompts))

    @cached_property
    def _network(self) -> Pointwise:
        return _loaded(Pointwise, self.weights or SHIPPED / "pointwise.safetensors")


class ShapesJudge(Component):
    """A judge of pairs that was learnt from the same comparisons, of the same size.

    For captions of the shapes world. Each image is read once, then a small network compares two.
    """

    read_from: ClassVar[tuple[str, ...]] = ("weights",)

    type: Literal["shapes_preference"] = "shapes_preference"
    weights: Path | None = Field(None, description="safetensors of it; the shipped ones if unset")
    answer: Literal["winner", "probability"] = Field(
        "winner", description="one of the two, or how likely the first is better"
    )

    def check(self) -> None:
        """See `Component.check`."""
        super().check()
        _ = self._network

    @torch.no_grad()
    def compare(self, images: Tensor, sides: Tensor, prompts: Sequence[Prompt]) -> Answers:
        """See `Judge.compare`.

        Raises:
            InputError: a prompt is outside the grammar of the shapes world, or wrong weights.
        """
        network = self._network
        # An image is read once with each prompt that it is asked about.
        pairs = zip(sides.tolist(), prompts, strict=True)
        asked = [[(image, prompt.text) for image in pair] for pair, prompt in pairs]
        known = {key: n for n, key in enumerate(dict.fromkeys(k for pair in asked for k in pair))}
        shown = images[[image for image, _ in known]]
        read = network.reader(features(shown, [text for _, text in known]))
        first, second = (read[[known[pair[side]] for pair in asked]] for side in (0, 1))
        likely = network.logit(first, second).double().sigmoid()
        points = likely if self.answer == "probability" else (likely > 0.5).double()
        return Answers(points, (Status.OK,) * len(prompts))

    @cached_property
    def _network(self) -> Pairwise:
        return _loaded(Pairwise, self.weights or SHIPPED / "pairwise.safetensors")


def _loaded(kind: type[NetworkT], path: Path) -> NetworkT:
    network = kind()
    try:
        network.load_state_dict({name: t.float() for name, t in read_tensors(path).items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} holds another network ({reason:.200}).") from None
    return network.eval().requires_grad_(False)
