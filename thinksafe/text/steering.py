"""The refusal instructions of the paper: what is put around a harmful prompt while its response is sampled.

They are never part of a training example. A prompt whose responses were all rejected can be tried again on the next
rung of a ladder: with more samples, or another instruction.
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
    """The instruction by its name in the paper, or a text of one's own with {prompt} in it.

    Raises:
        UserError: neither.
    """
    if name_or_text in TEMPLATES:
        return TEMPLATES[name_or_text]
    if name_or_text.count("{prompt}") == 1:
        return name_or_text
    names = ", ".join(TEMPLATES)
    raise UserError(f"{name_or_text!r} is none of {names}, nor a text with one {{prompt}} in it")


def steer(instruction: str, prompt: str) -> str:
    """The user turn that is sampled from. The prompt is inserted as it is; braces in it mean nothing."""
    before, after = instruction.split("{prompt}")
    return before + prompt + after


@dataclass(frozen=True)
class Rung:
    """One more attempt at the prompts that have no accepted response yet.

    Attributes:
        steering: instruction around harmful prompts, as in `generation.steering`; benign ones have none on any rung.
        samples: responses a prompt.
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
        """What is put around a prompt of this label."""
        return self.steering if label == "harmful" else None
