"""The section `evaluation` of a recipe."""

from dataclasses import dataclass
from typing import Annotated, Literal

from thinksafe.evaluation.answers import AnswerKind
from thinksafe.sampler.config import SamplingConfig
from thinksafe.section import Bounds, Section


@dataclass(frozen=True)
class EvaluationSet(Section):
    """One benchmark."""

    name: str
    """Name in the report: letters, digits, `-`, `_` and `.`."""
    source: str
    """.jsonl, .json or .parquet file, a folder of such files, or a data set on the hub; a reasoning set needs `answer`
    in every record."""
    kind: Literal["harmful", "over_refusal", "reasoning"]
    """What is measured: `harmful` (share of unsafe responses), `over_refusal` (share of refusals) or `reasoning` (share
    of right answers, the mean pass@1)."""
    config: str | None = None
    """Configuration of a data set on the hub, if it has several."""
    split: str | None = None
    """Split of a data set on the hub (`test` by default), or of its copy in a folder."""
    columns: dict[Literal["text", "answer", "label"], str] | None = None
    """Names of the columns that hold `text`, `answer` and `label`, if they have other names, for example {text:
    question}; no other column is read then. A row without a label is harmful in a `harmful` set, else benign."""
    filter: dict[str, str] | None = None
    """Keep only rows with this value in this column, for example {label: safe}."""
    answer_marker: str | None = None
    """Text before the final answer, if the answer column holds the whole solution: the text after the last marker is
    the answer."""
    samples: Annotated[int, Bounds(ge=1)] = 1
    """Number of responses for each prompt."""
    answer_matcher: AnswerKind = "math"
    """How to compare the answers of a reasoning set: `math` as mathematics, `choice` by the letter of the option that
    is given as the answer, `phrase` by the words after "answer is"."""
    choices_from: Literal[0, 1] | None = None
    """Number of option A, if the answers of a set with `answer_matcher: choice` are numbers of options; null if they
    are letters."""
    instruction: str | None = None
    """Text with {prompt} that poses the question, or null to use the prompt unchanged."""

    def check(self) -> None:
        if self.columns is not None and "text" not in self.columns:
            raise ValueError("columns: must name the text column")
        if not self.name or not all(character.isalnum() or character in "-_." for character in self.name):
            raise ValueError(f"name: must consist of letters, digits, '-', '_' and '.' (found {self.name!r})")
        if self.instruction is not None and self.instruction.count("{prompt}") != 1:
            raise ValueError("instruction: must contain {prompt} exactly once")
        if self.choices_from is not None and self.answer_matcher != "choice":
            raise ValueError("choices_from: needs answer_matcher: choice; remove one of the two")


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """The benchmarks that a run measures before and after training, and how it samples their responses."""

    sets: tuple[EvaluationSet, ...] = ()
    """The benchmarks; without any, a run measures nothing before and after training."""
    sampling: SamplingConfig = SamplingConfig()

    def check(self) -> None:
        names = [entry.name for entry in self.sets]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"sets: two have the same name, {repeated[0]}; rename one")
