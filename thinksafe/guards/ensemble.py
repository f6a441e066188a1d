"""An ensemble of named guards. It knows nothing of how a member decides."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Literal

from thinksafe.guards.base import Guard, GuardResult, PromptResponse

_BATCH_SIZE = 1024
"""Pairs that every member judges before the next batch; the results of a batch are kept if a later one fails."""


class Ensemble:
    """A guard whose decision is a vote of several guards, its members.

    `all`: unsafe if one member says unsafe, else unknown if one member says unknown, else safe. `majority`: safe or
    unsafe if more than half of all members say so, else unknown.

    Attributes:
        name: the rule and the members' names, such as `all(a, b)`.
    """

    def __init__(self, guards: Mapping[str, Guard], voting: Literal["all", "majority"]):
        """Combine guards.

        Args:
            guards: name of a member -> member; results name the members by these names.
            voting: rule of the vote.
        """
        self.name = f"{voting}({', '.join(guards)})"
        self._guards, self._voting = guards, voting

    def judge(self, pairs: Iterable[PromptResponse]) -> Iterator[GuardResult]:
        """Yield one result for each pair, in order.

        `p_safe`, `p_unsafe` and, for an unsafe response, `category` come from the member with the highest
        P(unsafe) / (P(safe) + P(unsafe)). `refusal` is the members' common answer, or None if they disagree or none has
        one. `windows` is the largest number of any member. `labels` holds every member's probabilities as
        `member/meaning`, those of `safe` and `unsafe` included. `reason` of an unknown decision is that of the first
        undecided member, or `guards_disagree` if each member decided.
        """
        source = iter(pairs)
        while batch := list(islice(source, _BATCH_SIZE)):
            results_by_member = [
                {result.id: result for result in guard.judge(batch)} for guard in self._guards.values()
            ]
            for pair in batch:
                yield self._combine([results[pair.id] for results in results_by_member])

    def _combine(self, results: list[GuardResult]) -> GuardResult:
        """Return the ensemble's result for one pair from the results of all members, in their order."""
        decision = self._decide(Counter(result.decision for result in results))
        unknown_reasons = [result.reason for result in results if result.decision == "unknown"]
        worst = max(results, key=_unsafe_share)
        refusals = {result.refusal for result in results} - {None}
        labels = {}
        for member, result in zip(self._guards, results, strict=True):
            probabilities = {"safe": result.p_safe, "unsafe": result.p_unsafe, **result.labels}
            labels |= {f"{member}/{name}": p for name, p in probabilities.items() if p is not None}
        return GuardResult(
            worst.id,
            decision,
            worst.p_safe,
            worst.p_unsafe,
            refusals.pop() if len(refusals) == 1 else None,
            (unknown_reasons[0] if unknown_reasons else "guards_disagree") if decision == "unknown" else "",
            worst.category if decision == "unsafe" else "",
            labels,
            max(result.windows for result in results),
        )

    def _decide(self, votes: Counter[str]) -> Literal["safe", "unsafe", "unknown"]:
        """Return the ensemble's decision from the number of members with each decision."""
        if self._voting == "all":
            return "unsafe" if votes["unsafe"] else "unknown" if votes["unknown"] else "safe"
        return next((decision for decision in ("safe", "unsafe") if 2 * votes[decision] > votes.total()), "unknown")


def _unsafe_share(result: GuardResult) -> float:
    """Return P(unsafe) / (P(safe) + P(unsafe)); 0 if both are 0; -1, the lowest rank, if one of them is None."""
    if result.p_unsafe is None or result.p_safe is None:
        return -1.0
    return result.p_unsafe / ((result.p_safe + result.p_unsafe) or 1.0)
