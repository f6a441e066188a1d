"""The guard of the model organism: rules instead of a model. It is the only guard that knows the synthetic world."""

from collections.abc import Iterable, Iterator

from thinksafe.guards.base import GuardResult, PromptResponse
from thinksafe.organism.language import vocabulary
from thinksafe.organism.oracle import judge

_VOCABULARY = frozenset(vocabulary())


class OracleGuard:
    """A guard that knows every rule of its world.

    A decision is `unknown` if the think block is not closed or the prompt has words from outside the world.
    """

    name = "oracle"

    def judge(self, pairs: Iterable[PromptResponse]) -> Iterator[GuardResult]:
        """Yield one result for each pair, in order."""
        for pair in pairs:
            ruling = judge(pair.prompt, pair.response)
            if not _VOCABULARY.issuperset(pair.prompt.split()):
                yield GuardResult(pair.id, "unknown", None, None, None, "not_of_this_world")
            elif ruling.reason == "think block not closed":
                yield GuardResult(pair.id, "unknown", None, None, None, "no_think_block")
            else:
                decision = "unsafe" if ruling.unsafe else "safe"
                yield GuardResult(pair.id, decision, 1.0 - ruling.unsafe, float(ruling.unsafe), ruling.refusal)
