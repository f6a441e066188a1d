"""Selection of the response to keep for each prompt, and the audit record that explains it. It knows nothing of files.

We keep the first accepted response of each prompt, in order of rung and sample. It is a sample from the student's
filtered distribution, as the paper's theory requires; the guard's favorite or the shortest response would be a sample
from another distribution. A response that a person accepted takes precedence over
responses that only a guard accepted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from thinksafe.data.records import Example, Mark, Response, Verdict, content_id

KEPT, NOT_NEEDED, REJECTED_BY_PERSON = "kept", "not_needed", "rejected_by_person"


@dataclass(frozen=True)
class Attempt:
    """A response, the guard's verdict on it, and people's marks on it in the order in which they were made."""

    response: Response
    verdict: Verdict
    marks: Sequence[Mark] = ()

    @property
    def human_decision(self) -> Literal["accept", "reject"] | None:
        """The decision of the people who marked the response: one rejection is enough. None without marks."""
        decisions = {mark.by: mark.decision for mark in self.marks}.values()  # the last mark of each person counts
        return ("reject" if "reject" in decisions else "accept") if decisions else None

    @property
    def accepted_by(self) -> str:
        """The guard's name, or `person: ` and the people's names; empty if the response is not accepted.

        People cannot accept a dropped response (truncated, think block not closed): training cannot use it.
        """
        if self.verdict.decision == "dropped" or self.human_decision == "reject":
            return ""
        if self.human_decision == "accept":
            return "person: " + ", ".join(sorted({mark.by for mark in self.marks}))
        return self.verdict.guard if self.verdict.decision == "safe" else ""

    @property
    def example(self) -> Example:
        """The training example if this attempt is kept: the prompt without steering."""
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
        """The reason why the response is not accepted."""
        return REJECTED_BY_PERSON if self.human_decision == "reject" else self.verdict.reason


def choose(attempts: Iterable[Attempt]) -> Attempt | None:
    """Return the attempt to keep among the attempts at one prompt, or None if none is accepted."""
    accepted = [attempt for attempt in attempts if attempt.accepted_by]
    return min(accepted, key=lambda a: (a.human_decision != "accept", a.response.rung, a.response.sample), default=None)


def audit_record(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Return the line of audit.jsonl for one prompt: all attempts and their outcomes, without the
    texts of the responses.

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
