"""Products with frozen weights in e4m3 that gradients pass through: what LoRA trains on top of.

    y = x Wᵀ + b                   W[n, k] = 2^e[n] Q[n, k], and x rounded row by row
    dX = dY W = (dY 2^e) Q         dY 2^e rounded row by row

A row's scale leaves the sum over k of the forward product, but not the sum over n of the backward one: there it goes
into dY before that is rounded, which is exact, a power of two. Both directions so multiply with the same numbers Q, and
a gradient is that of the loss that was computed. Tensor cores read e4m3 along the inner dimension alone, so Q lies in
memory twice, as [N, K] and as [K, N]: what the weight takes in bf16, which is not kept beside them.

Several weights that read the same x share its rounding. For the backward pass nothing of x is kept.

2 * T * N * K FLOP a direction, at twice the rate of bf16; rounding moves 3 bytes for every number of x and dY.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thinksafe.kernels.checks import check_floating, check_tensor
from thinksafe.kernels.fp8 import E4M3, Quantised, quantise
from thinksafe.kernels.row_linear import fp8_linear

_ONE = 127
"""The exponent of a scale of 1."""


class FrozenWeight(NamedTuple):
    """A weight in e4m3 for both directions.

    Attributes:
        values: [N, K] e4m3.
        exponents: [N] uint8, of the rows' scales.
        transposed: [K, N] e4m3, the same numbers.
    """

    values: Tensor
    exponents: Tensor
    transposed: Tensor

    @classmethod
    def of(cls, weight: Quantised) -> FrozenWeight:
        """From a weight that is quantised by its rows."""
        # A byte is a byte; not every device transposes e4m3.
        transposed = weight.values.detach().view(torch.uint8).T.contiguous().view(E4M3)
        return cls(weight.values.detach(), weight.exponents.clone(), transposed)


@torch.library.custom_op("thinksafe::frozen_linear", mutates_args=())
def _frozen_linear(
    x: Tensor,
    values: Sequence[Tensor],
    exponents: Sequence[Tensor],
    transposed: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> list[Tensor]:
    """biases: of no elements where there is none."""
    rows = quantise(x)
    return [
        fp8_linear(rows, Quantised(*weight), bias if len(bias) else None, x.dtype)
        for *weight, bias in zip(values, exponents, biases, strict=True)
    ]


@_frozen_linear.register_fake
def _(x, values, exponents, transposed, biases):
    return [x.new_empty(len(x), len(one)) for one in values]


@torch.library.custom_op("thinksafe::frozen_linear_backward", mutates_args=())
def _frozen_linear_backward(
    grads: Sequence[Tensor], exponents: Sequence[Tensor], transposed: Sequence[Tensor]
) -> Tensor:
    total = None
    for grad, scale, weight in zip(grads, exponents, transposed, strict=True):
        ones = torch.full_like(weight[:, 0], _ONE, dtype=torch.uint8)
        part = fp8_linear(quantise(grad, scale), Quantised(weight, ones), None, grad.dtype)
        total = part if total is None else total.add_(part)
    return total


@_frozen_linear_backward.register_fake
def _(grads, exponents, transposed):
    return grads[0].new_empty(len(grads[0]), len(transposed[0]))


def _setup_context(ctx, inputs, output):
    _, _, exponents, transposed, _ = inputs
    ctx.save_for_backward(*exponents, *transposed)


def _backward(ctx, grads):
    count, saved = len(grads), list(ctx.saved_tensors)
    grad_x = _frozen_linear_backward([grad.contiguous() for grad in grads], saved[:count], saved[count:])
    return grad_x, *([None] * count for _ in range(4))


_frozen_linear.register_autograd(_backward, setup_context=_setup_context)


def frozen_linear(x: Tensor, weights: Sequence[FrozenWeight], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """x Wᵀ + b for some weights that read the same rows, with a gradient of x alone.

    Args:
        x: [T, K], K and every N a multiple of 16 on a GPU.
        weights: [N, K] each.
        biases: [N] each, constants in the dtype of x, or None.

    Returns:
        [T, N] each, in the dtype of x.

    Raises:
        TypeError, ValueError: an argument does not fit, with its name.
    """
    check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must be [T, K]; found {list(x.shape)}")
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        size = len(weight.values)
        check_tensor(f"weights[{number}]", weight.values, (size, x.shape[1]), E4M3, x.device, strided=False)
        if bias is not None:
            check_tensor(f"biases[{number}]", bias, (size,), x.dtype, x.device)
    none = x.new_empty(0)
    return _frozen_linear(
        x.contiguous(),
        [weight.values for weight in weights],
        [weight.exponents for weight in weights],
        [weight.transposed for weight in weights],
        [none if bias is None else bias.detach() for bias in biases],
    )
