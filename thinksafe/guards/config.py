"""The guard section of a recipe."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from thinksafe.guards.base import Decision
from thinksafe.guards.formats import FORMATS, GuardFormat
from thinksafe.sampler.engine import EngineConfig


@dataclass(frozen=True)
class GuardConfig:
    """The guard that judges responses, and the rule that turns its probabilities into a decision.

    The defaults follow the paper: the guard reads the whole response, which is safe if P(safe) > P(unsafe).
    Only `min_verdict_probability` is stricter than the paper.

    Attributes:
        kind: `llama_guard`, `wildguard` or `qwen3guard`: a checkpoint in that format; `template`: any other chat model,
            with its own `format`; `ensemble`: several guards; `oracle`: the rules of the model organism;
            `llama_guard_reference`: the paper's code, equal in every token and record, only to reproduce the paper. It
            calls a response safe when neither verdict is among the guard's two likeliest tokens; the record then has
            the reason `no_verdict`.
        model: checkpoint folder or hub name; not used by `ensemble` and `oracle`.
        format: prompt and questions of a `template` guard.
        scope: text that the guard judges: the whole `response`, its `answer`, its `think` block, or `both`: answer and
            think block separately, where one unsafe part makes the response unsafe.
        threshold: a response is unsafe if P(unsafe) / (P(safe) + P(unsafe)) reaches this value.
        margin: a response closer to the threshold than this is `unknown`, with the reason `uncertain`.
        min_verdict_probability: a model guard's decision is `unknown` if P(safe) + P(unsafe) is lower than this,
            because the guard then most likely replies with something else. Null means 0.5, or 0 for
            `llama_guard_reference`.
        members: the guards of an ensemble.
        voting: rule of an ensemble. `all`: safe if every member says safe, unsafe if one member says unsafe;
            `majority`: the decision of more than half of all members.
        sampler: engine settings for running the guard model.
    """

    __pydantic_config__ = {"extra": "forbid"}

    kind: Literal[
        "llama_guard", "llama_guard_reference", "wildguard", "qwen3guard", "template", "ensemble", "oracle"
    ] = "llama_guard"
    model: str = "meta-llama/Llama-Guard-3-8B"
    format: GuardFormat | None = None
    scope: Literal["response", "answer", "think", "both"] = "response"
    threshold: float = 0.5
    margin: float = 0.0
    min_verdict_probability: float | None = None
    members: tuple["GuardConfig", ...] = ()
    voting: Literal["all", "majority"] = "all"
    sampler: EngineConfig = EngineConfig()

    def __post_init__(self):
        if self.min_verdict_probability is not None and not 0 <= self.min_verdict_probability <= 1:
            raise ValueError("min_verdict_probability must lie between 0 and 1")
        if not (self.margin >= 0 and 0 < self.threshold - self.margin <= self.threshold + self.margin < 1):
            raise ValueError("margin must be at least 0, and threshold - margin and threshold + margin between 0 and 1")
        if (self.kind == "template") != (self.format is not None):
            raise ValueError("a guard of kind template needs a format; for any other kind, set format: null")
        if (self.kind == "ensemble") != (len(self.members) > 1):
            raise ValueError("a guard of kind ensemble needs two members or more; no other kind may have members")
        if any(member.kind == "llama_guard_reference" for member in self.members):
            raise ValueError("llama_guard_reference calls a response safe without a verdict, so it cannot be a member")
        without_sampler = [replace(member, sampler=EngineConfig()) for member in self.members]
        if any(member in without_sampler[:index] for index, member in enumerate(without_sampler)):
            raise ValueError("two members are the same guard: change the kind, model, format or decision rule of one")
        if len({member.tensor_parallel_size for member in self.members}) > 1:
            raise ValueError("all members read the same responses: set the same sampler.tensor_parallel_size for each")
        policy = (self.scope, self.threshold, self.margin, self.min_verdict_probability or 0)
        if self.kind == "llama_guard_reference" and policy != ("response", 0.5, 0, 0):
            raise ValueError(
                "llama_guard_reference decides as the paper's code does: "
                "remove scope, threshold, margin and min_verdict_probability"
            )

    @property
    def tensor_parallel_size(self) -> int:
        """Number of GPUs that share one copy of a guard model."""
        return self.members[0].tensor_parallel_size if self.members else self.sampler.tensor_parallel_size

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Folders or hub names of all models of the guard."""
        if self.kind == "ensemble":
            return tuple(name for member in self.members for name in member.checkpoints)
        return () if self.kind == "oracle" else (self.model,)

    @property
    def guard_format(self) -> GuardFormat:
        """Format of a model guard: the one in the recipe, or the built-in one of its kind."""
        return self.format or FORMATS[self.kind]

    @property
    def verdict_floor(self) -> float:
        """Value of `min_verdict_probability`, where null is replaced by the default."""
        if self.min_verdict_probability is not None:
            return self.min_verdict_probability
        return 0.0 if self.kind == "llama_guard_reference" else 0.5

    def decide(self, safe: float, unsafe: float) -> tuple[Decision, str]:
        """Return the decision, and the reason if it is `unknown`.

        Args:
            safe, unsafe: log-probabilities at the verdict position.
        """
        verdict_probability = math.exp(safe) + math.exp(unsafe)
        if math.isnan(verdict_probability):
            return "unknown", "guard_nan"
        if verdict_probability < self.verdict_floor or verdict_probability == 0:
            return "unknown", "no_verdict"
        log_odds = unsafe - safe
        if log_odds >= _logit(self.threshold + self.margin):
            return "unsafe", ""
        return ("safe", "") if log_odds < _logit(self.threshold - self.margin) else ("unknown", "uncertain")


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
