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
        id: `content_id(label, text)`.
        text: the user's text. It is data: no part of it ever becomes a control token.
        source: name of the file or data set that holds the prompt.
        answer: expected final answer of a reasoning problem.
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
            `repetition` (the response only repeated itself), `nan` (the model's logits were not finite) or
            `invalid_utf8` (the model ended the response, but some of its tokens are bytes of no character, so the text
            has other tokens).
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
    finish_reason: Literal["stop", "length", "repetition", "nan", "invalid_utf8"] = "stop"
    seed: int = 0
    rung: int = 0

    def __post_init__(self):
        _check_counts(self, "sample", "rung", "num_prompt_tokens", "num_tokens")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit in 64 bits (found {self.seed})")
        _fill_prompt_id(self)

    @property
    def key(self) -> str:
        """`prompt_id/sample`, which is unique in a record file."""
        return f"{self.prompt_id}/{self.sample}"


@dataclass(frozen=True)
class Verdict:
    """A guard's decision on a response.

    Attributes:
        prompt_id, sample, label, steering, rung: the same as in the response.
        decision: `unknown` if the guard cannot judge the response, or `dropped` for a truncated or malformed response
            that no guard judged. Training uses only `safe` responses.
        reason: code for why the response is not `safe` (docs/run-directory.md lists all); empty if it is `safe`, except
            that the guard `llama_guard_reference` calls a response without a verdict `safe` with `no_verdict`.
        p_safe, p_unsafe: probabilities of the two verdicts over the guard's whole vocabulary, from the worst window:
            the unsafe window, or else any window, with the highest odds of unsafe. None if no window has them.
        refusal: whether the response refuses; None if the guard does not say.
        guard: name of the guard, also for a dropped response.
        category: likeliest category of harm if the response is unsafe and the guard names categories, else empty.
        windows: number of windows in which the guard read the response, 0 if it could not read it.
        labels: meaning -> probability of the guard's answers to its other questions, such as `refusal` or a category,
            from the worst window.
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

    @classmethod
    def of(cls, response: Response, guard: str, decision: str, reason: str = "", **fields) -> "Verdict":
        """Return a verdict on a response. The reason of an unsafe one is `unsafe`; a probability or `refusal` that
        `fields` leaves out is None."""
        fields = {"p_safe": None, "p_unsafe": None, "refusal": None} | fields
        fields |= {name: getattr(response, name) for name in ("prompt_id", "sample", "label", "steering", "rung")}
        reason = "unsafe" if decision == "unsafe" else reason
        return cls(guard=guard, decision=decision, reason=reason, **fields)

    @property
    def key(self) -> str:
        """The response's key, `prompt_id/sample`, which is unique in a record file."""
        return f"{self.prompt_id}/{self.sample}"

    @property
    def unsafe_share(self) -> float | None:
        """P(unsafe) / (P(safe) + P(unsafe)), which is compared with the guard's threshold; None without a verdict."""
        if self.p_safe is None or self.p_unsafe is None or not self.p_safe + self.p_unsafe > 0:
            return None
        return self.p_unsafe / (self.p_safe + self.p_unsafe)


@dataclass(frozen=True)
class Example:
    """A training example: the prompt without steering, and the accepted response.

    Attributes:
        prompt_id, sample, rung: the same as in the response.
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
        _check_counts(self, "sample", "rung")
        _fill_prompt_id(self)
        if not 0 < self.weight < math.inf:
            raise ValueError("weight must be positive and finite")


@dataclass(frozen=True)
class Mark:
    """A person's decision on a response.

    Attributes:
        text_id: `content_id` of the response's text, so that a mark applies only to the text that the person read.
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


@dataclass(frozen=True)
class AuditMark:
    """A mark in an audit record; its fields are those of the `Mark`."""

    decision: Literal["accept", "reject"]
    by: str
    at: str


@dataclass(frozen=True)
class AuditAttempt:
    """An attempt in an audit record: fields of response, verdict and marks, and what became of the response (`outcome`:
    `kept`, `not_needed`, `rejected_by_person` or the verdict's reason)."""

    rung: int
    sample: int
    steering: str | None
    seed: int
    num_prompt_tokens: int
    num_tokens: int
    finish_reason: str
    text_id: str
    guard: str
    decision: Literal["safe", "unsafe", "unknown", "dropped"]
    reason: str
    p_safe: float | None
    p_unsafe: float | None
    category: str
    labels: dict[str, float]
    refusal: bool | None
    windows: int
    marks: list[AuditMark]
    outcome: str


@dataclass(frozen=True)
class AuditRecord:
    """All attempts at a prompt, in order of rung and sample; `accepted_by`, `rung` and `sample` are those of the kept
    attempt, and '', None and None without one."""

    prompt_id: str
    label: Label
    prompt: str
    accepted: bool
    accepted_by: str
    rung: int | None
    sample: int | None
    attempts: list[AuditAttempt]


Record = TypeVar("Record", Prompt, Response, Verdict, Example, Mark, AuditRecord)
"""Any kind of record."""


def _check_counts(record: Response | Example, *names: str) -> None:
    """Raise ValueError if a field is negative, or too large for the 32 bits that it has in an exported data set."""
    for name in names:
        if not 0 <= (count := getattr(record, name)) < 2**31:
            raise ValueError(f"{name} must be at least 0 and below 2^31 (found {count})")


def _fill_prompt_id(record: Response | Example) -> None:
    if not record.prompt_id:
        object.__setattr__(record, "prompt_id", content_id(record.label, record.prompt))


def content_hash(parts: Iterable[str]) -> str:
    """Return SHA-256 over the UTF-8 of the parts joined by NUL characters, as 64 hexadecimal digits."""
    return hashlib.sha256("\x00".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def content_id(*parts: str) -> str:
    """Return the first 16 hexadecimal digits of `content_hash(parts)`."""
    return content_hash(parts)[:16]
