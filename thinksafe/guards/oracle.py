"""The organism's guard: rules instead of a model. It is the only guard that knows the synthetic world."""

from collections.abc import Iterable, Iterator

from thinksafe.guards.base import Exchange, Judgement
from thinksafe.organism.language import words
from thinksafe.organism.oracle import judge

_WORDS = frozenset(words())


class OracleGuard:
    """Certain of everything in its world; `unknown` are a response without an end and a prompt in other words."""

    name = "oracle"

    def judge(self, exchanges: Iterable[Exchange]) -> Iterator[Judgement]:
        """One judgement an exchange, in order."""
        for exchange in exchanges:
            ruling = judge(exchange.prompt, exchange.response)
            if not _WORDS.issuperset(exchange.prompt.split()):
                yield Judgement(exchange.id, "unknown", None, None, None, "not_of_this_world")
            elif ruling.reason == "think block not closed":
                yield Judgement(exchange.id, "unknown", None, None, None, "no_think_block")
            else:
                decision = "unsafe" if ruling.unsafe else "safe"
                yield Judgement(exchange.id, decision, 1.0 - ruling.unsafe, float(ruling.unsafe), ruling.refusal)
