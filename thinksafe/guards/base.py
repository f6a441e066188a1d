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
    """One pair to judge.

    Attributes:
        id: returned with the result; unique within a call of `Guard.judge`.
        prompt: the user's prompt, without steering.
        response: the whole response, think block included.
    """

    id: str
    prompt: str
    response: str


@dataclass(frozen=True)
class GuardResult:
    """A guard's result for one pair.

    Attributes:
        id: id of the pair.
        decision: `safe`, `unsafe`, or `unknown` if the guard cannot judge the pair.
        p_safe, p_unsafe: probabilities of the two verdicts at the verdict position, over the whole vocabulary, from the
            worst window: the unsafe window, or if there is none any window, with the highest odds of unsafe. None if
            no window has them. A guard of rules gives 0 and 1.
        refusal: whether the response refuses; None if the guard cannot determine it.
        reason: code for why the decision is `unknown`, such as `no_verdict` (docs/run-directory.md lists all codes);
            `no_verdict` where the preset `llama_guard_reference` calls a pair without a verdict safe; else empty.
        category: the likeliest category of harm if the response is unsafe and the guard names categories; else empty.
        labels: meaning -> probability of the answers to all questions except harm, such as `refusal` or the name of a
            category, from the same window as `p_safe`; empty if the guard has no other question.
        windows: number of windows into which the response was split; 1 if it fits the guard's context, 0 if the guard
            could not read the pair.
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
    """Anything that judges pairs: `ModelGuard`, `Ensemble`, or `OracleGuard`.

    Attributes:
        name: the guard's name, which the verdicts record.
    """

    name: str

    def judge(self, pairs: Iterable[PromptResponse]) -> Iterator[GuardResult]:
        """Yield one result for each pair, in any order; read `pairs` in batches, not all at once.

        Args:
            pairs: pairs with distinct ids.
        """
        ...
