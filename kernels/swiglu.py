"""SwiGLU, the gate of the feed-forward block: y = silu(gate) * up, with silu(g) = g * σ(g).

Forward reads two [T, I] tensors and writes one; backward reads three and writes two:
    dup = dy * silu(gate),  dgate = dy * up * σ(gate) * (1 + gate * (1 - σ(gate))).
Only the inputs are saved for the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thinksafe.kernels.checks import check_floating, check_tensor
from thinksafe.kernels.dispatch import jit, on_triton, tl, triton

BACKWARD_BLOCK, FORWARD_BLOCK = 4096, 1024
"""Elements per program of the two kernels. A forward program stays within one row, since inputs may be slices of wider
rows; 1,024 divides most intermediate sizes."""


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up in plain torch."""
    return F.silu(gate) * up


@jit
def _forward_kernel(gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, num_columns, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * num_columns + columns, gate * tl.sigmoid(gate) * up, mask=mask)


@jit
def _backward_kernel(grad_y_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, num_elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    grad_y = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(grad_up_ptr + offsets, grad_y * gate * sigmoid, mask=mask)
    tl.store(grad_gate_ptr + offsets, grad_y * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=mask)


@torch.library.custom_op("thinksafe::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = _empty_like(gate)
    if gate.numel():
        gate, up = _as_matrix(gate), _as_matrix(up)
        num_rows, num_columns = gate.shape
        _forward_kernel[(num_rows, triton.cdiv(num_columns, FORWARD_BLOCK))](
            gate, up, y, gate.stride(0), up.stride(0), num_columns, BLOCK=FORWARD_BLOCK, num_warps=4
        )
    return y


@torch.library.custom_op("thinksafe::swiglu_backward", mutates_args=())
def _swiglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = _empty_like(gate), _empty_like(up)
    if gate.numel():
        _backward_kernel[(triton.cdiv(gate.numel(), BACKWARD_BLOCK),)](
            grad_y.contiguous(), gate.contiguous(), up.contiguous(), grad_gate, grad_up, gate.numel(),
            BLOCK=BACKWARD_BLOCK, num_warps=8,
        )  # fmt: skip
    return grad_gate, grad_up


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_swiglu.register_fake(lambda gate, up: _empty_like(gate))
_swiglu_backward.register_fake(lambda grad_y, gate, up: (_empty_like(gate), _empty_like(up)))
_swiglu.register_autograd(
    lambda ctx, grad_y: _swiglu_backward(grad_y, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _as_matrix(x: Tensor) -> Tensor:
    """Return x [..., I] as [rows, I] with contiguous rows, without a copy if the strides of x allow it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, element by element, with silu(g) = g / (1 + exp(-g)); differentiable.

    Both are [..., I], floating point, with the same shape, dtype and device. They may be slices of one matmul.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    check_floating("gate", gate)
    check_tensor("up", up, gate.shape, gate.dtype, gate.device)
    return _swiglu(gate, up) if on_triton(gate) else reference(gate, up)
