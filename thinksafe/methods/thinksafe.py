"""ThinkSafe (arXiv 2601.23143): the student learns from its own steered, filtered responses."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from thinksafe.data.records import Label
from thinksafe.methods.base import Method


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

    @property
    def kl_labels(self) -> frozenset[Label]:
        return frozenset({"benign"} if self.benign_loss == "kl" else ())
