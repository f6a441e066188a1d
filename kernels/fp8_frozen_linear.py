"""Matmuls with frozen e4m3 weights that pass a gradient to their input: the base model under LoRA training.

    y = x Wᵀ + b                   W[n, k] = 2^e[n] Q[n, k]; x is quantized row by row
    dX = dY W = (dY 2^e) Q         dY 2^e is quantized row by row

The scale of a weight row can be factored out of the forward sum over k, but not out of the backward sum over n. There
it multiplies dY before dY is quantized, which is exact because the scale is a power of two. Both directions therefore
use the same elements Q, and the gradient belongs to the loss that was computed. Tensor cores read e4m3 only along the
inner dimension, so memory holds Q twice, as [N, K] and as [K, N]. Together they take the bytes of the bf16 weight,
which is not kept. The backward pass needs nothing of x.

Cost: 2 * T * N * K FLOP per direction, at twice the rate of bf16; quantization moves 3 bytes per element of x and dY.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thinksafe.kernels.batch_invariant_linear import fp8_linear
from thinksafe.kernels.checks import check_floating, check_tensor
from thinksafe.kernels.fp8 import E4M3, Fp8Tensor, quantize


class Fp8FrozenWeight(NamedTuple):
    """A frozen e4m3 weight matrix for both directions: W[n, k] = values[n, k] * 2 ** (scales_e8m0[n] - 127).

    Attributes:
        values: [N, K] e4m3.
        scales_e8m0: [N] uint8, exponent plus 127 of each row's scale.
        values_transposed: [K, N] e4m3, the same elements.
    """

    values: Tensor
    scales_e8m0: Tensor
    values_transposed: Tensor

    @classmethod
    def from_fp8(cls, weight: Fp8Tensor) -> Fp8FrozenWeight:
        """Return the form for both directions of a weight matrix [N, K] that is quantized row by row. `values` shares
        its memory."""
        # Transposed as bytes, because not every device can transpose e4m3.
        values_transposed = weight.values.detach().view(torch.uint8).T.contiguous().view(E4M3)
        return cls(weight.values.detach(), weight.scales_e8m0.clone(), values_transposed)


@torch.library.custom_op("thinksafe::fp8_frozen_linear", mutates_args=())
def _fp8_frozen_linear(
    x: Tensor,
    values: Sequence[Tensor],
    scales_e8m0: Sequence[Tensor],
    values_transposed: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:
    """Return x Wᵀ + b, [T, N] in the dtype of x, for each weight matrix; a bias without elements means no bias.

    `values_transposed` is saved for the backward pass only.
    """
    x_fp8 = quantize(x)
    return [
        fp8_linear(x_fp8, Fp8Tensor(*weight), bias if len(bias) else None, x.dtype)
        for *weight, bias in zip(values, scales_e8m0, biases, strict=True)
    ]


@_fp8_frozen_linear.register_fake
def _(x, values, scales_e8m0, values_transposed, biases):
    return [x.new_empty(len(x), len(weight)) for weight in values]


@torch.library.custom_op("thinksafe::fp8_frozen_linear_backward", mutates_args=())
def _fp8_frozen_linear_backward(
    grads: Sequence[Tensor], scales_e8m0: Sequence[Tensor], values_transposed: Sequence[Tensor]
) -> Tensor:
    grad_x = None
    for grad, scale_e8m0, weight in zip(grads, scales_e8m0, values_transposed, strict=True):
        unit_scales = torch.full_like(weight[:, 0], 127, dtype=torch.uint8)
        product = fp8_linear(quantize(grad, scale_e8m0), Fp8Tensor(weight, unit_scales), None, grad.dtype)
        grad_x = product if grad_x is None else grad_x.add_(product)
    return grad_x


@_fp8_frozen_linear_backward.register_fake
def _(grads, scales_e8m0, values_transposed):
    return grads[0].new_empty(len(grads[0]), len(values_transposed[0]))


def _setup_context(ctx, inputs, output):
    _, _, scales_e8m0, values_transposed, _ = inputs
    ctx.save_for_backward(*scales_e8m0, *values_transposed)


def _backward(ctx, grads):
    num_weights, saved_tensors = len(grads), list(ctx.saved_tensors)
    grad_x = _fp8_frozen_linear_backward(
        [grad.contiguous() for grad in grads], saved_tensors[:num_weights], saved_tensors[num_weights:]
    )
    return grad_x, *([None] * num_weights for _ in range(4))


_fp8_frozen_linear.register_autograd(_backward, setup_context=_setup_context)


def fp8_frozen_linear(x: Tensor, weights: Sequence[Fp8FrozenWeight], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Return x Wᵀ + b, [T, N] in the dtype of x, for each of several frozen weight matrices; only x gets a gradient.

    x is quantized row by row, once for all weights.

    Args:
        x: [T, K], floating point; K and every N a multiple of 16 on a GPU.
        weights: one or more weight matrices, [N, K] each; N may differ.
        biases: one per weight: [N] in the dtype of x, a constant, or None.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must be [T, K]; found {list(x.shape)}")
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        shape = (len(weight.values), x.shape[1])
        check_tensor(f"weights[{index}]", weight.values, shape, E4M3, x.device, allow_strided=False)
        if bias is not None:
            check_tensor(f"biases[{index}]", bias, shape[:1], x.dtype, x.device)
    no_bias = x.new_empty(0)
    return _fp8_frozen_linear(
        x.contiguous(),
        *map(list, zip(*weights, strict=True)),
        [no_bias if bias is None else bias.detach() for bias in biases],
    )
