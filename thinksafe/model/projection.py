"""A projection (linear map) of a layer, x Wᵀ + b, with its weight in the model's dtype or in e4m3 and an optional
LoRA adapter; and the matmuls of all projections that read the same input."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinksafe.kernels.batch_invariant_linear import fp8_linear
from thinksafe.kernels.fp8 import E4M3, Fp8Tensor, quantize
from thinksafe.kernels.fp8_frozen_linear import Fp8FrozenWeight, fp8_frozen_linear
from thinksafe.model.config import LoraConfig

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A function (x [T, K], weight [N, K], bias [N] or None) -> x weightᵀ + bias, [T, N] in the dtype of x."""


class Projection(nn.Module):
    """x Wᵀ + b, plus (alpha / rank) * dropout(x) Aᵀ Bᵀ if `lora` is not None.

    Attributes:
        weight: [N, K], in the model's dtype or in e4m3; None if it was moved to `fp8_weight`.
        scales_e8m0: [N] uint8 if `weight` is in e4m3, else None: W[n] = weight[n] * 2 ** (scales_e8m0[n] - 127).
        fp8_weight: frozen e4m3 weight through which gradients pass, see `prepare_fp8_backward`; else None.
        bias: [N], or None.
        lora: settings of the adapter; None without an adapter, or while it is turned off.
        lora_A, lora_B: [rank, K] and [N, rank] fp32, the adapter; None without an adapter.
    """

    def __init__(self, out_features: int, in_features: int, has_bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if has_bias else None)
        self.register_buffer("scales_e8m0", None)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.fp8_weight: Fp8FrozenWeight | None = None
        self.lora: LoraConfig | None = None

    @property
    def is_fp8(self) -> bool:
        """Whether the weight is in e4m3."""
        return self.fp8_weight is not None or self.scales_e8m0 is not None

    def operands(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return weight, bias and scales. Attribute access of `nn.Module` would take 10% of a small layer's time."""
        parameters = self._parameters
        return parameters["weight"], parameters["bias"], self._buffers["scales_e8m0"]

    def add_adapter(self, out: Tensor, x: Tensor, linear: Linear) -> Tensor:
        """Return out + (alpha / rank) * dropout(x) Aᵀ Bᵀ, or `out` itself without an adapter."""
        if self.lora is None:
            return out
        low_rank = linear(F.dropout(x, self.lora.dropout, self.training), self.lora_A.to(x.dtype), None)
        return out + self.lora.alpha / self.lora.rank * linear(low_rank, self.lora_B.to(x.dtype), None)

    def allocate_fp8(self) -> None:
        """Replace the weight by an uninitialized one in e4m3, with scales."""
        self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=E4M3), requires_grad=False)
        self.scales_e8m0 = torch.empty_like(self.weight[:, 0], dtype=torch.uint8)

    def prepare_fp8_backward(self) -> None:
        """Let gradients pass through a weight in e4m3, for which a transposed copy is stored. The weight is no longer a
        parameter, so code that shards or casts parameters skips it."""
        self.fp8_weight = Fp8FrozenWeight.from_fp8(Fp8Tensor(self.weight, self.scales_e8m0))
        self.weight = self.scales_e8m0 = None


def project(projections: Sequence[Projection], x: Tensor, linear: Linear) -> list[Tensor]:
    """Return the output [T, N] of each projection for their common input x [T, K].

    An e4m3 input is quantized once for all. In inference mode, fused weights (`fuse`) are multiplied in one matmul. The
    KL reference of training is not in inference mode, so it uses the same separate matmuls as the student: a fused
    shape would round differently and show up as divergence.

    Args:
        linear: matmul of weights that are not in e4m3, and of adapters.
    """
    if projections[0].fp8_weight is not None:
        outs = fp8_frozen_linear(x, [p.fp8_weight for p in projections], [p.bias for p in projections])
        return [projection.add_adapter(out, x, linear) for projection, out in zip(projections, outs, strict=True)]
    operands = [projection.operands() for projection in projections]
    rows = x if operands[0][2] is None else quantize(x)

    def matmul(weight: Tensor, bias: Tensor | None, scales_e8m0: Tensor | None) -> Tensor:
        if scales_e8m0 is None:
            return linear(rows, weight, bias)
        return fp8_linear(rows, Fp8Tensor(weight, scales_e8m0), bias, x.dtype)

    if len(operands) > 1 and torch.is_inference_mode_enabled() and (fused := _fused_views(operands)):
        outs = matmul(*fused).split([len(weight) for weight, _, _ in operands], -1)
    else:
        outs = [matmul(*operand) for operand in operands]
    return [projection.add_adapter(out, x, linear) for projection, out in zip(projections, outs, strict=True)]


def fuse(projections: Sequence[Projection]) -> None:
    """Store the weights, the biases and the scales of projections one below the other in new memory, of which they
    become views. Moving one of them to other memory undoes this."""
    for parts in zip(*(projection.operands() for projection in projections), strict=True):
        if len(parts) > 1 and parts[0] is not None:
            memory = torch.cat([part.data for part in parts])
            for part, rows in zip(parts, memory.split([len(part) for part in parts]), strict=True):
                part.data = rows


def _fused_views(operands: list[tuple[Tensor | None, ...]]) -> list[Tensor | None] | None:
    """Return one weight, bias and scales that cover those of all projections; None if `fuse` did not store them in one
    memory, which then has exactly their size."""
    fused = []
    for parts in zip(*operands, strict=True):
        leading = parts[0]
        if leading is None:
            fused.append(None)
            continue
        num_bytes = sum(part.nbytes for part in parts)
        if any(part.untyped_storage().nbytes() != num_bytes for part in parts):
            return None
        fused.append(leading.as_strided((sum(map(len, parts)), *leading.shape[1:]), leading.stride()))
    return fused
