"""A score for each image by a vision-language model behind an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from entroflow.prompts import Prompt
from entroflow.rewards.base import Scores
from entroflow.rewards.served import PLACE, Served
from entroflow.rewards.verdicts import dimension_scores, final_score

TEMPLATE = f"""\
You see an image that was drawn for this caption:

{PLACE}

How well does it show what the caption says: the objects, how many there are, their properties and
relations? And how well is it drawn? What the caption asks for counts more than how pleasing the
image is. Use the whole scale from 1 (nothing fits) to 5 (everything fits, and without faults), with
decimals.

Reason briefly. Then end with exactly this line, the number in the place of X:
Final Score: X
"""


class ServedScore(Served):
    """Asks a vision-language model how good an image is, on a scale from 1 to 5.

    Its answer is read as `Final Score: 4.5` (UnifiedReward); or, where `dimensions` names some, as
    `Alignment Score (1-5): 4` for each of them, and the value is their weighted sum. Values are
    divided by 5. A comparison (`pairwise`) tells apart what a score blurs.
    """

    section: ClassVar[str] = "reward"

    type: Literal["openai"] = "openai"
    max_tokens: int = Field(512, ge=1, description="most tokens of an answer, thoughts included")
    dimensions: dict[str, float] = Field(
        default_factory=dict, description="weights by name, as Alignment: 1.4, Style: 0.7"
    )

    @property
    def own_template(self) -> str:
        """See `Served.own_template`."""
        return TEMPLATE

    @property
    def wanted(self) -> str:
        """See `Served.wanted`."""
        return "score from 1 to 5 of each dimension" if self.dimensions else "`Final Score: 1 to 5`"

    def check_parts(self) -> None:
        """See `Served.check_parts`.

        Raises:
            ValueError: our own question asks for no dimensions.
        """
        if self.dimensions and self.template is None:
            raise ValueError("dimensions needs a template that asks for them")
        super().check_parts()

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """See `Reward.score`."""
        reading = dimension_scores(self.dimensions) if self.dimensions else final_score
        return Scores(*self.ask(images, [[i] for i in range(len(images))], prompts, reading))
