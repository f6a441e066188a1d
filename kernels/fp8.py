"""Numbers in e4m3, eight bits each, with a power of two for every row of them.

A row is what shares one scale: a head of a token in the page cache, an output channel of a weight, a token at the
input of a product. The scale is the smallest power of two that brings the row's largest number to 448 or below, e4m3's
largest, and is kept as its exponent plus 127 in one byte. e4m3 keeps three bits behind the point at every size, so that
a finer scale gains next to nothing (relative rms error of normal numbers 2.66% with a power of two, 2.57% with
amax / 448, 2.66% with one scale a page), while multiplying by a power of two is exact and the byte is 0.8% of a head of
128. A row's bits depend on nothing but the row.

NaN stays NaN, and infinity becomes it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thinksafe.kernels.dispatch import jit, on_triton, tl, triton

E4M3 = torch.float8_e4m3fn
_MANTISSA = (1 << 23) - 1
_RECIPROCAL = 1 / 448


class Quantised(NamedTuple):
    """Rows in e4m3.

    Attributes:
        values: [..., D] e4m3.
        exponents: [...] uint8, of the rows' scales.
    """

    values: Tensor
    exponents: Tensor


def supported(device: torch.device) -> bool:
    """Whether the device computes with e4m3: a CPU, and a GPU of compute capability 8.9 or more (L40, H100)."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def reference(x: Tensor, columns: Tensor | None = None) -> Quantised:
    """`quantise` in plain torch."""
    x = x.float() if columns is None else x.float() * scales(columns)
    bits = (x.abs().amax(-1) * _RECIPROCAL).view(torch.int32)
    exponents = ((bits >> 23) + (bits & _MANTISSA != 0)).clamp(1, 254)  # rounded up
    return Quantised((x * _power(254 - exponents)[..., None]).to(E4M3), exponents.to(torch.uint8))


def dequantise(values: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that `quantise` kept, [..., D] in `dtype`."""
    return (values.float() * scales(exponents)[..., None]).to(dtype)


def scales(exponents: Tensor) -> Tensor:
    """fp32 powers of two from uint8 exponents, same shape."""
    return _power(exponents.int())


def _power(exponents: Tensor) -> Tensor:
    return (exponents << 23).view(torch.float32)


@jit
def exponent_of(largest):
    """The biased exponent, int32, of a row with this largest magnitude."""
    bits = (largest * 0.002232142857142857).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum((bits >> 23) + (bits & 0x7FFFFF != 0).to(tl.int32), 1), 254)


@jit
def power_of_two(exponent):
    """fp32, from a biased int32 exponent; that of the inverse is 254 less it."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@jit
def _quantise_kernel(x_ptr, columns_ptr, values_ptr, exponents_ptr, D, BLOCK_D: tl.constexpr):
    """One row."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    if columns_ptr is not None:
        x *= power_of_two(tl.load(columns_ptr + columns, mask=columns < D, other=127).to(tl.int32))
    exponent = exponent_of(tl.max(tl.abs(x), axis=0))
    tl.store(exponents_ptr + row, exponent)
    tl.store(values_ptr + row * D + columns, x * power_of_two(254 - exponent), mask=columns < D)


def quantise(x: Tensor, columns: Tensor | None = None) -> Quantised:
    """Round every row of x, [..., D] floating-point: 1 + itemsize bytes a number.

    Args:
        columns: [D] uint8, exponents of scales that the columns are multiplied with before that; None for 1.
    """
    if not on_triton(x):
        return reference(x, columns)
    x = x.contiguous()
    values, exponents = torch.empty_like(x, dtype=E4M3), x.new_empty(x.shape[:-1], dtype=torch.uint8)
    if x.numel():
        block = triton.next_power_of_2(x.shape[-1])
        _quantise_kernel[(exponents.numel(),)](x, columns, values, exponents, x.shape[-1], BLOCK_D=block, num_warps=8)
    return Quantised(values, exponents)
