"""ThinkSafe (arXiv 2601.23143): the student learns from its own steered, filtered responses."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from thinksafe.data.records import Example
from thinksafe.methods.base import Method
from thinksafe.text.chat import Chat
from thinksafe.training.sequence import TrainingSequence


@dataclass(frozen=True)
class ThinkSafe(Method):
    """The method: ThinkSafe, which trains the student on its own steered, filtered responses."""

    stages: ClassVar[tuple[str, ...]] = ("generate", "probe", "filter", "retry", "accept")

    type: Literal["thinksafe"] = "thinksafe"
    """Name of the method."""
    benign_loss: Literal["cross_entropy", "kl"] = "cross_entropy"
    """Loss on benign responses, `cross_entropy` or `kl`. `kl` is the divergence of the full next-token distribution
    from that of the untrained student, the paper's +KL; it costs the untrained student's forward pass over these
    tokens."""

    def training_sequence(self, example: Example, chat: Chat) -> TrainingSequence:
        """Return the default sequence; with `benign_loss: kl`, a benign example has the KL loss."""
        use_kl = self.benign_loss == "kl" and example.label == "benign"
        return replace(super().training_sequence(example, chat), use_reference_kl=use_kl)
