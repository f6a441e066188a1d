"""The interface of a guard, which judges responses and returns probabilities beside its decision."""

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

from thinksafe.data.records import Response, Verdict

Decision = Literal["safe", "unsafe", "unknown"]


class Guard(Protocol):
    """Anything that judges responses: `ModelGuard`, `Ensemble`, or `OracleGuard`.

    Attributes:
        name: the guard's name, which the verdicts record.
    """

    name: str

    def judge(self, responses: Iterable[Response]) -> Iterator[Verdict]:
        """Yield one verdict for each response, in order; read the responses in batches, not all at once.

        A guard sees the prompt without steering and the whole response. A response that it cannot judge is `unknown`,
        which no stage treats as safe.
        """
        ...
