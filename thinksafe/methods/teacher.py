"""Teacher: the student learns from another model's steered, filtered responses."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from thinksafe.methods.base import Method


@dataclass(frozen=True)
class Teacher(Method):
    """The method: ThinkSafe with the responses of another model. It answers the prompts, harmful ones with the steering
    instruction, in its own chat template; the student is trained on their text in the student's template."""

    stages: ClassVar[tuple[str, ...]] = ("generate", "filter", "retry", "accept")

    type: Literal["teacher"] = "teacher"
    """Name of the method."""
    model: str | None = None
    """Checkpoint folder, or name on the Hugging Face hub, of the teacher. Its tokenizer and chat template may be others
    than the student's."""

    def check(self) -> None:
        if self.model is None:
            raise ValueError("model: missing; name the teacher's checkpoint")

    @property
    def responder(self) -> str | None:
        return self.model
