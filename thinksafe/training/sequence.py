"""Tokenized examples, the input of training. They need no torch, so that a recipe is read at once.

A training item is a `TrainingSequence`, a `PreferencePair` of two, or a `LateLosses`, which becomes other sequences in
the last epochs.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class SafetySpan:
    """What SafeKey's two heads read of a sequence: the mean state of the tokens `start` to `end`, which summarize the
    prompt, and the mean state of all tokens before `end`. Each head predicts whether the prompt is harmful.

    Attributes:
        weight: factor of the mean of both heads' binary cross-entropy, relative to the sequence's weight.
    """

    start: int
    end: int
    is_harmful: bool
    weight: float


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
        is_in_mean: whether the mean loss of a step divides by the weight too; False for a loss that is added to it.
        safety_span: what SafeKey's heads read of it; None without heads.
    """

    input_ids: np.ndarray
    num_prompt_tokens: int
    name: str = "an unnamed example"
    weight: float = 1.0
    use_reference_kl: bool = False
    advantage: float = 1.0
    is_in_mean: bool = True
    safety_span: SafetySpan | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Number of tokens with a loss."""
        return len(self.input_ids) - self.num_prompt_tokens

    @property
    def needs_reference(self) -> bool:
        """Whether its loss needs the reference's forward pass."""
        return self.use_reference_kl

    @property
    def sequences(self) -> tuple["TrainingSequence", ...]:
        """The sequences of the item: itself."""
        return (self,)


@dataclass(frozen=True, eq=False)
class PreferencePair:
    """Two responses to one prompt, with DPO's loss (arXiv 2305.18290), -log sigmoid(beta * (r_chosen - r_rejected)).

    r is the log-probability of a whole response minus that of the reference. The loss has the weight of `chosen`, with
    either reduction.
    """

    chosen: TrainingSequence
    rejected: TrainingSequence
    beta: float

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    @property
    def name(self) -> str:
        return self.chosen.name

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def sequences(self) -> tuple[TrainingSequence, ...]:
        return self.chosen, self.rejected


@dataclass(frozen=True, eq=False)
class LateLosses:
    """A sequence that becomes other sequences, with further losses, in the last epochs of a training.

    Attributes:
        early: the sequence of all other epochs.
        late: the sequences of the last `num_epochs` epochs.
    """

    early: TrainingSequence
    late: tuple[TrainingSequence, ...]
    num_epochs: int

    def __len__(self) -> int:
        return max(len(self.early), sum(map(len, self.late)))

    @property
    def needs_reference(self) -> bool:
        return any(sequence.needs_reference for sequence in (self.early, *self.late))

    def in_epoch(self, epochs_left: int) -> tuple[TrainingSequence, ...]:
        """Return the sequences of an epoch; `epochs_left` counts this epoch too."""
        return self.late if epochs_left <= self.num_epochs else (self.early,)


TrainingItem = TrainingSequence | PreferencePair | LateLosses
"""What one example is trained as."""
