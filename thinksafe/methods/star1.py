"""STAR-1 (arXiv 2504.01903): 1,000 harmful questions with deliberate reasoning over safety policies."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from thinksafe.data.jsonl import Row
from thinksafe.data.records import Example, Label
from thinksafe.methods.given_data import GivenData, reasoning_example, text_in


@dataclass(frozen=True)
class Star1(GivenData):
    """The method: STAR-1, which trains on 1,000 selected responses that reason about safety policies."""

    columns: ClassVar[tuple[str, ...]] = ("question", "response")
    published_counts: ClassVar[dict[Label, int]] = {"harmful": 1000}

    type: Literal["star1"] = "star1"
    """Name of the method."""
    source: str = "UCSC-VLAA/STAR-1"
    """File, folder or data set on the hub with the columns `question` and `response`."""

    def example_of(self, row: Row) -> Example | str:
        return reasoning_example(text_in(row, "question"), text_in(row, "response"), "harmful")
