"""DPO (arXiv 2305.18290) on the student's own responses: its safe steered response against its unsafe unsteered one."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from thinksafe.data.records import Example
from thinksafe.data.selection import Attempt
from thinksafe.methods.base import Method
from thinksafe.section import Bounds
from thinksafe.text.chat import Chat
from thinksafe.training.config import TrainingConfig
from thinksafe.training.sequence import PreferencePair, TrainingSequence


@dataclass(frozen=True)
class PreferenceExample(Example):
    """An example whose response is preferred to the text `rejected`, another response to the same prompt."""

    rejected: str = ""


@dataclass(frozen=True)
class Dpo(Method):
    """The method: DPO, which trains the student to prefer its safe steered response to its unsafe unsteered one.

    Harmful prompts that have both are trained on, so `generation.num_unsteered_prompts` should be null, which samples
    all of them without steering too. `training.method` must be `lora`.
    """

    stages: ClassVar[tuple[str, ...]] = ("generate", "probe", "filter", "retry", "accept")
    example_type: ClassVar[type[Example]] = PreferenceExample
    needs_rejected: ClassVar[bool] = True

    type: Literal["dpo"] = "dpo"
    """Name of the method."""
    beta: Annotated[float, Bounds(gt=0)] = 0.1
    """Strength of the tie to the untrained student: a higher value moves the student less."""

    def check_settings(self, generation: Any, training: TrainingConfig) -> None:
        if training.method != "lora":
            raise ValueError("training.method: method dpo needs lora")
        if generation.steering is None or generation.num_unsteered_prompts == 0:
            raise ValueError(
                "generation: method dpo needs steered and unsteered responses; set steering and num_unsteered_prompts"
            )

    def example(self, kept: Attempt, rejected: str | None) -> Example | None:
        if rejected is None or kept.response.label != "harmful":
            return None
        return PreferenceExample(**vars(kept.example), rejected=rejected)

    def training_sequence(self, example: PreferenceExample, chat: Chat) -> PreferencePair:
        prompt = chat.prompt_ids(example.prompt)
        chosen, rejected = (
            TrainingSequence(
                np.array(prompt + chat.response_ids(text), np.int32), len(prompt), example.prompt_id, example.weight
            )
            for text in (example.response, example.rejected)
        )
        return PreferencePair(chosen, rejected, self.beta)
