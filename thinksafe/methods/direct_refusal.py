"""DirectRefusal (Safety Tax, arXiv 2503.00555): short refusals with one fixed thought."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from thinksafe.data.jsonl import Row
from thinksafe.data.records import Example, Label
from thinksafe.methods.given_data import GivenData, text_in

_QUESTION_AND_ANSWER = re.compile(r"Question:\s*(\S.*?)\s*Answer:\s*(\S.*)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class DirectRefusal(GivenData):
    """The method: DirectRefusal, which trains on refusals without reasoning; every thought is the same sentence."""

    columns: ClassVar[tuple[str, ...]] = ("refusal",)
    published_counts: ClassVar[dict[Label, int]] = {"harmful": 1000}
    response_tokens: ClassVar[float] = 60

    type: Literal["direct_refusal"] = "direct_refusal"
    """Name of the method."""
    source: str = "TianshengHuang/DirectRefusal"
    """File, folder or data set on the hub with the column `refusal`, a text `Question: ... Answer: ...`."""
    thought: str = "I should not answer this question!"
    """Thought of every response."""

    def example_of(self, row: Row) -> Example | str:
        match = _QUESTION_AND_ANSWER.search(text_in(row, "refusal"))
        if match is None:
            return "no_question_and_answer"
        prompt, answer = match.groups()
        return Example(prompt, f"<think>\n{self.thought}\n</think>\n\n{answer.strip()}", "harmful")
