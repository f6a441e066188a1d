"""Quantization to e4m3, a float of eight bits, with one power of two as the scale of each row.

The elements of a row share one scale. A row is a head of a token in the page cache, an output channel of a weight, or a
token at the input of a matmul. The scale is the smallest power of two that brings the row's largest magnitude to at
most 448, the largest number of e4m3. It is stored as its exponent plus 127 in one byte (e8m0).

e4m3 has three mantissa bits at every magnitude, so a finer scale gains almost nothing: the relative rms error of
normally distributed elements is 2.66% with a power of two, 2.57% with amax / 448 and 2.66% with one scale per page.
Multiplying by a power of two is exact, and the byte is 0.8% of a head of 128 elements. A row's bits depend only on the
row.

NaN stays NaN, and infinity becomes NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thinksafe.kernels.dispatch import jit, on_triton, tl, triton

E4M3 = torch.float8_e4m3fn


class Fp8Tensor(NamedTuple):
    """Rows quantized to e4m3: element = value * 2 ** (scale_e8m0 - 127).

    Attributes:
        values: [..., D] e4m3.
        scales_e8m0: [...] uint8 in [1, 254], exponent plus 127 of each row's scale.
    """

    values: Tensor
    scales_e8m0: Tensor


def supports_fp8(device: torch.device) -> bool:
    """Return whether the device supports e4m3: a CPU always, a GPU from compute capability 8.9 on (L40, H100)."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def reference(x: Tensor, column_scales_e8m0: Tensor | None = None) -> Fp8Tensor:
    """Return the same as `quantize`, in plain torch."""
    x = x.float() if column_scales_e8m0 is None else x.float() * e8m0_to_fp32(column_scales_e8m0)
    bits = (x.abs().amax(-1) * (1 / 448)).view(torch.int32)
    biased_exponents = ((bits >> 23) + (bits & 0x7FFFFF != 0)).clamp(1, 254)  # rounded up
    values = x * e8m0_to_fp32(254 - biased_exponents)[..., None]
    return Fp8Tensor(values.to(E4M3), biased_exponents.to(torch.uint8))


def dequantize(values: Tensor, scales_e8m0: Tensor, dtype: torch.dtype) -> Tensor:
    """Return value * 2 ** (scale_e8m0 - 127), [..., D] in `dtype`, from e4m3 values [..., D] and uint8 scales [...]."""
    return (values.float() * e8m0_to_fp32(scales_e8m0)[..., None]).to(dtype)


def e8m0_to_fp32(scales_e8m0: Tensor) -> Tensor:
    """Return 2 ** (scales_e8m0 - 127) in fp32, same shape, for integers in [1, 254]."""
    return (scales_e8m0.int() << 23).view(torch.float32)


@jit
def amax_to_e8m0(amax):
    """Return the smallest scale_e8m0, int32 in [1, 254], for which amax <= 448 * 2 ** (scale_e8m0 - 127)."""
    bits = (amax * 0.002232142857142857).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum((bits >> 23) + (bits & 0x7FFFFF != 0).to(tl.int32), 1), 254)


@jit
def power_of_two(biased_exponent):
    """Return 2 ** (biased_exponent - 127) in fp32, for int32 in [1, 254]; the inverse is of 254 - biased_exponent."""
    return (biased_exponent << 23).to(tl.float32, bitcast=True)


@jit
def _quantize_kernel(x_ptr, column_scales_ptr, values_ptr, scales_ptr, D, BLOCK_D: tl.constexpr):
    """Quantize one row of D elements per program; column_scales_ptr may be None."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    if column_scales_ptr is not None:
        x *= power_of_two(tl.load(column_scales_ptr + columns, mask=columns < D, other=127).to(tl.int32))
    biased_exponent = amax_to_e8m0(tl.max(tl.abs(x), axis=0))
    tl.store(scales_ptr + row, biased_exponent)
    tl.store(values_ptr + row * D + columns, x * power_of_two(254 - biased_exponent), mask=columns < D)


def quantize(x: Tensor, column_scales_e8m0: Tensor | None = None) -> Fp8Tensor:
    """Return x [..., D], floating point, quantized row by row; element = value * 2 ** (scale_e8m0 - 127).

    Column d is first multiplied by 2 ** (column_scales_e8m0[d] - 127), if these are given ([D] uint8). Moves
    1 + itemsize bytes per element.
    """
    if not on_triton(x):
        return reference(x, column_scales_e8m0)
    x = x.contiguous()
    values, scales_e8m0 = torch.empty_like(x, dtype=E4M3), x.new_empty(x.shape[:-1], dtype=torch.uint8)
    if x.numel():
        block = triton.next_power_of_2(x.shape[-1])
        _quantize_kernel[(scales_e8m0.numel(),)](
            x, column_scales_e8m0, values, scales_e8m0, x.shape[-1], BLOCK_D=block, num_warps=8
        )
    return Fp8Tensor(values, scales_e8m0)
