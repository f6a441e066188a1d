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

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from thinksafe.errors import UserError
from thinksafe.model.config import ModelConfig

_COLUMN_SHARDED = ("o_proj", "down_proj")
_PROJECTION_PARAMETER = re.compile(r"(?P<projection>\w+_proj)(?:[._](?P<kind>bias|lora_A|lora_B))?(?:\.weight)?$")


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
        are divided by `size`.

        Raises:
            UserError: `size` does not divide the number of key-value heads or of neurons.
        """
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
        """Return the index of this process's part in a whole tensor, one slice per dimension.

        The slices cover the whole tensor if it is not split, or if `size` does not divide it; the caller then finds a
        wrong shape.

        Args:
            name: name of the parameter, in the decoder's, Hugging Face's or PEFT's form.
            shape: shape of the whole tensor.
        """
        axis = _shard_axis(name)
        if axis is None or shape[axis] % self.size:
            return (slice(None),) * len(shape)
        length = shape[axis] // self.size
        own_slice = slice(self.rank * length, (self.rank + 1) * length)
        return tuple(own_slice if dim == axis else slice(None) for dim in range(len(shape)))

    def is_zeroed(self, name: str) -> bool:
        """Return whether this process must set the parameter to zero: rank 0 alone adds the biases of o_proj and
        down_proj, because the sum over the processes comes after them."""
        return self.rank > 0 and _parse_name(name) in {(projection, "bias") for projection in _COLUMN_SHARDED}

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
        """Return the smallest `number` of all processes, on every process.

        Args:
            device: device of the tensor that is exchanged.
        """
        if self.size == 1:
            return number
        smallest = torch.tensor(number, device=device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self.group)
        return int(smallest)


UNSHARDED = TensorShard()
"""The whole decoder in one process."""


def _parse_name(name: str) -> tuple[str, str] | None:
    """Return projection and kind (weight, bias, lora_A or lora_B) of a parameter, as in 'layers.3.q_proj_bias' ->
    ('q_proj', 'bias'); None if the parameter belongs to no projection."""
    match = _PROJECTION_PARAMETER.search(name)
    return (match["projection"], match["kind"] or "weight") if match else None


def _shard_axis(name: str) -> int | None:
    """Return the dimension along which a parameter is split: 0 for rows (outputs), 1 for columns (inputs); None if
    every process holds all of it."""
    if (parsed := _parse_name(name)) is None:
        return None
    projection, kind = parsed
    if projection in _COLUMN_SHARDED:
        return 1 if kind in ("weight", "lora_A") else None
    return None if kind == "lora_A" else 0
