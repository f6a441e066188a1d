"""The figures of a report: what report.json holds and the page shows. A section is None if its stage has not run."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from thinksafe.reporting.coverage import Coverage

LOWER, HIGHER = "lower is better", "higher is better"
"""The two values of which direction of a metric is better; the page shows these texts."""
Interval = list[float]
"""95% interval [low, high] of a share."""


class MetricKind(NamedTuple):
    """A headline metric: its field in `Report`, the kind of evaluation sets that it pools, its title, which direction
    is better, and a note on the title."""

    key: str
    kind: str
    title: str
    better: str
    note: str = ""


METRIC_KINDS = (
    MetricKind("harmful_ratio", "harmful", "Harmful responses", LOWER),
    MetricKind("over_refusal", "over_refusal", "Over-refusals", LOWER, " (refusals of harmless prompts)"),
    MetricKind("reasoning_accuracy", "reasoning", "Reasoning accuracy", HIGHER),
)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A share before and after training; a share is None if it was not measured or no response could be judged.

    Attributes:
        n: number of judged prompts; of a single set, number of prompts.
        unknown: phase (`before`, `after`) that was measured -> number of responses without a verdict.
    """

    before: float | None = None
    before_interval: Interval | None = None
    after: float | None = None
    after_interval: Interval | None = None
    n: int | None = None
    unknown: dict[str, int] = field(default_factory=dict)

    @property
    def intervals_overlap(self) -> bool:
        """Whether the intervals before and after training overlap or touch; False if one of them is missing."""
        intervals = self.before_interval, self.after_interval
        return None not in intervals and max(low for low, _ in intervals) <= min(high for _, high in intervals)

    @property
    def is_clear_change(self) -> bool:
        """Whether the share changed by more than chance: both intervals are known and do not overlap."""
        is_known = None not in (self.before, self.after, self.before_interval, self.after_interval)
        return is_known and self.before != self.after and not self.intervals_overlap


@dataclass(frozen=True, kw_only=True)
class SetMetric(Metric):
    """The metric of one evaluation set; `truncated` is phase -> share of responses that did not end by themselves."""

    name: str
    kind: str
    samples: int
    judge: str
    truncated: dict[str, float]


@dataclass(frozen=True)
class Acceptance:
    """What steering gains on first attempts at harmful prompts: the share of responses that the guard accepts, and the
    share of refusals among the responses that the guard judged for refusal. Shares are means over prompts; None without
    such responses.

    Attributes:
        n_steered, n_unsteered: numbers of responses with and without steering.
        odds_ratio: (accepted / rejected with steering) / (accepted / rejected without it); None if a count is 0.
    """

    n_steered: int
    n_unsteered: int
    odds_ratio: float | None
    steered: float | None
    steered_interval: Interval | None
    unsteered: float | None
    unsteered_interval: Interval | None
    refusal_steered: float | None
    refusal_steered_interval: Interval | None


@dataclass(frozen=True)
class Training:
    """The training of the student, with pairs (step, value) of steps; a step that was left out has a reason and no
    loss. `dropped` is reason -> number of examples that were not used."""

    method: str
    steps: int
    examples: int
    dropped: dict[str, int]
    tokens: int
    benign_loss: str
    left_out: list[tuple[int, str]]
    loss: list[tuple[int, float]]
    learning_rate: list[tuple[int, float]]


@dataclass(frozen=True)
class StageFigures:
    """Working time and tokens of a finished stage."""

    name: str
    seconds: float
    tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class EstimateRow:
    """Pairs (estimated, measured) of time, tokens and memory of a stage; a figure that is unknown is None."""

    name: str
    seconds: tuple[float | None, float | None]
    tokens: tuple[float | None, float | None]
    peak_bytes: tuple[float | None, float | None]


@dataclass(frozen=True)
class Estimate:
    """What the run was expected to cost, on `num_gpus` GPUs of the kind `gpu`, beside what it cost.

    `total` has the largest memory of all stages, and the sums of the other figures.
    """

    gpu: str
    num_gpus: int
    stages: list[EstimateRow]
    total: EstimateRow


@dataclass(frozen=True)
class Report:
    """All figures of a run; docs/run-directory.md says what they mean. `lengths` is label -> numbers of tokens."""

    title: str
    recipe_name: str | None = None
    model: str | None = None
    seed: int | None = None
    created: str | None = None
    code_version: str | None = None
    run_dir: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    harmful_ratio: Metric | None = None
    over_refusal: Metric | None = None
    reasoning_accuracy: Metric | None = None
    sets: list[SetMetric] = field(default_factory=list)
    stages: list[StageFigures] = field(default_factory=list)
    estimate: Estimate | None = None
    lengths: dict[str, list[int]] | None = None
    coverage: Coverage | None = None
    acceptance: Acceptance | None = None
    training: Training | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the contents of report.json, without sections that are None and phases that were not measured."""
        report = {name: section for name, section in asdict(self).items() if section is not None}
        for key in report.keys() & {metric.key for metric in METRIC_KINDS}:
            report[key] = {name: value for name, value in report[key].items() if value is not None}
        for row in report["sets"]:
            for phase in {"before", "after"} - row["unknown"].keys():
                del row[phase], row[f"{phase}_interval"]
        if self.coverage:
            report["filter"] = {name: report["coverage"].pop(name) for name in ("kept", "dropped")}
        return report
