"""The evaluation section of a recipe."""

from dataclasses import dataclass
from typing import Literal

from thinksafe.evaluation.answers import AnswerKind
from thinksafe.sampler.request import SamplingConfig


@dataclass(frozen=True)
class EvaluationSet:
    """One benchmark.

    Attributes:
        name: shown in the report.
        file: .jsonl, .json or .parquet file, a folder of them, or a data set on the hub; reasoning sets need `answer`.
        kind: `harmful` (share of unsafe responses), `over_refusal` (share of refusals) or `reasoning` (mean pass@1).
        config: of a data set on the hub, if it has several.
        split: of a data set on the hub (`test` by default), or of its copy in a folder.
        columns: where to find `text`, `answer` and `label` if the columns have other names, {text: question}; then
            nothing else is read. A row without a label is harmful in a `harmful` set, else benign.
        where: keep only rows with this value in this column, {label: safe}.
        answer_after: mark that stands before the final answer, where the column holds the whole solution.
        samples: responses a prompt.
        answer: how reasoning answers are compared.
        instruction: text with {prompt} in it that poses the question, or null for the prompt as it is.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: str
    file: str
    kind: Literal["harmful", "over_refusal", "reasoning"]
    config: str | None = None
    split: str | None = None
    columns: dict[Literal["text", "answer", "label"], str] | None = None
    where: dict[str, str] | None = None
    answer_after: str | None = None
    samples: int = 1
    answer: AnswerKind = "math"
    instruction: str | None = None

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError("samples must be at least 1")
        if self.columns is not None and "text" not in self.columns:
            raise ValueError("columns must say where the text is")
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name):
            raise ValueError("name must consist of letters, digits, '-', '_' and '.'")
        if self.instruction is not None and self.instruction.count("{prompt}") != 1:
            raise ValueError("instruction must hold {prompt} exactly once")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured before and after, and how responses are drawn for it.

    Attributes:
        sets: the benchmarks; without any a run has no before and after.
        sampling: how tokens are drawn.
    """

    __pydantic_config__ = {"extra": "forbid"}

    sets: tuple[EvaluationSet, ...] = ()
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self):
        names = [evaluation_set.name for evaluation_set in self.sets]
        if len(set(names)) < len(names):
            raise ValueError("two evaluation sets have the same name")
