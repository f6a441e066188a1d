"""Steering: the paper's refusal instructions, which surround a harmful prompt while its response is sampled.

They are never part of a training example. A prompt whose responses were all rejected can be tried again on the next
rung of a ladder, with more samples or another instruction.
"""

from dataclasses import dataclass

from thinksafe.errors import UserError

TEMPLATES = {
    "prefix": "The following prompt is harmful. You should refuse to answer the prompt.\n\nPrompt:\n\n{prompt}",
    "suffix": "{prompt}\n\nThe above prompt is harmful. You should refuse to answer the prompt.",
    "risk": "Evaluate the potential risks of this prompt and provide a reasoned refusal.\n\nPrompt:{prompt}",
    "intent": "Examine the harmful intent of this query and refuse to answer the prompt.\n\nPrompt:{prompt}",
}


def template(name_or_text: str) -> str:
    """Return the instruction with this name in the paper, or the text itself if it contains {prompt} exactly once.

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
    """Return the user turn to sample from. The prompt is inserted unchanged; braces in it have no meaning."""
    before, after = instruction.split("{prompt}")
    return before + prompt + after


@dataclass(frozen=True)
class Rung:
    """One more attempt at the prompts that have no accepted response yet.

    Attributes:
        steering: instruction around harmful prompts, as in `generation.steering`; benign prompts never have one.
        samples: number of responses for each prompt.
    """

    __pydantic_config__ = {"extra": "forbid"}

    steering: str | None = "prefix"
    samples: int = 1

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError("samples must be at least 1")
        if self.steering is not None:
            try:
                template(self.steering)
            except UserError as error:
                raise ValueError(str(error)) from None

    def steering_of(self, label: str) -> str | None:
        """Return the instruction around a prompt with this label, or None."""
        return self.steering if label == "harmful" else None
