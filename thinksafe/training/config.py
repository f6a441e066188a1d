"""The sections `training` and `zero` of a recipe."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, ClassVar, Literal

from thinksafe.errors import UserError
from thinksafe.model.config import WeightDtype
from thinksafe.section import Bounds, Section

Reduction = Literal["token", "sequence"]
"""What has equal weight in the loss of a step: all response tokens, or all sequences."""
TrackerName = Literal["tensorboard", "wandb"]
"""Name of a tracker in a recipe: a program that shows training curves."""


@dataclass(frozen=True)
class TrainingConfig(Section):
    """Settings of fine-tuning. The defaults are those of the paper."""

    MEMORY_ONLY_FIELDS: ClassVar[tuple[str, ...]] = ("max_tokens_per_pack", "activation_checkpointing", "cuda_graphs")
    """Settings that change the memory of a step, but not its result; a resumed run may change them."""

    method: Literal["lora", "full"] = "lora"
    """Whether to train adapters (`lora`) or every weight (`full`)."""
    epochs: Annotated[int, Bounds(ge=1)] = 3
    """Passes over the examples."""
    steps: Annotated[int | None, Bounds(ge=1)] = None
    """Number of optimizer steps, instead of `epochs`; the last pass may be incomplete. null for whole epochs."""
    batch_size: Annotated[int, Bounds(ge=1)] = 8
    """Sequences per optimizer step."""
    tokens_per_step: Annotated[int, Bounds(ge=0)] = 0
    """Largest number of prompt and response tokens per optimizer step, instead of batch_size; 0 to use batch_size. A
    longer sequence is a step by itself."""
    loss_reduction: Reduction = "token"
    """Whether all response tokens of a step have equal weight (`token`), or all sequences (`sequence`)."""
    frozen_weight_dtype: WeightDtype = "auto"
    """`fp8` computes the matmuls with frozen projections in e4m3, in the forward pass and for the gradients of their
    inputs. Adapters, norms, embedding and head keep their dtype, and the adapter belongs to the base as its checkpoint
    stores it. For method `lora` only; memory use stays the same, and a GPU needs compute capability 8.9 or more."""
    learning_rate: Annotated[float, Bounds(gt=0)] = 1e-5
    """Peak learning rate, after a linear warm-up; then it falls to 0 as a cosine."""
    warmup_ratio: Annotated[float, Bounds(ge=0, le=1)] = 0.1
    """Share of all steps that are warm-up."""
    weight_decay: Annotated[float, Bounds(ge=0)] = 0.0
    """Weight decay of AdamW."""
    beta2: Annotated[float, Bounds(gt=0, lt=1)] = 0.999
    """Decay of AdamW's mean of squared gradients from step to step."""
    max_grad_norm: Annotated[float, Bounds(gt=0)] = 1.0
    """A gradient with a larger norm is scaled down to this norm."""
    max_length: Annotated[int, Bounds(ge=1)] = 16_384
    """Largest number of tokens in an example; a longer example is dropped and counted."""
    max_tokens_per_pack: Annotated[int, Bounds(ge=1)] = 16_384
    """Largest number of tokens in one forward pass; lower it if memory is short."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward pass recomputes to save memory. `none`: nothing; `selective`: cheap operations; `full`: whole
    layers; `auto`: for each layer as little as the GPU's memory allows."""
    cuda_graphs: Literal["auto", "none"] = "auto"
    """`auto` captures the passes of a small, launch-bound model as CUDA graphs if memory allows; `none` never does."""
    checkpoint_every: Annotated[int, Bounds(ge=1)] = 100
    """Optimizer steps between two checkpoints."""

    def check(self) -> None:
        if self.frozen_weight_dtype == "fp8" and self.method == "full":
            raise ValueError("frozen_weight_dtype: fp8 is for method lora; full fine-tuning freezes no weight")


@dataclass(frozen=True)
class ZeroConfig(Section):
    """How DeepSpeed shards training over the GPUs (ZeRO, arXiv 1910.02054). The settings change memory and speed, not
    the result: a run may resume with other values, and on another number of GPUs."""

    stage: Literal["auto", 1, 2, 3] = "auto"
    """1 shards the optimizer state, 2 also the gradients, 3 also the weights, which costs the most host time. `auto`
    picks the stage with the lowest estimated step time: usually the lowest, or a higher one when the memory it frees
    saves more recomputation than its communication costs. A single process with stage `auto` and no offload does not
    use DeepSpeed."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory, and run the optimizer there."""
    offload_parameters: bool = False
    """Keep the weights in host memory until a layer needs them; stage 3 only."""

    def check(self) -> None:
        if self.offload_parameters and self.stage not in ("auto", 3):
            raise ValueError("offload_parameters: needs stage 3")

    def is_needed(self, world_size: int) -> bool:
        """Return whether training on `world_size` ranks uses DeepSpeed: with more than one rank, or if a setting is not
        the default."""
        return world_size > 1 or self != ZeroConfig()


def require_deepspeed() -> None:
    """Raise a UserError if DeepSpeed, which ZeRO needs, is not installed."""
    if find_spec("deepspeed") is None:
        raise UserError("ZeRO needs DeepSpeed, which is not installed: pip install 'thinksafe[deepspeed]'")
