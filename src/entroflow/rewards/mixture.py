"""Several rewards at once, with weights, as a recipe names them; `combined.py` mixes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from entroflow.component import Component, refuse_names

Combine = Literal["normalise_then_sum", "sum_then_normalise", "gdpo"]


class Mixture(Component):
    """A weighted mixture of named rewards.

    Scales differ: a win rate spreads over 0.3 within a group, a similarity over 0.003. So by
    default every reward is turned into advantages by itself, and these are summed.

    - `normalise_then_sum`: A = sum of w_k A_k;
    - `sum_then_normalise`: advantages of the sum of w_k R_k, for rewards on one scale;
    - `gdpo`: the first, then centred and divided by its standard deviation over the batch, so that
      the scale of the weights has no effect.

    An image that one of them could not score is masked for all.
    """

    parts: ClassVar[Mapping[str, str]] = {"rewards": "reward"}

    type: Literal["mixture"] = "mixture"
    rewards: Any = Field(
        default_factory=dict, description="by name, each with its type and keys, as in this section"
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="by name; 1 if not given, and 0 leaves a reward out"
    )
    combine: Combine = Field("normalise_then_sum", description="see above")
    floors: dict[str, float] = Field(
        default_factory=dict,
        description="by name, least standard deviation that divides: what the reward's own noise "
        "makes of equal images",
    )

    def check_parts(self) -> None:
        """Refuse what does not fit together.

        Raises:
            ValueError: no rewards, a name that is taken, a weight or floor that has no reward, or
                no weight but 0.
        """
        if not self.rewards:
            raise ValueError("rewards holds none; name one or more, each with a type")
        refuse_names(self.rewards, ("failed",), "rewards")
        for key in ("weights", "floors"):
            for name, value in getattr(self, key).items():
                if name not in self.rewards:
                    known = ", ".join(self.rewards)
                    raise ValueError(f"{key}.{name} is of no reward (known: {known})")
                if key == "floors" and value < 0:
                    raise ValueError(f"floors.{name} is {value:g}, but a floor is 0 or more")
        if all(self.weights.get(name) == 0 for name in self.rewards):
            raise ValueError("weights leave out all rewards")
