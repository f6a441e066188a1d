"""SafePath (arXiv 2505.14667): the student learns to begin its thought about a harmful prompt with one sentence."""

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import nsmallest
from typing import Annotated, ClassVar, Literal

import numpy as np

from thinksafe.data.jsonl import Row
from thinksafe.data.records import Example, Label
from thinksafe.methods.given_data import GivenData, text_in
from thinksafe.section import Bounds
from thinksafe.text.chat import THINK_OPEN, Chat
from thinksafe.training.sequence import TrainingSequence


@dataclass(frozen=True)
class SafePath(GivenData):
    """The method: SafePath, which trains only the first sentence of the thought about harmful prompts. The thought
    stays open: no closing think tag and no end of turn is trained."""

    columns: ClassVar[tuple[str, ...]] = ("data_type", "vanilla", "adversarial")
    published_config: ClassVar[str] = "train"
    response_tokens: ClassVar[float] = 10

    type: Literal["safepath"] = "safepath"
    """Name of the method."""
    source: str = "allenai/wildjailbreak"
    """File, folder or data set on the hub with the columns of WildJailbreak: `data_type`, `vanilla` and `adversarial`.
    The data set on the hub is gated."""
    primer: str = "Let's think about safety first."
    """First sentence of the thought."""
    max_examples: Annotated[int, Bounds(ge=1)] = 400
    """Number of harmful prompts to use: the prompts with the smallest ids. Ids are hashes, so the choice is random but
    reproducible."""

    def example_of(self, row: Row) -> Example | str:
        kind, _, label = text_in(row, "data_type").partition("_")
        if kind not in ("vanilla", "adversarial") or label not in ("harmful", "benign"):
            return "unknown_data_type"
        return Example(text_in(row, kind), self.primer, label) if label == "harmful" else "benign_prompt"

    @property
    def expected_counts(self) -> dict[Label, int]:
        return {"harmful": self.max_examples}

    def select(self, examples: Iterable[Example]) -> Iterable[Example]:
        return nsmallest(self.max_examples, examples, key=lambda example: example.prompt_id)

    def training_sequence(self, example: Example, chat: Chat) -> TrainingSequence:
        prompt = chat.prompt_ids(example.prompt)
        opening = "" if chat.supplies_think else f"{THINK_OPEN}\n"
        primer = chat.tokenizer.encode([(opening, True), (example.response, False)])
        return TrainingSequence(np.array(prompt + primer, np.int32), len(prompt), example.prompt_id, example.weight)
