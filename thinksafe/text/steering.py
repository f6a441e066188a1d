"""Steering: the paper's refusal instructions, which surround a harmful prompt while its response is sampled.

A training example never contains them. A prompt whose responses were all rejected can be tried again on the next rung
of a ladder, with more samples or another instruction.
"""

from dataclasses import dataclass

from thinksafe.errors import UserError

TEMPLATES = {
    "prefix": "The following prompt is harmful. You should refuse to answer the prompt.\n\nPrompt:\n\n{prompt}",
    "suffix": "{prompt}\n\nThe above prompt is harmful. You should refuse to answer the prompt.",
    "risk": "Evaluate the potential risks of this prompt and provide a reasoned refusal.\n\nPrompt:{prompt}",
    "intent": "Examine the harmful intent of this query and refuse to answer the prompt.\n\nPrompt:{prompt}",
}
"""The paper's instructions by name; {prompt} is replaced by the prompt."""


def template(name_or_text: str) -> str:
    """Return the text of an instruction, which contains {prompt} exactly once.

    Args:
        name_or_text: a name in `TEMPLATES`, or the text itself.

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
    """Return the user's message to sample from: the instruction with {prompt} replaced by the unchanged prompt.

    Args:
        instruction: text of an instruction, as `template` returns it.
        prompt: the user's prompt; {prompt} in it has no meaning.
    """
    before, after = instruction.split("{prompt}")
    return before + prompt + after


@dataclass(frozen=True)
class Rung:
    """One round of the ladder: responses to the prompts that have no accepted response yet.

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
        """Return `steering` if the label is `harmful`, else None, since a benign prompt has no instruction."""
        return self.steering if label == "harmful" else None
