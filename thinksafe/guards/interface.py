"""What a guard is: it reads a prompt and a response and gives probabilities, never a bare yes.

Anything a guard cannot judge is `unknown`, which no stage treats as safe.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from thinksafe.sampler.engine import EngineConfig


@dataclass(frozen=True)
class GuardConfig:
    """Which guard judges.

    Attributes:
        kind: `llama_guard` (a checkpoint in Llama-Guard-3's format) or `oracle` (the organism's rules).
        model: checkpoint folder or hub name; not used by the oracle.
        min_mass: P(safe) + P(unsafe) below which a model's verdict is `unknown`: it wanted to say something else.
        sampler: how many responses are read at once.
    """

    __pydantic_config__ = {"extra": "forbid"}

    kind: Literal["llama_guard", "oracle"] = "llama_guard"
    model: str = "meta-llama/Llama-Guard-3-8B"
    min_mass: float = 0.5
    sampler: EngineConfig = EngineConfig()

    def __post_init__(self):
        if not 0 <= self.min_mass <= 1:
            raise ValueError("min_mass must lie between 0 and 1")


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
        p_safe, p_unsafe: at the verdict position over the whole vocabulary; None if the guard could not read it.
        refusal: whether the response refuses; None if this guard cannot tell.
        reason: why the decision is `unknown`, else empty.
    """

    id: str
    decision: Literal["safe", "unsafe", "unknown"]
    p_safe: float | None
    p_unsafe: float | None
    refusal: bool | None
    reason: str = ""


class Guard(Protocol):
    """Judges exchanges in any order.

    Attributes:
        name: goes into every verdict.
    """

    name: str

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[Judgement]:
        """Yield one judgement an exchange, in any order."""
        ...
