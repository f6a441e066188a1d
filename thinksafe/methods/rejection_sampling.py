"""Rejection sampling: the student learns from unsteered responses to prompts that it answers safely anyway."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from thinksafe.data.selection import Attempt
from thinksafe.methods.base import Method, check_unsteered
from thinksafe.training.config import TrainingConfig


@dataclass(frozen=True)
class RejectionSampling(Method):
    """The method: the paper's rejection sampling. Each prompt has `generation.samples` responses without steering, and
    is trained on one accepted response, drawn at random."""

    stages: ClassVar[tuple[str, ...]] = ("generate", "filter", "accept")

    type: Literal["rejection_sampling"] = "rejection_sampling"
    """Name of the method."""
    rule: Literal["all", "any"] = "all"
    """Whether a prompt is kept only if the guard accepts `all` of its responses, as in the paper, or already if it
    accepts `any`."""

    def choose(self, attempts: Sequence[Attempt], seed: int) -> Attempt | None:
        accepted = [attempt for attempt in attempts if attempt.accepted_by]
        if not accepted or (self.rule == "all" and len(accepted) < len(attempts)):
            return None
        # Ids are hashes of the prompt, so the draw is another one for each prompt and the same one in each call.
        draw = np.random.default_rng([seed, int(attempts[0].response.prompt_id, 16)])
        return accepted[draw.integers(len(accepted))]

    def check_settings(self, generation: Any, training: TrainingConfig) -> None:
        check_unsteered(self, generation)
