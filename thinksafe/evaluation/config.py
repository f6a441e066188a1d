"""The evaluation section of a recipe."""

from dataclasses import dataclass
from typing import Literal

from thinksafe.evaluation.answers import AnswerKind
from thinksafe.sampler.request import SamplingConfig


@dataclass(frozen=True)
class EvaluationSet:
    """One benchmark.

    Attributes:
        name: name in the report.
        source: .jsonl, .json or .parquet file, a folder of such files, or a data set on the hub; a reasoning set needs
            `answer` in every record.
        kind: what is measured: `harmful` (share of unsafe responses), `over_refusal` (share of refusals) or `reasoning`
            (share of right answers, the mean pass@1).
        config: configuration of a data set on the hub, if it has several.
        split: split of a data set on the hub (`test` by default), or of its copy in a folder.
        columns: names of the columns that hold `text`, `answer` and `label`, if they have other names, for example
            {text: question}; no other column is read then. A row without a label is harmful in a `harmful` set, else
            benign.
        filter: keep only rows with this value in this column, for example {label: safe}.
        answer_marker: text before the final answer, if the answer column holds the whole solution: the text after the
            last marker is the answer.
        samples: number of responses for each prompt.
        answer_matcher: how to compare the answers of a reasoning set: `math` as mathematics, `choice` by a single
            capital letter, `phrase` by the words after "answer is".
        instruction: text with {prompt} that poses the question, or null to use the prompt unchanged.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: str
    source: str
    kind: Literal["harmful", "over_refusal", "reasoning"]
    config: str | None = None
    split: str | None = None
    columns: dict[Literal["text", "answer", "label"], str] | None = None
    filter: dict[str, str] | None = None
    answer_marker: str | None = None
    samples: int = 1
    answer_matcher: AnswerKind = "math"
    instruction: str | None = None

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError("samples must be at least 1")
        if self.columns is not None and "text" not in self.columns:
            raise ValueError("columns must name the text column")
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name):
            raise ValueError("name must consist of letters, digits, '-', '_' and '.'")
        if self.instruction is not None and self.instruction.count("{prompt}") != 1:
            raise ValueError("instruction must contain {prompt} exactly once")


@dataclass(frozen=True)
class EvaluationConfig:
    """The benchmarks that a run measures before and after training, and how it samples their responses.

    Attributes:
        sets: the benchmarks; without any, a run measures nothing before and after training.
        sampling: how tokens are sampled.
    """

    __pydantic_config__ = {"extra": "forbid"}

    sets: tuple[EvaluationSet, ...] = ()
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self):
        names = [evaluation_set.name for evaluation_set in self.sets]
        if len(set(names)) < len(names):
            raise ValueError("two evaluation sets have the same name: rename one")
