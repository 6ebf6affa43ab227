"""A judge of pairs behind an OpenAI-compatible server, as vLLM and SGLang serve them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from entroflow.prompts import Prompt
from entroflow.rewards.pairwise import Answers
from entroflow.rewards.served import PLACE, Served
from entroflow.rewards.verdicts import PAIR_FORMATS

TEMPLATE = f"""\
You see two images, Image 1 and then Image 2, that were drawn for the same caption:

{PLACE}

Compare them. First ask how completely each shows what the caption says: the objects, how many
there are, their properties and relations. Then ask which is drawn with fewer faults. What the
caption asks for counts more than how pleasing an image is, and the order in which you see them must
not count.

Reason briefly. Then end with exactly one of these lines:
<answer>Image 1 is better</answer>
<answer>Image 2 is better</answer>
<answer>Both images are equally good</answer>
"""


class ServedJudge(Served):
    """Asks a vision-language model which of two images of a prompt is better.

    Any server with `POST /chat/completions` in the manner of OpenAI will do. Its answers are read
    in one of these formats: `answer` (`<answer>Image 1 is better</answer>`, UnifiedReward-Think),
    `better` (the same sentence anywhere), `winner` (JSON with that key, UnifiedReward-Flex) and
    `shares` (JSON with two numbers that sum to 1 for each dimension, UnifiedReward-2.0). The
    temperature is 0. What fails is tried again with growing pauses until the deadline, then masked.
    """

    section: ClassVar[str] = "reward.judge"

    type: Literal["openai"] = "openai"
    format: Literal["answer", "better", "winner", "shares"] = Field(
        "answer", description="in which the answer is read, see above"
    )

    @property
    def own_template(self) -> str:
        """See `Served.own_template`."""
        return TEMPLATE

    @property
    def wanted(self) -> str:
        """See `Served.wanted`."""
        return f"verdict in the format {self.format!r}"

    def compare(self, images: Tensor, sides: Tensor, prompts: Sequence[Prompt]) -> Answers:
        """See `Judge.compare`."""
        return Answers(*self.ask(images, sides.tolist(), prompts, PAIR_FORMATS[self.format]))
