"""Selection of the response to keep for each prompt, and the audit record that explains it. It knows nothing of files.

We keep the first accepted response of each prompt, in order of rung and sample. It is a sample from the student's
filtered distribution, as the paper's theory requires; the guard's favorite or the shortest response would be a sample
from another distribution. A response that a person accepted takes precedence over responses that only a guard
accepted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from thinksafe.data.records import Example, Mark, Response, Verdict, content_id

KEPT, NOT_NEEDED, REJECTED_BY_PERSON = "kept", "not_needed", "rejected_by_person"
"""Outcomes of an attempt; the other outcomes are the reasons of verdicts."""


@dataclass(frozen=True)
class Attempt:
    """A response, the guard's verdict on it, and people's marks on it.

    Attributes:
        marks: in the order in which they were made; empty if no person marked the response.
    """

    response: Response
    verdict: Verdict
    marks: Sequence[Mark] = ()

    @property
    def human_decision(self) -> Literal["accept", "reject"] | None:
        """`reject` if the last mark of any person rejects the response, else `accept`; None without marks."""
        decisions = {mark.by: mark.decision for mark in self.marks}.values()  # the last mark of each person counts
        return ("reject" if "reject" in decisions else "accept") if decisions else None

    @property
    def accepted_by(self) -> str:
        """`person: ` and their names if people accept the response; the guard's name if only its verdict is `safe`;
        empty if the response is not accepted.

        A person's rejection outweighs the guard. People cannot accept a dropped response (truncated, think block not
        closed): training cannot use it.
        """
        if self.verdict.decision == "dropped" or self.human_decision == "reject":
            return ""
        if self.human_decision == "accept":
            return "person: " + ", ".join(sorted({mark.by for mark in self.marks}))
        return self.verdict.guard if self.verdict.decision == "safe" else ""

    @property
    def example(self) -> Example:
        """The training example of an accepted attempt: the prompt without steering, and the response."""
        response = self.response
        return Example(
            prompt=response.prompt,
            response=response.text,
            label=response.label,
            prompt_id=response.prompt_id,
            sample=response.sample,
            rung=response.rung,
            accepted_by=self.accepted_by,
        )

    @property
    def rejection_reason(self) -> str:
        """The reason why the response is not accepted: `rejected_by_person`, or else the reason of the verdict."""
        return REJECTED_BY_PERSON if self.human_decision == "reject" else self.verdict.reason


def choose(attempts: Iterable[Attempt]) -> Attempt | None:
    """Return the attempt at one prompt whose response is trained on, or None if no attempt is accepted.

    It is the accepted attempt with the lowest (rung, sample); attempts that a person accepted come before all others.
    """
    accepted = [attempt for attempt in attempts if attempt.accepted_by]
    return min(accepted, key=lambda a: (a.human_decision != "accept", a.response.rung, a.response.sample), default=None)


def audit_record(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Return the record of audit.jsonl for one prompt: all attempts and their outcomes, without the responses' texts.

    `accepted_by`, `rung` and `sample` are those of the kept attempt; without one, '', None and None.

    Args:
        attempts: all attempts at the prompt, at least one, in order of rung and sample.
    """
    kept, response = choose(attempts), attempts[0].response
    return {
        "prompt_id": response.prompt_id,
        "label": response.label,
        "prompt": response.prompt,
        "accepted": kept is not None,
        "accepted_by": kept.accepted_by if kept else "",
        "rung": kept.response.rung if kept else None,
        "sample": kept.response.sample if kept else None,
        "attempts": [_attempt_entry(attempt, kept) for attempt in attempts],
    }


def _attempt_entry(attempt: Attempt, kept: Attempt | None) -> dict[str, Any]:
    """Return an attempt's entry in the audit record; `kept` is the prompt's attempt that is trained on, if any."""
    response, verdict = vars(attempt.response), vars(attempt.verdict)
    outcome = KEPT if attempt is kept else NOT_NEEDED if attempt.accepted_by else attempt.rejection_reason
    response_fields = ("rung", "sample", "steering", "seed", "num_prompt_tokens", "num_tokens", "finish_reason")
    verdict_fields = ("guard", "decision", "reason", "p_safe", "p_unsafe", "category", "labels", "refusal", "windows")
    return {
        **{name: response[name] for name in response_fields},
        "text_id": content_id(attempt.response.text),
        **{name: verdict[name] for name in verdict_fields},
        "marks": [{"decision": mark.decision, "by": mark.by, "at": mark.at} for mark in attempt.marks],
        "outcome": outcome,
    }
