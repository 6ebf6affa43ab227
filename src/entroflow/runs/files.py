"""What the files of a run folder hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from entroflow.contents import (
    Contents,
    Count,
    Number,
    RunError,
    checked,
    is_cut,
    parsed,
    require,
    shortened,
    unreadable,
)

METRICS = "metrics.jsonl"
MEASURED = ("ledger/", "eval/", "drift/", "reward/", "policy/", "credit/")
"""Keys of a line of metrics that begin so are numbers."""


class Best(Contents):
    """`best.json`: the best checkpoint, and its score by `eval/<by>`."""

    iteration: Count
    score: float
    by: str = "reward"


class PlannedStep(Contents):
    """A stochastic step of a plan. Its entropy is shown as an exponential."""

    start: Count
    end: Count
    sigma: float
    sigma_next: float
    std: float
    entropy: Annotated[float, Field(le=700)]


class PlannedRow(Contents):
    """Rows of a plan that are alike."""

    role: str
    points: list[Count]
    stochastic: list[Count]
    trained: list[Count]
    count: Count


class Planned(Contents):
    """What an iteration is about to do."""

    grid: list[float] = []
    steps: list[PlannedStep] = []
    rows: list[PlannedRow] = []
    network_evaluations: Count = 0
    weighted_evaluations: Count = 0
    reward_calls: Count = 0


class Measured(Contents):
    """What an evaluation measures."""

    name: str
    reading: str = ""
    share: bool = False
    over: str = "images and noise"


class AttentionOfPrompts(Contents):
    """Attention entropy of an iteration, by step and by prompt."""

    prompt: list[str]
    entropy: list[Number]
    explored: list[Count]
    shift: list[Number]
    size: list[Count]
    spread: list[Number]

    @model_validator(mode="after")
    def _one_each(self) -> AttentionOfPrompts:
        lengths = {len(each) for each in (self.prompt, self.shift, self.size, self.spread)}
        require(len(lengths) == 1, "prompts differ in number")
        return self


Step = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class MetricsLine(Contents):
    """A line of `metrics.jsonl`."""

    iteration: Count
    seconds: Annotated[float, Field(ge=0)] = 0.0
    version: str = ""
    plan: Planned | None = None
    measure: Measured | None = None
    by_step: dict[str, dict[Step, Number] | None] | None = None
    attention: AttentionOfPrompts | None = None
    hacking: dict[str, str] = {}
    selected_by: str | None = None

    @model_validator(mode="after")
    def _numbers(self) -> MetricsLine:
        for name, value in (self.__pydantic_extra__ or {}).items():
            least = () if name.startswith("ledger/") else (type(None),)
            number = isinstance(value, (int, float, *least)) and not isinstance(value, bool)
            require(number or not name.startswith(MEASURED), f"{name} is no number")
        return self


class StartLine(MetricsLine):
    """The line of iteration 0 of a run of images."""

    plan: Planned
    measure: Measured
    dimensions: Annotated[Count, Field(alias="policy/dimensions")]
    clip_range: Annotated[Number, Field(alias="policy/clip_range")]


class Estimated(Contents):
    """A number and its 95% interval."""

    value: Number
    low: Number
    high: Number


class Scored(Estimated):
    """A score of some images."""

    images: Count = 0


class Tried(Scored):
    """A guidance scale that was tried."""

    guidance: float


class ModelSummary(Contents):
    """How good a model is on the prompts of a comparison."""

    passes: Count
    scores: dict[str, Scored]
    reward: Number = None
    monitors: dict[str, Number]
    win_rates: dict[str, Estimated] = {}

    @model_validator(mode="after")
    def _overall(self) -> ModelSummary:
        require("overall" in self.scores, "scores have no overall")
        return self


class Spent(Contents):
    """What a comparison took."""

    network_evaluations: Count
    seconds: dict[str, float]


class Comparison(Contents):
    """`evaluation.json`: the comparison with the base. Older versions have no `measure`."""

    iteration: Count | None = None
    measure: Measured | None = None
    split: str
    steps: Count
    guidance: float
    best_guidance: float
    guidance_tried: list[Tried]
    models: dict[str, ModelSummary]
    gain: Estimated | None = None
    cost: Spent | None = None

    @model_validator(mode="after")
    def _complete(self) -> Comparison:
        require("base" in self.models, "models have no base")
        guided = self.best_guidance == self.guidance or "base_guided" in self.models
        require(guided, "models have no base_guided")
        require("tuned" not in self.models or self.gain is not None, "gain is missing")
        return self


class RunsComparison(Comparison):
    """The same of a run, which has a tuned model and a gain."""

    gain: Estimated


class Examples(Contents):
    """`examples/*.json`: captions of a strip of images, and whether each is right."""

    captions: list[str]
    passed: list[bool | None] | None = None
    picture: str | None = None


class Trajectory(Contents):
    """A rollout, step by step."""

    caption: str
    steps: list[Count]
    rewards: Annotated[list[Number], Field(min_length=1)]
    turns: list[bool]
    dropped: list[bool]

    @model_validator(mode="after")
    def _one_each(self) -> Trajectory:
        n = len(self.steps)
        whole = (len(self.rewards), len(self.turns), len(self.dropped)) == (n + 1, n, n)
        require(whole, "steps differ in number")
        return self


class TurningPoints(Contents):
    """Where all rollouts turned."""

    prompt: list[Count]
    steps: list[list[Count]]
    turns: list[list[int]]


class TrajectoriesFile(Contents):
    """`trajectories/*.json`."""

    trajectories: Annotated[list[Trajectory], Field(min_length=1)]
    prompts: list[str]
    map: TurningPoints
    picture: str | None = None

    @model_validator(mode="after")
    def _one_each(self) -> TrajectoriesFile:
        alike = {len(each.rewards) for each in self.trajectories}
        of = self.map
        whole = len(alike) == 1 and len(of.prompt) == len(of.steps) == len(of.turns)
        whole = whole and [*map(len, of.steps)] == [*map(len, of.turns)]
        whole = whole and all(prompt < len(self.prompts) for prompt in of.prompt)
        require(whole, "rollouts differ in number")
        return self


def read_lines(path: Path, remedy: str) -> Iterator[dict[str, Any]]:
    """The lines of `metrics.jsonl`, one at a time; a last one that a crash has torn is left out.

    Raises:
        RunError: another line is torn, or the file can't be read.
    """
    torn = ""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if torn:
                    raise RunError(torn)
                try:
                    content = parsed(line.decode())
                except ValueError as reason:
                    torn = f"{path}:{number} is torn ({shortened(reason)}){remedy}"
                    if not is_cut(line.rstrip(b"\n")):
                        raise RunError(torn) from None
                    continue
                try:
                    checked(content, MetricsLine)
                except ValueError as reason:
                    raise RunError(f"{path}:{number} is torn ({reason}){remedy}") from None
                yield content
    except OSError as reason:
        raise unreadable(path, reason, RunError) from None
