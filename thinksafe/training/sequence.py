"""One tokenized example, the input of training. It needs no torch, so that a recipe is read at once."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class TrainingSequence:
    """One tokenized example.

    Attributes:
        input_ids: [T] int32, prompt and response.
        num_prompt_tokens: index of the first response token, at least 1; all tokens from there on have a loss.
        name: name of the example, for messages.
        weight: positive loss weight of the example. With the reduction `token` each target has this weight; with
            `sequence` all targets together have it.
        use_reference_kl: whether the loss is the KL divergence from the reference instead of the cross-entropy.
        advantage: factor of all token losses, of either sign, as a policy gradient needs. The mean loss of a step
            divides by the weights alone.
    """

    input_ids: np.ndarray
    num_prompt_tokens: int
    name: str = "an unnamed example"
    weight: float = 1.0
    use_reference_kl: bool = False
    advantage: float = 1.0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Number of tokens with a loss."""
        return len(self.input_ids) - self.num_prompt_tokens
