"""SafeKey (arXiv 2505.16186): further losses on the sentence in which the thought turns to safety, the key sentence."""

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from thinksafe.data.jsonl import Row
from thinksafe.data.records import Example, Label
from thinksafe.errors import UserError
from thinksafe.methods.given_data import GivenData, reasoning_example, text_in
from thinksafe.section import Bounds
from thinksafe.text.chat import Chat
from thinksafe.training.config import TrainingConfig
from thinksafe.training.sequence import LateLosses, SafetySpan, TrainingSequence


@dataclass(frozen=True)
class KeySentenceExample(Example):
    """An example whose thought first summarizes the prompt; the key sentence follows.

    Attributes:
        summary_end, key_end: index in `response` of the first character after the summary, and after the key sentence.
    """

    summary_end: int = 0
    key_end: int = 0


@dataclass(frozen=True)
class SafeKey(GivenData):
    """The method: SafeKey, which is STAR-1 and benign examples with two further losses in the last epochs.

    The first is the cross-entropy of the key sentence without the prompt. The second is that of two linear heads, which
    predict from the states of the summary whether the prompt is harmful.
    """

    columns: ClassVar[tuple[str, ...]] = ("question", "response", "source", "summary_end_idx", "next_sentence_end_idx")
    published_counts: ClassVar[dict[Label, int]] = {"harmful": 1000, "benign": 915}
    example_type: ClassVar[type[Example]] = KeySentenceExample
    has_safety_heads: ClassVar[bool] = True

    type: Literal["safekey"] = "safekey"
    """Name of the method."""
    source: str = ""
    """File with the columns `question`, `response`, `source`, `summary_end_idx` and `next_sentence_end_idx`. The
    published one is data/sft_mix_2k.json of the repository eric-ai-lab/SafeKey, which has no licence."""
    key_weight: Annotated[float, Bounds(ge=0)] = 0.2
    """Weight of the loss of the key sentence."""
    head_weight: Annotated[float, Bounds(ge=0)] = 0.2
    """Weight of the loss of the two heads."""
    last_epochs: Annotated[int, Bounds(ge=1)] = 2
    """Number of epochs, the last ones, with the two further losses."""

    def check(self) -> None:
        if not self.source:
            raise ValueError(
                "source: missing; download data/sft_mix_2k.json from the GitHub repository eric-ai-lab/SafeKey (commit "
                "8a03a94) and name the file"
            )

    def check_settings(self, generation: Any, training: TrainingConfig) -> None:
        if training.loss_reduction != "sequence":
            raise ValueError("training.loss_reduction: method safekey needs sequence, the mean over each example")

    def example_of(self, row: Row) -> Example | str:
        label = "benign" if row.values["source"] == "4o_rewrite" else "harmful"
        text = text_in(row, "response").replace("\\/", "/")  # as in the published training, to which the indices refer
        example = reasoning_example(text_in(row, "question"), text, label)
        if isinstance(example, str):
            return example
        summary_end, key_end = row.values["summary_end_idx"], row.values["next_sentence_end_idx"]
        if not all(type(index) is int for index in (summary_end, key_end)):
            raise UserError(f"{row.where}: summary_end_idx and next_sentence_end_idx must be whole numbers")
        if not len("<think>\n") < summary_end < key_end <= example.response.index("</think>"):
            return "no_key_sentence"
        return KeySentenceExample(example.prompt, example.response, label, summary_end=summary_end, key_end=key_end)

    def training_sequence(self, example: KeySentenceExample, chat: Chat) -> LateLosses:
        early = super().training_sequence(example, chat)
        start = early.num_prompt_tokens
        response = early.input_ids[start:].tolist()

        def token_at(index: int) -> int:
            """Return the index in `response` of the token that holds a character of the example's response."""
            return bisect_right(range(len(response)), index, key=lambda count: len(chat.decode(response[:count]))) - 1

        first, end = token_at(example.summary_end), token_at(example.key_end - 1) + 1
        span = SafetySpan(start, start + first, example.label == "harmful", self.head_weight)
        key_ids = np.array(response[:end], np.int32)
        # Without the prompt, the tokens of the thought stand alone; rotary embeddings see distances only.
        key = TrainingSequence(key_ids, first, early.name, early.weight * self.key_weight, is_in_mean=False)
        return LateLosses(early, (replace(early, safety_span=span), key), self.last_epochs)
