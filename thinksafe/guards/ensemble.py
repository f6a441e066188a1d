"""Several guards that judge together, each under a name of its own. It knows nothing of how any comes to its word."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Literal

from thinksafe.guards.base import Exchange, Guard, Judgement

_TOGETHER = 1024
"""Exchanges after which the next member reads: what all have judged is kept whatever happens after."""


class Ensemble:
    """Safe is what `all` members, or more than half of them, call safe; unsafe what one, or more than half, call so.

    A member that is `unknown` never counts as safe.
    """

    def __init__(self, guards: Mapping[str, Guard], agree: Literal["all", "majority"]):
        self.name = f"{agree}({', '.join(guards)})"
        self._guards, self._agree = guards, agree

    def judge(self, exchanges: Iterable[Exchange]) -> Iterator[Judgement]:
        """One judgement an exchange; its probabilities, category and windows are of the gravest member, and labels
        hold every member's under its name."""
        source = iter(exchanges)
        while some := list(islice(source, _TOGETHER)):
            found = [{judgement.id: judgement for judgement in guard.judge(some)} for guard in self._guards.values()]
            for exchange in some:
                yield self._combine([judgements[exchange.id] for judgements in found])

    def _combine(self, judgements: list[Judgement]) -> Judgement:
        decision = self._decide(Counter(judgement.decision for judgement in judgements))
        unsure = [judgement.reason for judgement in judgements if judgement.decision == "unknown"]
        gravest = max(judgements, key=_share)
        refusals = {judgement.refusal for judgement in judgements} - {None}
        labels = {}
        for member, judgement in zip(self._guards, judgements, strict=True):
            own = {"safe": judgement.p_safe, "unsafe": judgement.p_unsafe, **judgement.labels}
            labels |= {f"{member}/{name}": p for name, p in own.items() if p is not None}
        return Judgement(
            gravest.id,
            decision,
            gravest.p_safe,
            gravest.p_unsafe,
            refusals.pop() if len(refusals) == 1 else None,
            (unsure[0] if unsure else "guards_disagree") if decision == "unknown" else "",
            gravest.category if decision == "unsafe" else "",
            labels,
            max(judgement.windows for judgement in judgements),
        )

    def _decide(self, votes: Counter[str]) -> Literal["safe", "unsafe", "unknown"]:
        if self._agree == "all":
            return "unsafe" if votes["unsafe"] else "unknown" if votes["unknown"] else "safe"
        return next((word for word in ("safe", "unsafe") if 2 * votes[word] > votes.total()), "unknown")


def _share(judgement: Judgement) -> float:
    """P(unsafe) among the two verdicts; a member without any probabilities is the last to be quoted."""
    if judgement.p_unsafe is None or judgement.p_safe is None:
        return -1.0
    return judgement.p_unsafe / ((judgement.p_safe + judgement.p_unsafe) or 1.0)
