"""Selection of the response to keep for each prompt, and the audit record that explains it. It knows nothing of files.

We keep the first accepted response of each prompt, in order of rung and sample. It is a sample from the student's
filtered distribution, as the paper's theory requires; the guard's favorite or the shortest response would be a sample
from another distribution. A response that a person accepted takes precedence over responses that only a guard
accepted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from thinksafe.data.records import AuditAttempt, AuditMark, AuditRecord, Example, Mark, Response, Verdict, content_id

KEPT, NOT_NEEDED, REJECTED_BY_PERSON = "kept", "not_needed", "rejected_by_person"
"""Outcomes of an attempt; the other outcomes are the reasons of verdicts."""


@dataclass(frozen=True)
class Attempt:
    """A response, the guard's verdict on it, and people's marks on it in the order in which they were made."""

    response: Response
    verdict: Verdict
    marks: Sequence[Mark] = ()

    @property
    def human_decision(self) -> Literal["accept", "reject"] | None:
        """`reject` if the last mark of any person rejects the response, else `accept`; None without marks."""
        decisions = last_decisions(self.marks)
        return ("reject" if "reject" in decisions else "accept") if decisions else None

    @property
    def accepted_by(self) -> str:
        """`person: ` and their names if people accept the response; the guard's name if only its verdict is `safe`;
        empty if it is not accepted. A person's rejection outweighs the guard. People cannot accept a dropped response:
        training cannot use it."""
        if self.verdict.decision == "dropped" or self.human_decision == "reject":
            return ""
        if self.human_decision == "accept":
            return "person: " + ", ".join(sorted({mark.by for mark in self.marks}))
        return self.verdict.guard if self.verdict.decision == "safe" else ""

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of response and verdict by name, and `text_id`, the `content_id` of the response's text."""
        return vars(self.verdict) | vars(self.response) | {"text_id": content_id(self.response.text)}

    @property
    def audit_marks(self) -> list[AuditMark]:
        """The marks as an audit record holds them."""
        return [AuditMark(mark.decision, mark.by, mark.at) for mark in self.marks]

    @property
    def example(self) -> Example:
        """The training example of an accepted attempt: the prompt without steering, and the response."""
        r = self.response
        return Example(r.prompt, r.text, r.label, r.prompt_id, r.sample, r.rung, self.accepted_by)


def last_decisions(marks: Iterable[Mark | AuditMark]) -> set[str]:
    """Return the decisions that count: that of the last mark of each person."""
    return set({mark.by: mark.decision for mark in marks}.values())


def choose(attempts: Iterable[Attempt]) -> Attempt | None:
    """Return the attempt at one prompt whose response is trained on, or None if no attempt is accepted.

    It is the accepted attempt with the lowest (rung, sample); attempts that a person accepted come before all others.
    """
    accepted = [attempt for attempt in attempts if attempt.accepted_by]
    return min(accepted, key=lambda a: (a.human_decision != "accept", a.response.rung, a.response.sample), default=None)


def audit_record(attempts: Sequence[Attempt], kept: Attempt | None) -> AuditRecord:
    """Return the audit record of one prompt from all attempts at it, at least one, in order of rung and sample, and the
    attempt that is trained on, if any."""
    response = attempts[0].response
    return AuditRecord(
        response.prompt_id,
        response.label,
        response.prompt,
        accepted=kept is not None,
        accepted_by=kept.accepted_by if kept else "",
        rung=kept.response.rung if kept else None,
        sample=kept.response.sample if kept else None,
        attempts=[_audit_attempt(attempt, kept) for attempt in attempts],
    )


def _audit_attempt(attempt: Attempt, kept: Attempt | None) -> AuditAttempt:
    if attempt is kept:
        outcome = KEPT
    elif attempt.accepted_by:
        outcome = NOT_NEEDED
    else:
        outcome = REJECTED_BY_PERSON if attempt.human_decision == "reject" else attempt.verdict.reason
    fields = attempt.fields | {"marks": attempt.audit_marks, "outcome": outcome}
    return AuditAttempt(**{name: fields[name] for name in AuditAttempt.__dataclass_fields__})
