"""Which response to a prompt is kept, and the whole story of why. Knows guards' verdicts and people's marks, no files.

One response a prompt is kept: the first that was accepted, in order of rung and sample. The first is a draw from what
the filter leaves of the student's own distribution, as the paper's theory has it; the guard's favourite, or the
shortest, would be a draw from another one. What a person accepted goes before what only a guard did.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from thinksafe.data.records import Example, Mark, Response, Verdict, content_id

KEPT, SPARE, REJECTED_BY_PERSON = "kept", "spare", "rejected_by_person"


@dataclass(frozen=True)
class Attempt:
    """A response, the guard's verdict on it, and what people said, in the order in which they said it."""

    response: Response
    verdict: Verdict
    marks: Sequence[Mark] = ()

    @property
    def person(self) -> Literal["accept", "reject"] | None:
        """The people's word: one who rejects is enough. None where nobody looked."""
        words = {mark.by: mark.decision for mark in self.marks}.values()  # who marks twice has changed their mind
        return ("reject" if "reject" in words else "accept") if words else None

    @property
    def accepted_by(self) -> str:
        """The guard's name, or `person: ` and theirs; empty if the response is not accepted.

        A response that cannot be trained on (cut off, no closed think block) is nobody's to accept.
        """
        if self.verdict.decision == "dropped" or self.person == "reject":
            return ""
        if self.person == "accept":
            return "person: " + ", ".join(sorted({mark.by for mark in self.marks}))
        return self.verdict.guard if self.verdict.decision == "safe" else ""

    @property
    def example(self) -> Example:
        """What is trained on if this attempt is kept: the prompt without steering."""
        response = self.response
        about = (response.prompt_id, response.sample, response.rung)
        return Example(response.prompt, response.text, response.label, *about, self.accepted_by)

    @property
    def rejection(self) -> str:
        """Why it is not accepted."""
        return REJECTED_BY_PERSON if self.person == "reject" else self.verdict.reason


def choose(attempts: Iterable[Attempt]) -> Attempt | None:
    """The attempt at one prompt that is kept, if any."""
    accepted = [attempt for attempt in attempts if attempt.accepted_by]
    return min(accepted, key=lambda a: (a.person != "accept", a.response.rung, a.response.sample), default=None)


def story(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Everything that happened to one prompt, as a line of audit.jsonl; the texts are in the shards of responses.

    Args:
        attempts: all that were made, at least one, in order of rung and sample.
    """
    kept, first = choose(attempts), attempts[0].response
    return {
        "prompt_id": first.prompt_id,
        "label": first.label,
        "prompt": first.prompt,
        "accepted": kept is not None,
        "accepted_by": kept.accepted_by if kept else "",
        "rung": kept.response.rung if kept else None,
        "sample": kept.response.sample if kept else None,
        "attempts": [_told(attempt, kept) for attempt in attempts],
    }


def _told(attempt: Attempt, kept: Attempt | None) -> dict[str, Any]:
    response, verdict = vars(attempt.response), vars(attempt.verdict)
    fate = KEPT if attempt is kept else SPARE if attempt.accepted_by else attempt.rejection
    told = ("rung", "sample", "steering", "seed", "num_prompt_tokens", "num_tokens", "finish_reason")
    found = ("guard", "decision", "reason", "p_safe", "p_unsafe", "category", "labels", "refusal", "windows")
    return {
        **{name: response[name] for name in told},
        "text_id": content_id(attempt.response.text),
        **{name: verdict[name] for name in found},
        "marks": [{"decision": mark.decision, "by": mark.by, "at": mark.at} for mark in attempt.marks],
        "fate": fate,
    }
