"""The files of a run folder: what each must hold, and the one reader of them all.

What can't be read is not absent: a file that is cut, holds other JSON, or bytes that are no text is
torn, and whoever reads it hears so in one line. Keys that are not listed here are let through.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from entroflow.errors import InputError

Count = Annotated[int, Field(ge=0, le=2**63)]
Number = float | None
"""What is not finite is null in JSON."""
MEASURED = ("ledger/", "eval/", "drift/", "reward/", "policy/", "credit/")
"""Keys of a line of metrics that begin so are numbers."""


class RunError(InputError):
    """A run folder can't be used as asked; the message says why and what to do."""


# --- what the files hold --------------------------------------------------------------------------


class Contents(BaseModel):
    """A JSON object; by itself one of any keys."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Best(Contents):
    """`best.json`: the best checkpoint, and its score by `eval/<by>`."""

    iteration: Count
    score: float
    by: str = "reward"


class Counted(Contents):
    """The state of a ledger."""

    network_evaluations: Count = 0
    weighted_evaluations: Count = 0
    check_evaluations: Count = 0
    reward_calls: Count = 0
    decodes: Count = 0
    optimizer_steps: Count = 0
    seconds: dict[str, float] = {}


class Curve(Contents):
    """The state of `EntropyCurve`."""

    values: list[Number] | None = None


class Named(Contents):
    """What a recipe names, and a digest of what it held; see `inputs.Inputs`."""

    of: str
    digest: str


class RunState(Contents):
    """`state.json` in a checkpoint of a run. Components may remember what is not finite."""

    model_config = ConfigDict(allow_inf_nan=True)

    iteration: Count
    seconds: float
    ledger: Counted
    evaluation_ledger: Counted
    reference: str
    recipe: str | None = None
    inputs: dict[str, Named] | None = None
    code: dict[str, Named] = {}
    sentinel: dict[str, list[Number]] = {}
    monitors: dict[str, Any] = {}
    stopped: bool = False
    attention: Curve = Curve()
    components: dict[str, Any]


class Phase(Contents):
    """A phase of pretraining."""

    steps: Count


class PretrainingSettings(Contents):
    """What pretraining was begun with."""

    phases: list[Phase]


class PretrainingState(Contents):
    """`state.json` of pretraining."""

    step: Count
    settings: PretrainingSettings


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
        _require(len(lengths) == 1, "prompts differ in number")
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
            _require(number or not name.startswith(MEASURED), f"{name} is no number")
        return self


class StartLine(MetricsLine):
    """The line of iteration 0 of a run of images."""

    plan: Planned
    measure: Measured
    dimensions: Annotated[Count, Field(alias="policy/dimensions")]
    clip_range: Annotated[float, Field(alias="policy/clip_range")]


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
        _require("overall" in self.scores, "scores have no overall")
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
        _require("base" in self.models, "models have no base")
        guided = self.best_guidance == self.guidance or "base_guided" in self.models
        _require(guided, "models have no base_guided")
        _require("tuned" not in self.models or self.gain is not None, "gain is missing")
        return self


class RunsComparison(Comparison):
    """The same of a run, which has a tuned model and a gain."""

    gain: Estimated


class Asked(Contents):
    """An arm of a comparison of recipes."""

    recipe: str
    overrides: list[str]


class Evaluation(Contents):
    """A point of a result's curve."""

    score: Annotated[Number, Field(alias="eval/score")]


class Value(Contents):
    """A number that is known."""

    value: float


class ResultModel(Contents):
    """What the table shows of a model."""

    scores: dict[str, Value]
    monitors: dict[str, Number]


class ResultTest(Contents):
    """What the table shows of a comparison with the base. Older versions have no `measure`."""

    measure: Measured | None = None
    models: dict[str, ResultModel]
    gain: Value

    @model_validator(mode="after")
    def _both(self) -> ResultTest:
        for name in ("base", "tuned"):
            whole = name in self.models and "overall" in self.models[name].scores
            _require(whole, f"models have no {name}")
        return self


class Result(Contents):
    """A result in `results.json`."""

    recipe_hash: str
    seed: Count
    base: str
    version: str
    iterations: Count
    training_seconds: float
    arm: Asked
    curve: Annotated[list[Evaluation], Field(min_length=1)]
    ledger: dict[str, float]
    test: ResultTest


class Results(Contents):
    """`results.json`."""

    results: list[Result]


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
        _require(whole, "steps differ in number")
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
        _require(whole, "rollouts differ in number")
        return self


# --- what those of a language model hold ----------------------------------------------------------

Interval = Annotated[list[Number], Field(min_length=3, max_length=3)]
Passing = dict[Annotated[str, Field(pattern=r"^(avg|pass)@[0-9]{1,9}$")], Interval]
Answer = Annotated[list[str | bool], Field(min_length=2, max_length=2)]


class Answers(Contents):
    """What both models answered to a problem, and whether it was right."""

    prompt: Any
    base: list[Answer]
    tuned: list[Answer]


class PassingComparison(Contents):
    """`evaluation.json` of a language model's run. Older versions do not say by which recipe."""

    iteration: Count
    recipe: str | None = None
    problems: Count
    each: Count
    base: Passing
    tuned: Passing
    gain: Passing
    answers: list[Answers]

    @model_validator(mode="after")
    def _the_same(self) -> PassingComparison:
        whole = self.base.keys() == self.tuned.keys() >= self.gain.keys()
        whole = whole and any(name.startswith("pass@") for name in self.base)
        _require(whole, "base and tuned differ in what they have")
        return self


class BaseAnswers(Contents):
    """`base.json`: [P, each] what the model answered before it was trained."""

    said: Annotated[list[list[str]], Field(min_length=1)]
    right: list[list[bool]]

    @model_validator(mode="after")
    def _one_each(self) -> BaseAnswers:
        lengths = {*map(len, self.said)}
        whole = len(lengths) == 1 and [*map(len, self.said)] == [*map(len, self.right)]
        _require(whole, "answers differ in number")
        return self


class LibraryState(Contents):
    """The random states of a process."""

    python: Annotated[list[Any], Field(min_length=3, max_length=3)]
    numpy: dict[str, Any]
    torch: list[Count]
    cuda: list[Count] | None


class Progress(Contents):
    """`progress.json` in a checkpoint of a language model."""

    model_config = ConfigDict(allow_inf_nan=True)

    rates: list[float]
    moments: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    adapted: dict[str, Any]
    recipe: str | None = None
    inputs: dict[str, Named] | None = None
    code: dict[str, Named] = {}
    random: Annotated[list[LibraryState], Field(min_length=1)]


class TRLState(Contents):
    """`trainer_state.json`, which TRL writes."""

    model_config = ConfigDict(allow_inf_nan=True)

    global_step: Count
    log_history: list[dict[str, Any]]


class LLMModelSection(Contents):
    """Where the model of a run came from."""

    path: str


class LLMClipSection(Contents):
    """How entropy was controlled."""

    type: Literal["none", "b", "v"]


class LLMRunSection(Contents):
    """How long a run is."""

    seed: Count
    updates: Count


class LLMRecipeText(Contents):
    """What a report shows of a language model's recipe."""

    model: LLMModelSection
    clip: LLMClipSection
    run: LLMRunSection
    trainer: dict[str, Any]


# --- the reader -----------------------------------------------------------------------------------

TO_DO_WITHOUT = "; remove it to do without."


def read_object(
    path: Path,
    kind: type[Contents] = Contents,
    *,
    remedy: str = TO_DO_WITHOUT,
    error: type[InputError] = RunError,
) -> dict[str, Any]:
    """The JSON object that a file holds, as it stands there.

    Args:
        kind: what it must hold.
        remedy: the end of the message where it is torn.

    Raises:
        error: the file is torn, or can't be read.
    """
    text = read_text(path, remedy=remedy, error=error)
    try:
        return checked(parsed(text), kind)
    except ValueError as reason:
        raise error(f"{path} is torn ({_short(reason)}){remedy}") from None


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
                    torn = f"{path}:{number} is torn ({_short(reason)}){remedy}"
                    if not _is_cut(line.rstrip(b"\n")):
                        raise RunError(torn) from None
                    continue
                try:
                    checked(content, MetricsLine)
                except ValueError as reason:
                    raise RunError(f"{path}:{number} is torn ({reason}){remedy}") from None
                yield content
    except OSError as reason:
        raise _unreadable(path, reason, RunError) from None


def read_text(
    path: Path, *, remedy: str = "; restore it from a copy.", error: type[InputError] = RunError
) -> str:
    """The text of a file.

    Raises:
        error: it is no text, or can't be read.
    """
    content = _bytes(path, error)
    try:
        return content.decode()
    except UnicodeDecodeError as reason:
        raise error(f"{path} is torn ({_short(reason)}){remedy}") from None


def parsed(text: str) -> Any:
    """JSON.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def checked(content: Any, kind: type[Contents]) -> dict[str, Any]:
    """`content`, if it is of a kind.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    try:
        kind.model_validate(content)
    except ValidationError as error:
        raise ValueError(_first(error)) from None
    return content


def _bytes(path: Path, error: type[InputError]) -> bytes:
    try:
        return path.read_bytes()
    except OSError as reason:
        raise _unreadable(path, reason, error) from None


def _unreadable(path: Path, reason: OSError, error: type[InputError]) -> InputError:
    if isinstance(reason, FileNotFoundError):
        return error(f"{path} is missing.")
    return error(f"{path} can't be read ({reason.strerror}).")


def _is_cut(line: bytes) -> bool:
    """Whether it may be the beginning of a line of ours: some file systems end it with zeros."""
    written = line.rstrip(b"\0")
    return not written or (written.startswith(b"{") and written.isascii())


def _first(error: ValidationError) -> str:
    """What is wrong with the first wrong key, in a few words."""
    detail = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in detail["loc"])[:60]
    words = re.sub(r"^Value error, ", "", detail["msg"])
    words = words[:1].lower() + words[1:]
    return f"{place}: {words}" if place else words


def _short(reason: object) -> str:
    words = " ".join(str(reason).split())
    return words if len(words) <= 120 else f"{words[:117]}..."


def _require(whole: bool, otherwise: str) -> None:
    if not whole:
        raise ValueError(otherwise)
