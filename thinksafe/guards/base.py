"""The interface of a guard: it reads a prompt with a response, and returns probabilities beside its decision.

A guard returns `unknown` for a pair that it cannot judge, and no stage treats `unknown` as safe. The one exception is
the preset `llama_guard_reference`, which reproduces the records of the paper's code; see `GuardConfig.kind`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

Decision = Literal["safe", "unsafe", "unknown"]


@dataclass(frozen=True)
class PromptResponse:
    """One pair to judge: the user's own prompt, without steering, and the whole response."""

    id: str
    prompt: str
    response: str


@dataclass(frozen=True)
class GuardResult:
    """A guard's result for one pair.

    Attributes:
        p_safe, p_unsafe: probabilities at the verdict position over the whole vocabulary, from the window that is most
            likely unsafe; None if no window has them.
        refusal: whether the response refuses; None if the guard cannot determine it.
        reason: why the decision is `unknown`; `no_verdict` where the reference preset calls such a pair safe; else
            empty.
        category: the likeliest category of harm if the response is unsafe and the guard names categories; else empty.
        labels: probabilities of the answers to all other questions, by meaning: a category at the category position,
            `refusal` at the refusal position, and so on.
        windows: number of windows into which the response was split.
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
    """Anything that judges pairs.

    Attributes:
        name: the guard's name in every verdict.
    """

    name: str

    def judge(self, pairs: Iterable[PromptResponse]) -> Iterator[GuardResult]:
        """Yield one result for each pair, in any order; read `pairs` in batches, not all at once."""
        ...
