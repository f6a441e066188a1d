"""The GPU path on meta tensors: real shapes and the operations that a GPU would run, without memory and arithmetic.

    with on_gpu_path(), torch.device("meta"), MemoryTrace() as trace: ...

MemoryTrace watches when storages are created and freed. The bytes that are saved for a backward pass and the peak are
therefore measured, not calculated.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thinksafe.kernels.packed_attention import flash_attention
from thinksafe.model.config import LoraConfig, ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import attach


@contextmanager
def on_gpu_path(grouped_heads: bool = False):
    """Route kernels and attention as for CUDA tensors inside the block.

    Args:
        grouped_heads: True: attention reads keys and values once per KV head. False: they are repeated for each query
            head, as with a torch whose `varlen_attn` lacks enable_gqa.
    """

    def dropout(x, rate, training):
        return torch.native_dropout(x, rate, training)[0] if rate else x

    with (
        patch("thinksafe.kernels.dispatch.INTERPRETED", True),
        patch("thinksafe.kernels.packed_attention.HAS_FLASH_ATTN", False),
        patch("thinksafe.kernels.packed_attention.TORCH_READS_GROUPED_HEADS", grouped_heads),
        patch("thinksafe.model.attention.packed_attention", flash_attention),
        patch("thinksafe.model.decoder.F.dropout", dropout),
    ):
        yield


class MemoryTrace(TorchDispatchMode):
    """Mode that records every storage that a torch operation inside the block creates, and when it is freed.

    Attributes:
        peak_bytes: largest number of bytes that were alive at once.
        moved_bytes: bytes that operations other than matmuls and attention read and wrote, without views.
        num_launches: number of operations that would launch a kernel.
    """

    def __init__(self):
        super().__init__()
        self.peak_bytes, self.moved_bytes, self.num_launches = 0, 0, 0
        self._live_storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        shared = {tensor.untyped_storage()._cdata for tensor in inputs}
        new_tensors = [tensor for tensor in results if tensor.untyped_storage()._cdata not in shared]
        for tensor in new_tensors:
            storage = tensor.untyped_storage()
            self._live_storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if new_tensors or op._schema.is_mutable:
            self.num_launches += 1
            if op not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and op.namespace != "torch_attn":
                self.moved_bytes += sum(tensor.nbytes for tensor in [*inputs, *new_tensors])
        if new_tensors:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return out

    def live_bytes(self) -> int:
        """Return the bytes of all recorded storages that are alive now."""
        self._live_storages = {key: entry for key, entry in self._live_storages.items() if not entry[0].expired()}
        return sum(nbytes for _, nbytes in self._live_storages.values())


def decoder_on_meta(config: ModelConfig, lora: LoraConfig | None) -> Decoder:
    """Return a bf16 decoder on the meta device in training mode; all weights are trainable if `lora` is None.

    Args:
        lora: adapters to attach, which are then the only trainable weights.
    """
    with torch.device("meta"):
        decoder = Decoder(config).to(torch.bfloat16)
    if lora is None:
        return decoder.requires_grad_(True).train()
    attach(decoder, lora, seed=0)
    return decoder.train()
