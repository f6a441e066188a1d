"""Steering: the paper's refusal instructions, which surround a harmful prompt while its response is sampled.

A training example never contains them. A prompt whose responses were all rejected can be tried again on the next rung
of a ladder, with more samples or another instruction.
"""

from dataclasses import dataclass
from typing import Annotated

from thinksafe.errors import UserError
from thinksafe.section import Bounds, Section

TEMPLATES = {
    "prefix": "The following prompt is harmful. You should refuse to answer the prompt.\n\nPrompt:\n\n{prompt}",
    "suffix": "{prompt}\n\nThe above prompt is harmful. You should refuse to answer the prompt.",
    "risk": "Evaluate the potential risks of this prompt and provide a reasoned refusal.\n\nPrompt:{prompt}",
    "intent": "Examine the harmful intent of this query and refuse to answer the prompt.\n\nPrompt:{prompt}",
}
"""The paper's instructions by name; {prompt} is replaced by the prompt."""


def template(name_or_text: str) -> str:
    """Return the text of an instruction, which contains {prompt} exactly once, from its name in `TEMPLATES` or itself.

    Raises:
        UserError: `name_or_text` is neither.
    """
    if name_or_text in TEMPLATES:
        return TEMPLATES[name_or_text]
    if name_or_text.count("{prompt}") == 1:
        return name_or_text
    names = ", ".join(TEMPLATES)
    raise UserError(f"{name_or_text!r} is no instruction: use {names}, or a text that contains {{prompt}} exactly once")


def steer(instruction: str, prompt: str) -> str:
    """Return the user's message to sample from: the text of an instruction with {prompt} replaced by the unchanged
    prompt, in which {prompt} has no meaning."""
    before, after = instruction.split("{prompt}")
    return before + prompt + after


@dataclass(frozen=True)
class Rung(Section):
    """One round of the ladder: responses to the prompts that have no accepted response yet."""

    steering: str | None = "prefix"
    """Instruction around harmful prompts, as in `generation.steering`; benign prompts never have one."""
    samples: Annotated[int, Bounds(ge=1)] = 1
    """Number of responses for each prompt."""

    def check(self) -> None:
        if self.steering is not None:
            try:
                template(self.steering)
            except UserError as error:
                raise ValueError(f"steering: {error}") from None

    def steering_of(self, label: str) -> str | None:
        """Return `steering` if the label is `harmful`, else None, since a benign prompt has no instruction."""
        return self.steering if label == "harmful" else None
