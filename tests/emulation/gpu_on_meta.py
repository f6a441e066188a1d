"""What a GPU would run, on meta tensors: real shapes, the operations of the GPU path, no memory and no arithmetic.

    with on_gpu_path(), torch.device("meta"), MemoryTrace() as trace: ...

Storages are watched as they come and go, so that what is held for a backward pass, and the peak, are found and not
computed.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thinksafe.kernels.packed_attention import _with_torch
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import LoraConfig, attach


@contextmanager
def on_gpu_path(grouped_heads: bool = False):
    """Kernels and attention take the way that CUDA tensors take.

    Args:
        grouped_heads: attention reads keys and values as flash-attn does, by torch's operator, which allows it as well.
    """

    def dropout(x, share, training):
        return torch.native_dropout(x, share, training)[0] if share else x

    def grouped(q, k, v, cu_seqlens, max_seqlen):
        bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return varlen_attn(q, k, v, *bounds, window_size=(-1, 0), enable_gqa=True)

    with (
        patch("thinksafe.kernels.dispatch.INTERPRETED", True),
        patch("thinksafe.model.attention.packed_attention", grouped if grouped_heads else _with_torch),
        patch("thinksafe.model.decoder.F.dropout", dropout),
    ):
        yield


class MemoryTrace(TorchDispatchMode):
    """Watches every storage that an operation makes.

    Attributes:
        peak: bytes, the most that were alive at once.
        moved: bytes that operations other than products read and wrote, views left out.
        launches: operations that would launch a kernel.
    """

    def __init__(self):
        super().__init__()
        self.peak, self.moved, self.launches = 0, 0, 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        shared = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [tensor for tensor in results if tensor.untyped_storage()._cdata not in shared]
        for tensor in new:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if new or op._schema.is_mutable:
            self.launches += 1
            if op not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and op.namespace != "torch_attn":
                self.moved += sum(tensor.nbytes for tensor in [*inputs, *new])
        if new:
            self.peak = max(self.peak, self.held())
        return out

    def held(self) -> int:
        """Bytes alive now."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(nbytes for _, nbytes in self._alive.values())


def decoder_on_meta(config: ModelConfig, lora: LoraConfig | None) -> Decoder:
    """A bf16 decoder that trains adapters, or every weight."""
    with torch.device("meta"):
        decoder = Decoder(config).to(torch.bfloat16)
    if lora is None:
        return decoder.requires_grad_(True).train()
    attach(decoder, lora, seed=0)
    return decoder.train()
