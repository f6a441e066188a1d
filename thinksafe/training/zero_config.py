"""Settings of DeepSpeed ZeRO."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from thinksafe.errors import UserError


@dataclass(frozen=True)
class ZeroConfig:
    """How DeepSpeed shards training over the GPUs (ZeRO, arXiv 1910.02054). The settings change memory and speed, not
    the result: a run may resume with other values, and on another number of GPUs.

    Attributes:
        stage: 1 shards the optimizer state, 2 also the gradients, 3 also the weights, which costs the most host time.
            `auto` picks the stage with the lowest estimated step time: usually the lowest, or a higher one when the
            memory it frees saves more recomputation than its communication costs. A single process with stage `auto`
            and no offload does not use DeepSpeed.
        offload_optimizer: keep the optimizer state in host memory, and run the optimizer there.
        offload_parameters: keep the weights in host memory until a layer needs them; stage 3 only.
    """

    __pydantic_config__ = {"extra": "forbid"}

    stage: Literal["auto", 1, 2, 3] = "auto"
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def __post_init__(self):
        if self.offload_parameters and self.stage not in ("auto", 3):
            raise ValueError("offload_parameters needs stage 3")

    def is_needed(self, world_size: int) -> bool:
        """Return whether training on `world_size` ranks uses DeepSpeed: with more than one rank, or if a setting is not
        the default."""
        return world_size > 1 or self != ZeroConfig()


def require_deepspeed() -> None:
    """Check, before any work, that ZeRO can be used.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    if find_spec("deepspeed") is None:
        raise UserError("ZeRO needs DeepSpeed, which is not installed: pip install 'thinksafe[deepspeed]'")
