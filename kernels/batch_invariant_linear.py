"""Matmuls x Wᵀ + b in which a row's bits do not depend on the other rows of its batch, in one dtype or in e4m3.

cuBLAS picks its kernel, and with it the order of summation, by the number of rows, so a token's hidden state depends on
the rest of its batch. Here each output element is one sum over K in steps of BLOCK_K, in one order, never split between
programs. Only the other two sides of the tile depend on the shape: we take the largest tile that still gives every SM
one. The sides decide which program computes an element, not how.

With both operands in e4m3 (fp8.py), the same kernel multiplies frozen weights, quantized when they were loaded, with
inputs that are quantized row by row. e4m3 has half the bytes and twice the rate of bf16, so it is twice as fast both
where reading the weights is the limit (up to 184 rows on an H200) and above. With bf16 inputs it would be so only below
92 rows, and two forms would make a response depend on its batch. Tensor cores accumulate e4m3 with 14 bits, so the
kernel adds every BLOCK_K to a sum in fp32.

Cost: 2 * T * N * K FLOP; bytes of the weight, of x and of the result, once each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thinksafe.kernels.dispatch import INTERPRETED, jit, on_triton, tl
from thinksafe.kernels.fp8 import E4M3, Fp8Tensor, e8m0_to_fp32, power_of_two
from thinksafe.kernels.matmul_tile import INTERPRETER_TILE, MatmulTile, num_sms, tile_position

_UP_TO_128 = ((128, 128, 8, 4), (64, 64, 4, 4), (64, 32, 4, 4))
TILES = {
    itemsize: tuple(MatmulTile(T, N, 128 // itemsize, 8, warps, stages) for T, N, warps, stages in sizes)
    for itemsize, sizes in {1: _UP_TO_128, 2: ((128, 256, 8, 3), *_UP_TO_128), 4: _UP_TO_128}.items()
}
"""Bytes per element of x and the weight -> tiles, largest first; a step over K reads 128 bytes of a row. In e4m3 a
program holds each sum twice (tensor core, fp32), so registers of a 128 x 256 tile would spill."""
_CPU_BLOCK_ROWS = 32
"""Rows of x in each matmul on a CPU, whose BLAS also picks a kernel by the number of rows. Zeros pad the last block."""


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b, [T, N] in the dtype of x, from matmuls of _CPU_BLOCK_ROWS rows each for every T."""
    blocks = F.pad(x, (0, 0, 0, -len(x) % _CPU_BLOCK_ROWS)).split(_CPU_BLOCK_ROWS)
    return torch.cat([F.linear(block, weight, bias) for block in blocks])[: len(x)] if len(x) else F.linear(x, weight)


@jit
def _batch_invariant_linear_kernel(
    x_desc, w_desc, x_scales_ptr, w_scales_ptr, bias_ptr, out_ptr, T, N, K,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    num_t, num_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_t * num_n, tl.num_programs(0)):
        block_t, block_n = tile_position(tile, num_t, num_n, GROUP)
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([block_t * BLOCK_T, k])
            w = w_desc.load([block_n * BLOCK_N, k])
            acc = tl.dot(x, w.T, acc, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
        rows = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
        columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if x_scales_ptr is not None:
            x_scale = tl.load(x_scales_ptr + rows, mask=rows < T, other=127).to(tl.int32)
            w_scale = tl.load(w_scales_ptr + columns, mask=columns < N, other=127).to(tl.int32)
            acc = acc * power_of_two(x_scale)[:, None] * power_of_two(w_scale)[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        out_offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(out_ptr + out_offsets, acc, mask=(rows < T)[:, None] & (columns < N)[None, :])


def choose_tile(T: int, N: int, itemsize: int, num_sms: int) -> MatmulTile:
    """Return the largest tile of TILES[itemsize] of which a T x N result has at least one per SM, else the
    smallest."""
    tiles = TILES[itemsize]
    return next((tile for tile in tiles if tile.count(T, N) >= num_sms), tiles[-1])


def _launch(x: Tensor, weight: Tensor, scales_e8m0: tuple, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    (T, K), N = x.shape, len(weight)
    out = x.new_empty(T, N, dtype=dtype)
    if not out.numel():
        return out
    if K * x.element_size() % 16:  # TMA needs rows of a multiple of 16 bytes; low-rank adapters may have less
        x, weight = (F.pad(operand, (0, -K % 16)) for operand in (x, weight))
    tile = INTERPRETER_TILE if INTERPRETED else choose_tile(T, N, x.element_size(), num_sms(x.device))
    _batch_invariant_linear_kernel[tile.grid(T, N, x.device)](
        *tile.descriptors(x.contiguous(), weight), *scales_e8m0, bias, out, T, N, x.shape[1], **tile._asdict()
    )
    return out


def batch_invariant_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return x Wᵀ + b, [T, N], with the same bits for a row in every batch. Not differentiable.

    Args:
        x: [T, K], floating point.
        weight: [N, K], in the dtype of x, contiguous.
        bias: [N], in the dtype of x, or None. It is not checked.
        dtype: dtype of the result; None for the dtype of x. A GPU rounds once from fp32 to it, a CPU rounds to the
            dtype of x first.

    Raises:
        ValueError: x and weight are not [T, K] and [N, K], their dtypes differ, or weight is not contiguous.
    """
    _check(x, weight, x.dtype)
    if not on_triton(x):
        return reference(x, weight, bias).to(dtype or x.dtype)
    return _launch(x, weight, (None, None), bias, dtype or x.dtype)


def fp8_linear(x: Fp8Tensor, weight: Fp8Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x Wᵀ + b, [T, N] in `dtype`, with x and W in e4m3; the same bits for a row in every batch.

    The sum over k of the values' products, in fp32, is multiplied by the scales of x's row and of W's row. b is [N] in
    any floating-point dtype and is not checked. Not differentiable.

    Raises:
        ValueError: the values are not [T, K] and [N, K], or those of the weight are not e4m3 or not contiguous.
    """
    _check(x.values, weight.values, E4M3)
    if on_triton(x.values):
        return _launch(x.values, weight.values, (x.scales_e8m0, weight.scales_e8m0), bias, dtype)
    out = reference(x.values.float(), weight.values.float())
    out = out * e8m0_to_fp32(x.scales_e8m0)[:, None] * e8m0_to_fp32(weight.scales_e8m0)
    return (out if bias is None else out + bias).to(dtype)


def _check(x: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [T, K] and weight [N, K]; found {list(x.shape)} and {list(weight.shape)}")
    if weight.dtype != dtype or not weight.is_contiguous():
        raise ValueError(
            f"weight must be {dtype} and contiguous; found {weight.dtype} with strides {list(weight.stride())}"
        )
