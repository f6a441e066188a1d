"""Supervised fine-tuning on the user's own examples."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from thinksafe.data.jsonl import Row, label_of
from thinksafe.data.records import Example
from thinksafe.methods.given_data import GivenData, reasoning_example, text_in


@dataclass(frozen=True)
class Sft(GivenData):
    """The method: supervised fine-tuning on the user's examples."""

    columns: ClassVar[tuple[str, ...]] = ("prompt", "response", "label")

    type: Literal["sft"] = "sft"
    """Name of the method."""
    source: str = ""
    """File, folder or data set on the hub with the columns `prompt`, `response` and `label`."""

    def check(self) -> None:
        if not self.source:
            raise ValueError("source: missing; name a file with the columns prompt, response and label")

    def example_of(self, row: Row) -> Example | str:
        return reasoning_example(text_in(row, "prompt"), text_in(row, "response"), label_of(row.where, row.values))
