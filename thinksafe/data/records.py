"""The records that flow through a run, and their JSONL form. Nothing else knows how a record is spelled in a file.

Prompt -> Response -> Verdict -> Example. Ids are hashes of content, so the same prompt has the same id in every run.
A file's lines are JSON objects with the dataclass's fields; prompts may also come as SafeChain's columns
`instruction` and `label`, and as parquet.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeVar

Label = Literal["harmful", "benign"]


@dataclass(frozen=True)
class Prompt:
    """Something a user asks.

    Attributes:
        id: hash of label and text.
        text: what the user wrote; data, never markup.
        label: whether answering it would be harmful.
        source: where it comes from, for the report.
        answer: the expected final answer, for reasoning sets; None elsewhere.
    """

    id: str
    text: str
    label: Label
    source: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class Response:
    """One sampled response.

    Attributes:
        prompt_id, prompt, label: of the prompt without steering; the id may be left out.
        steering: name of the instruction that was put around the prompt, or None.
        sample: index among the responses to this prompt, over all rungs.
        rung: of the steering ladder; 0 is the first attempt.
        text: think block and answer as text, `<think>` included where the chat template supplies it.
        num_prompt_tokens, num_tokens: of the generation.
        finish_reason: `stop`, `length`, `loop` where it only repeated itself, or `nan` where the model's logits broke.
        seed: of the request.
    """

    prompt: str
    label: Label
    text: str
    prompt_id: str = ""
    steering: str | None = None
    sample: int = 0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    finish_reason: Literal["stop", "length", "loop", "nan"] = "stop"
    seed: int = 0
    rung: int = 0

    def __post_init__(self):
        _fill_prompt_id(self)

    @property
    def key(self) -> str:
        """Unique in a shard."""
        return f"{self.prompt_id}/{self.sample}"


@dataclass(frozen=True)
class Verdict:
    """What became of a response.

    Attributes:
        decision: only `safe` is ever trained on.
        reason: why it is not, or empty; `no_verdict` also where the reference preset calls that safe.
        p_safe, p_unsafe: the guard's probabilities at the verdict position; None where no guard was asked.
        refusal: whether the response refuses; None where the guard cannot tell.
        category: of harm, the likeliest, where the response is unsafe and the guard tells; else empty.
        windows: how many pieces of the response were judged; the probabilities are of the worst.
        labels: probabilities of whatever else the guard says, by its meaning.
        rung: of the response.
    """

    prompt_id: str
    sample: int
    label: Label
    steering: str | None
    decision: Literal["safe", "unsafe", "unknown", "dropped"]
    reason: str
    p_safe: float | None
    p_unsafe: float | None
    refusal: bool | None
    guard: str
    category: str = ""
    windows: int = 1
    labels: dict[str, float] = field(default_factory=dict)
    rung: int = 0

    @property
    def key(self) -> str:
        """That of the response."""
        return f"{self.prompt_id}/{self.sample}"


@dataclass(frozen=True)
class Example:
    """What is trained on: the prompt without steering, and the accepted response.

    Attributes:
        sample, rung: of the response.
        accepted_by: the guard, or `person: ` and a name.
        weight: of the example in the training loss, positive.
    """

    prompt: str
    response: str
    label: Label
    prompt_id: str = ""
    sample: int = 0
    rung: int = 0
    accepted_by: str = ""
    weight: float = 1.0

    def __post_init__(self):
        _fill_prompt_id(self)
        if not 0 < self.weight < math.inf:
            raise ValueError("weight must be positive and finite")


@dataclass(frozen=True)
class Mark:
    """A person's word on a response.

    Attributes:
        prompt_id, sample: of the response.
        text_id: `content_id` of its text, so that no mark lands on a text that nobody read.
        by: who says so.
        at: when, ISO 8601.
    """

    prompt_id: str
    sample: int
    text_id: str
    decision: Literal["accept", "reject"]
    by: str
    at: str

    def __post_init__(self):
        if not self.by.strip():
            raise ValueError("by must name who marked")
        try:
            known = self.moment.tzinfo is not None
        except ValueError:
            known = False
        if not known:
            raise ValueError(f"at must be a time with its zone, such as 2026-01-31T12:00:00Z, found {self.at!r}")

    @property
    def moment(self) -> datetime:
        """`at` as a time."""
        return datetime.fromisoformat(self.at)


Record = TypeVar("Record", Prompt, Response, Verdict, Example, Mark)


def _fill_prompt_id(record: Response | Example) -> None:
    if not record.prompt_id:
        object.__setattr__(record, "prompt_id", content_id(record.label, record.prompt))


def content_hash(parts: Iterable[str]) -> str:
    """Hex digits of SHA-256 over the parts."""
    return hashlib.sha256("\x00".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def content_id(*parts: str) -> str:
    """The first 16 digits of `content_hash`."""
    return content_hash(parts)[:16]
