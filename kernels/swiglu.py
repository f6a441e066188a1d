"""SwiGLU, the gate of the feed-forward block: y = silu(gate) * up, with silu(g) = g * σ(g).

Forward reads two [T, I] tensors and writes one; backward reads three and writes two:
    dup = dy * silu(gate),  dgate = dy * up * σ(gate) * (1 + gate * (1 - σ(gate))).
Nothing but the inputs is kept for the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thinksafe.kernels.checks import check_floating, check_tensor
from thinksafe.kernels.dispatch import jit, on_triton, tl, triton

_BLOCK = 4096
_COLUMNS = 1024
"""Of one row at a time, going forward: inputs may be parts of wider rows. It divides most intermediate sizes."""


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain torch."""
    return F.silu(gate) * up


@jit
def _forward_kernel(gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, num_columns, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * num_columns + columns, gate * tl.sigmoid(gate) * up, mask=inside)


@jit
def _backward_kernel(grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, num_elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_elements
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(grad_up_ptr + offsets, grad * gate * sigmoid, mask=inside)
    tl.store(grad_gate_ptr + offsets, grad * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=inside)


@torch.library.custom_op("thinksafe::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if gate.numel():
        gate, up = _matrix(gate), _matrix(up)
        num_rows, num_columns = gate.shape
        _forward_kernel[(num_rows, triton.cdiv(num_columns, _COLUMNS))](
            gate, up, y, gate.stride(0), up.stride(0), num_columns, BLOCK=_COLUMNS, num_warps=4
        )
    return y


@_swiglu.register_fake
def _(gate, up):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("thinksafe::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        _backward_kernel[(triton.cdiv(gate.numel(), _BLOCK),)](
            grad, gate, up, grad_gate, grad_up, gate.numel(), BLOCK=_BLOCK, num_warps=8
        )
    return grad_gate, grad_up


@_swiglu_backward.register_fake
def _(grad, gate, up):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))


_swiglu.register_autograd(
    lambda ctx, grad: _swiglu_backward(grad.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _matrix(x: Tensor) -> Tensor:
    """[rows, I], numbers of a row next to each other; copied only where they are not."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element.

    Args:
        gate, up: [..., I], floating point, alike in shape, dtype and device; they may be parts of one product.

    Returns:
        [..., I].

    Raises:
        TypeError, ValueError: they differ or are not floating point.
    """
    check_floating("gate", gate)
    check_tensor("up", up, gate.shape, gate.dtype, gate.device)
    return _swiglu(gate, up) if on_triton(gate) else reference(gate, up)
