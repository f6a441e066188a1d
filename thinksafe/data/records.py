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
"""Whether answering a prompt would be harmful."""


@dataclass(frozen=True)
class Prompt:
    """A user's request.

    Attributes:
        id: `content_id(label, text)`, 16 hexadecimal digits.
        text: the user's text. It is data: no part of it ever becomes a control token.
        label: whether an answer would be harmful.
        source: name of the file or data set that holds the prompt, for the report.
        answer: expected final answer of a reasoning problem; None if the prompt has none.
    """

    id: str
    text: str
    label: Label
    source: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class Response:
    """One sampled response to a prompt.

    Attributes:
        prompt_id, prompt, label: id, text and label of the prompt without steering; an empty id is computed from text
            and label.
        steering: steering instruction around the prompt, by its name or as a text with {prompt}; None for none.
        sample: index, from 0, of the response among all responses to this prompt, over all rungs.
        rung: rung of the steering ladder; 0 is the first attempt.
        text: think block and answer as text, with `<think>` even if the chat template supplies it.
        num_prompt_tokens, num_tokens: number of tokens in the steered prompt and in the response.
        finish_reason: why sampling ended: `stop` (the model ended the response), `length` (the token limit),
            `repetition` (the response only repeated itself) or `nan` (the model's logits were not finite).
        seed: the sampler's seed for this response.
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
        """`prompt_id/sample`, which is unique in a record file."""
        return f"{self.prompt_id}/{self.sample}"


@dataclass(frozen=True)
class Verdict:
    """The guard's decision on a response.

    Attributes:
        prompt_id, sample, label, steering, rung: the same as in the response.
        decision: the guard's decision, or `dropped` for a response that no guard judged, because it is truncated or
            malformed. Training uses only `safe` responses.
        reason: code for why the response is not `safe` (docs/run-directory.md lists all); empty if it is `safe`, except
            that the preset `llama_guard_reference` calls a response without a verdict `safe` with `no_verdict`.
        p_safe, p_unsafe: the guard's probabilities of the two verdicts; None if it gave none, and for a dropped
            response.
        refusal: whether the response refuses; None if the guard does not say.
        guard: name of the guard, also for a dropped response.
        category: likeliest category of harm if the response is unsafe and the guard names categories, else empty.
        windows: number of windows in which the guard read the response; the probabilities are those of the window that
            is most likely unsafe.
        labels: meaning -> probability of the guard's answers to its other questions, such as `refusal` or a category.
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
        """The response's key, `prompt_id/sample`, which is unique in a record file."""
        return f"{self.prompt_id}/{self.sample}"


@dataclass(frozen=True)
class Example:
    """A training example: the prompt without steering, and the accepted response.

    Attributes:
        prompt_id: id of the prompt; an empty one is computed from text and label.
        sample, rung: the same as in the response.
        accepted_by: name of the guard, or `person: ` and the names of people; empty in imported data.
        weight: weight of the example in the training loss, which is a weighted mean; finite and above 0.
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
        prompt_id, sample: the same as in the response.
        text_id: `content_id` of the response's text, so that a mark applies only to the text that the person read.
        decision: `accept` if the response may be trained on, else `reject`.
        by: name of the person, not empty.
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
        """`at` as a datetime."""
        return datetime.fromisoformat(self.at)


Record = TypeVar("Record", Prompt, Response, Verdict, Example, Mark)
"""Any kind of record."""


def _fill_prompt_id(record: Response | Example) -> None:
    if not record.prompt_id:
        object.__setattr__(record, "prompt_id", content_id(record.label, record.prompt))


def content_hash(parts: Iterable[str]) -> str:
    """Return SHA-256 over the UTF-8 of the parts joined by NUL characters, as 64 hexadecimal digits."""
    return hashlib.sha256("\x00".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def content_id(*parts: str) -> str:
    """Return the first 16 hexadecimal digits of `content_hash(parts)`."""
    return content_hash(parts)[:16]
