"""An ensemble of named guards. It knows nothing of how a member decides."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal

from thinksafe.data.records import Response, Verdict
from thinksafe.guards.base import Decision, Guard

_BATCH_SIZE = 1024
"""Responses that every member judges before the next batch; the verdicts of a batch are kept if a later one fails."""


class Ensemble:
    """A guard whose decision is a vote of named guards, its members; `GuardConfig.voting` describes the rules."""

    def __init__(self, guards: Mapping[str, Guard], voting: Literal["all", "majority"]):
        self.name = f"{voting}({', '.join(guards)})"
        self._guards, self._voting = guards, voting

    def judge(self, responses: Iterable[Response]) -> Iterator[Verdict]:
        """Yield one verdict for each response, in order.

        `p_safe`, `p_unsafe` and, for an unsafe response, `category` come from the member with the highest share of
        unsafe. `refusal` is the members' common answer, or None if they disagree or none has one. `windows` is the
        largest number of any member. `labels` holds every member's probabilities as `member/meaning`, those of `safe`
        and `unsafe` included. `reason` of an unknown decision is that of the first undecided member, or
        `guards_disagree` if each member decided.
        """
        source = iter(responses)
        while batch := list(islice(source, _BATCH_SIZE)):
            verdicts_of_members = [list(guard.judge(batch)) for guard in self._guards.values()]
            for response, *verdicts in zip(batch, *verdicts_of_members, strict=True):
                yield self._combine(response, verdicts)

    def _combine(self, response: Response, verdicts: Sequence[Verdict]) -> Verdict:
        """Return the ensemble's verdict from the verdicts of all members, in their order."""
        decision = self._decide(Counter(verdict.decision for verdict in verdicts))
        unknown_reasons = [verdict.reason for verdict in verdicts if verdict.decision == "unknown"]
        worst = max(verdicts, key=lambda verdict: (verdict.p_unsafe is not None, verdict.unsafe_share or 0.0))
        refusals = {verdict.refusal for verdict in verdicts} - {None}
        labels = {}
        for member, verdict in zip(self._guards, verdicts, strict=True):
            probabilities = {"safe": verdict.p_safe, "unsafe": verdict.p_unsafe, **verdict.labels}
            labels |= {f"{member}/{name}": p for name, p in probabilities.items() if p is not None}
        return Verdict.of(
            response,
            self.name,
            decision,
            (unknown_reasons or ["guards_disagree"])[0] if decision == "unknown" else "",
            p_safe=worst.p_safe,
            p_unsafe=worst.p_unsafe,
            refusal=refusals.pop() if len(refusals) == 1 else None,
            category=worst.category if decision == "unsafe" else "",
            labels=labels,
            windows=max(verdict.windows for verdict in verdicts),
        )

    def _decide(self, votes: Counter[str]) -> Decision:
        """Return the ensemble's decision from the number of members with each decision."""
        if self._voting == "all":
            return "unsafe" if votes["unsafe"] else "unknown" if votes["unknown"] else "safe"
        return next((decision for decision in ("safe", "unsafe") if 2 * votes[decision] > votes.total()), "unknown")
