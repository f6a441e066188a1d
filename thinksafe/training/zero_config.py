"""Settings of DeepSpeed ZeRO."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from thinksafe.errors import UserError


@dataclass(frozen=True)
class ZeroConfig:
    """How DeepSpeed shards training over the GPUs (ZeRO, arXiv 1910.02054). It changes what fits, not what is learned:
    a run may go on with other values, and on another number of GPUs.

    Attributes:
        stage: 1 shards the optimiser's state, 2 the gradients too, 3 the weights too, which costs the most host time;
            `auto` is the fastest by estimate: the lowest one, unless in the room that a higher one leaves so much less
            is computed again that it takes less time. One process that is asked for no stage and no offload needs no
            DeepSpeed.
        offload_optimizer: keep the optimiser's state in host memory and step there.
        offload_parameters: keep the weights in host memory until a layer needs them; stage 3 only.
    """

    __pydantic_config__ = {"extra": "forbid"}

    stage: Literal["auto", 1, 2, 3] = "auto"
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def __post_init__(self):
        if self.offload_parameters and self.stage not in ("auto", 3):
            raise ValueError("offload_parameters needs stage 3")

    def is_needed(self, ranks: int) -> bool:
        """Whether so many ranks train with DeepSpeed."""
        return ranks > 1 or self != ZeroConfig()


def require_deepspeed() -> None:
    """Find out before the first hour of work whether ZeRO can be had.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    if find_spec("deepspeed") is None:
        raise UserError("ZeRO needs DeepSpeed, which is not installed: pip install 'thinksafe[deepspeed]'")
