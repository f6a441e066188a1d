"""SafeChain (arXiv 2502.12025): reasoning of a larger model on 40,000 prompts."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from thinksafe.data.jsonl import Row, label_of
from thinksafe.data.records import Example, Label
from thinksafe.methods.given_data import GivenData, reasoning_example, text_in


@dataclass(frozen=True)
class SafeChain(GivenData):
    """The method: SafeChain, which trains on a larger reasoning model's responses to harmful and benign prompts."""

    columns: ClassVar[tuple[str, ...]] = ("instruction", "response", "label")
    published_counts: ClassVar[dict[Label, int]] = {"harmful": 17_888, "benign": 22_112}

    type: Literal["safechain"] = "safechain"
    """Name of the method."""
    source: str = "UWNSL/SafeChain"
    """File, folder or data set on the hub with the columns `instruction`, `response` and `label`."""

    def example_of(self, row: Row) -> Example | str:
        return reasoning_example(text_in(row, "instruction"), text_in(row, "response"), label_of(row.where, row.values))
