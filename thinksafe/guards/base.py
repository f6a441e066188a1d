"""What a guard is: it reads a prompt and a response and gives probabilities, never a bare yes.

Anything a guard cannot judge is `unknown`, which no stage treats as safe. One preset, for those who reproduce the
paper's records, is as open as the paper's code; see `GuardConfig.kind`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

Decision = Literal["safe", "unsafe", "unknown"]


@dataclass(frozen=True)
class Exchange:
    """What is judged: the user's own prompt, without steering, and the whole response."""

    id: str
    prompt: str
    response: str


@dataclass(frozen=True)
class Judgement:
    """A guard's word on one exchange.

    Attributes:
        p_safe, p_unsafe: at the verdict position over the whole vocabulary, of the window that is most likely unsafe;
            None if the guard could not read any.
        refusal: whether the response refuses; None if this guard cannot tell.
        reason: why the decision is `unknown`; `no_verdict` where the reference preset calls that safe; else empty.
        category: of harm, the likeliest, where the response is unsafe and the guard tells; else empty.
        labels: probabilities of everything else that the guard was asked, by what it means: of a category at the
            category position, of `refusal` at its own, and so on.
        windows: how many pieces of the response were judged.
    """

    id: str
    decision: Decision
    p_safe: float | None
    p_unsafe: float | None
    refusal: bool | None
    reason: str = ""
    category: str = ""
    labels: Mapping[str, float] = field(default_factory=dict)
    windows: int = 1


class Guard(Protocol):
    """Judges exchanges in any order.

    Attributes:
        name: goes into every verdict.
    """

    name: str

    def judge(self, exchanges: Iterable[Exchange]) -> Iterator[Judgement]:
        """Yield one judgement an exchange, in any order; they are taken some at a time."""
        ...
