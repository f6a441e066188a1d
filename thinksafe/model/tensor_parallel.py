"""Tensor parallelism: one decoder on several GPUs. Each process holds a part of every layer; all see the same tokens.

Queries, keys, values, gate and up are split by output rows, so that a process holds whole groups of heads with their
part of the cache, and whole neurons. The projections after them, o and down, are split by input columns, so that their
outputs are partial sums. All communication is two sums over the processes per layer, of T * H elements each
(Megatron-LM, arXiv 1909.08053).

Norms, embedding and head are whole in every process. Reading the head of Qwen3-32B takes 0.36 ms of a decode step at
4.3 TB/s; gathering the fp32 logits of 256 rows from a split head over NVLink would take at least as long. So everything
after the last layer, sampling and scoring, is the same on one GPU and on many. Such a decoder samples and judges; it is
never trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from thinksafe.errors import UserError
from thinksafe.model.config import PROJECTIONS, ModelConfig


@dataclass(frozen=True)
class TensorShard:
    """The part of a decoder that this process holds, and its communication with the processes of the other parts. The
    default is the whole decoder, without any communication.

    Attributes:
        rank, size: index of the part, and number of parts.
        group: the processes that hold the parts, by rank; None if size is 1.
        ordered_sum: whether partial sums are added in rank order in every batch, for batch-invariant mode.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    ordered_sum: bool = False

    def shard_config(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration of this process's part of a model: its heads, key-value heads and neurons per layer
        are divided by `size`; raise a UserError if `size` does not divide them."""
        for name, count in (("key-value heads", config.num_kv_heads), ("neurons per layer", config.intermediate_size)):
            if count % self.size:
                problem = f"the model's {count} {name} cannot be split evenly over {self.size} GPUs"
                raise UserError(f"tensor_parallel_size: {problem}; use a number that divides {count}")
        return replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=config.num_kv_heads // self.size,
            intermediate_size=config.intermediate_size // self.size,
        )

    def slices(self, name: str, shape: Sequence[int]) -> tuple[slice, ...]:
        """Return the index of this process's part in a whole tensor of this shape, one slice per dimension. They cover
        the whole tensor if it is not split, or if `size` does not divide it; the caller then finds a wrong shape.

        Args:
            name: name of the parameter, in the decoder's, Hugging Face's or PEFT's form.
        """
        slices, split_dim = [slice(None)] * len(shape), _split_dim(name)
        if split_dim is not None and shape[split_dim] % self.size == 0:
            length = shape[split_dim] // self.size
            slices[split_dim] = slice(self.rank * length, (self.rank + 1) * length)
        return tuple(slices)

    def is_zeroed(self, name: str) -> bool:
        """Return whether this process must set the parameter to zero: rank 0 alone adds the biases of o_proj and
        down_proj, because the sum over the processes comes after them."""
        projection, kind = _parse_name(name)
        return self.rank > 0 and kind == "bias" and PROJECTIONS[projection].split_dim == 1

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Return the sum of x over the processes, on every process; x may be overwritten. With one process return x.

        An all-reduce splits its buffer and picks its paths by the buffer's size, and with them the order in which the
        parts of an element are added, so the bits of a row would depend on the other rows. With `ordered_sum` every
        process gathers all parts and adds them in rank order in fp32, rounding once. That sends size / 2 times as much.
        """
        if self.size > 1 and self.ordered_sum:
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x, group=self.group)
            total = parts[0].float()
            for part in parts[1:]:
                total += part
            return total.to(x.dtype)
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Overwrite x on every process with rank 0's x, and return it. If a bit differed between two processes, their
        schedulers would diverge."""
        if self.size > 1:
            dist.broadcast(x, group_src=0, group=self.group)
        return x

    def all_reduce_min(self, number: int, device: torch.device) -> int:
        """Return the smallest `number` of all processes, on every process; they exchange a tensor on `device`."""
        if self.size == 1:
            return number
        smallest = torch.tensor(number, device=device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self.group)
        return int(smallest)


UNSHARDED = TensorShard()
"""The whole decoder in one process."""


def _parse_name(name: str) -> tuple[str | None, str]:
    """Return projection and kind (weight, bias, lora_A or lora_B) of a parameter, as in 'layers.3.q_proj.bias' ->
    ('q_proj', 'bias'); the projection is None if the parameter belongs to none."""
    if ".lora_" in name:
        name = name.removesuffix(".weight")
    *path, kind = name.split(".")
    return (path[-1] if path and path[-1] in PROJECTIONS else None), kind


def _split_dim(name: str) -> int | None:
    """Return the dimension along which a parameter is split; None if every process holds all of it."""
    projection, kind = _parse_name(name)
    if projection is None:
        return None
    split_dim = PROJECTIONS[projection].split_dim
    is_whole = kind == ("lora_A" if split_dim == 0 else "lora_B") or (kind == "bias" and split_dim == 1)
    return None if is_whole else split_dim
