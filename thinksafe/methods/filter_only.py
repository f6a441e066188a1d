"""Filter only: the student learns from its own unsteered responses that the guard accepts."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from thinksafe.methods.base import Method, check_unsteered
from thinksafe.training.config import TrainingConfig


@dataclass(frozen=True)
class FilterOnly(Method):
    """The method: ThinkSafe without steering. Each prompt is trained on the first of its `generation.samples` responses
    that the guard accepts, so `generation.steering` must be null."""

    stages: ClassVar[tuple[str, ...]] = ("generate", "filter", "accept")

    type: Literal["filter_only"] = "filter_only"
    """Name of the method."""

    def check_settings(self, generation: Any, training: TrainingConfig) -> None:
        check_unsteered(self, generation)
