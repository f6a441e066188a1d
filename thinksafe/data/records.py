"""The records that flow through a run: Prompt -> Response -> Verdict -> Example, and a person's Mark on a response.

Each line of a record file is a JSON object with the fields of one of these dataclasses; jsonl.py reads and writes the
lines. Ids are hashes of content, so the same prompt has the same id in every run.
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
    """A user's request.

    Attributes:
        id: hash of label and text.
        text: the user's text. It is data: no part of it ever becomes a control token.
        label: whether an answer would be harmful.
        source: name of the file or data set that holds the prompt, for the report.
        answer: expected final answer of a reasoning problem; None for other prompts.
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
        prompt_id, prompt, label: id, text and label of the prompt without steering; a missing id is computed.
        steering: steering instruction around the prompt, by its name or as a text with {prompt}; None for none.
        sample: index of the response among all responses to this prompt, over all rungs.
        rung: rung of the steering ladder; 0 is the first attempt.
        text: think block and answer as text, with `<think>` even if the chat template supplies it.
        num_prompt_tokens, num_tokens: number of tokens in the steered prompt and in the response.
        finish_reason: why sampling ended: `stop` (the model ended the response), `length` (the token limit),
            `repetition` (the response only repeated itself) or `nan` (the model's logits were not finite).
        seed: seed of the request.
    """

    prompt: str
    label: Label
    text: str
    prompt_id: str = ""
    steering: str | None = None
    sample: int = 0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    finish_reason: Literal["stop", "length", "repetition", "nan"] = "stop"
    seed: int = 0
    rung: int = 0

    def __post_init__(self):
        _fill_prompt_id(self)

    @property
    def key(self) -> str:
        """Key that is unique in a record file."""
        return f"{self.prompt_id}/{self.sample}"


@dataclass(frozen=True)
class Verdict:
    """The decision on a response.

    Attributes:
        prompt_id, sample, label, steering, rung: fields of the response.
        decision: the guard's decision, or `dropped` for a response that no guard judged, because it is truncated or
            malformed. Training uses only `safe` responses.
        reason: why the response is not `safe`, or empty. The reference preset counts a missing verdict as `safe`; the
            reason is then `no_verdict`.
        p_safe, p_unsafe: the guard's probabilities at the verdict position; None without a guard's verdict.
        refusal: whether the response refuses; None if the guard does not say.
        guard: name of the guard.
        category: likeliest category of harm if the response is unsafe and the guard names categories, else empty.
        windows: number of windows in which the guard read the response; the probabilities are of the worst window.
        labels: probabilities of the guard's other labels, by their meaning.
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
        """The key of the response."""
        return f"{self.prompt_id}/{self.sample}"


@dataclass(frozen=True)
class Example:
    """A training example: the prompt without steering, and the accepted response.

    Attributes:
        sample, rung: fields of the response.
        accepted_by: name of the guard, or `person: ` and the names of people.
        weight: positive weight of the example in the training loss.
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
    """A person's decision on a response.

    Attributes:
        prompt_id, sample: fields of the response.
        text_id: `content_id` of the response's text, so that a mark applies only to the text that the person read.
        by: name of the person.
        at: time of the mark, ISO 8601 with a time zone.
    """

    prompt_id: str
    sample: int
    text_id: str
    decision: Literal["accept", "reject"]
    by: str
    at: str

    def __post_init__(self):
        if not self.by.strip():
            raise ValueError("by must name the person who made the mark")
        try:
            has_zone = self.timestamp.tzinfo is not None
        except ValueError:
            has_zone = False
        if not has_zone:
            raise ValueError(f"at must be a time with a time zone, such as 2026-01-31T12:00:00Z, found {self.at!r}")

    @property
    def timestamp(self) -> datetime:
        """The time of the mark."""
        return datetime.fromisoformat(self.at)


Record = TypeVar("Record", Prompt, Response, Verdict, Example, Mark)


def _fill_prompt_id(record: Response | Example) -> None:
    if not record.prompt_id:
        object.__setattr__(record, "prompt_id", content_id(record.label, record.prompt))


def content_hash(parts: Iterable[str]) -> str:
    """Return the hex digest of SHA-256 over the parts, joined by NUL characters."""
    return hashlib.sha256("\x00".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def content_id(*parts: str) -> str:
    """Return the first 16 digits of `content_hash`."""
    return content_hash(parts)[:16]
