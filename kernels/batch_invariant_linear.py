"""Matmuls x Wᵀ + b in which a row's bits do not depend on the other rows of its batch, in one dtype or in e4m3.

cuBLAS picks its kernel, and with it the order of summation, by the number of rows, so a token's hidden state depends on
the rest of its batch. Here each output element is one sum over K in steps of BLOCK_K, in one order, never split between
programs. Only the other two sides of the tile depend on the shape: we take the largest tile that still gives every SM
one. The sides decide which program computes an element, not how.

With both operands in e4m3 (fp8.py), the same kernel multiplies frozen weights, quantized when they were loaded, with
inputs that are quantized row by row, once for all weights that read them. On an H200 reading the weights is the limit
up to 184 rows, and FLOP above. e4m3 has half the bytes and twice the rate of bf16, so it is twice as fast in both
ranges. e4m3 weights with bf16 inputs would be twice as fast only below 92 rows, and choosing between two forms by the
number of rows would make a response depend on its batch. Tensor cores accumulate e4m3 with 14 bits, so the kernel adds
every BLOCK_K to a sum in fp32.

Cost: 2 * T * N * K FLOP; bytes of the weight, of x and of the result, once each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thinksafe.kernels.dispatch import INTERPRETED, TensorDescriptor, jit, on_triton, tl, triton
from thinksafe.kernels.fp8 import E4M3, Fp8Tensor, e8m0_to_fp32, power_of_two


@dataclass(frozen=True)
class LinearTileConfig:
    """Launch configuration of `_batch_invariant_linear_kernel`; one program computes one tile of the result at a time.

    Attributes:
        block_t: rows of x, and so of the result, in a tile.
        block_n: rows of the weight, and so columns of the result, in a tile.
        num_warps: warps per program.
        num_stages: stages of the software pipeline over K.
    """

    block_t: int
    block_n: int
    num_warps: int
    num_stages: int


_UP_TO_128 = (LinearTileConfig(128, 128, 8, 4), LinearTileConfig(64, 64, 4, 4), LinearTileConfig(64, 32, 4, 4))
TILE_CONFIGS = {1: _UP_TO_128, 2: (LinearTileConfig(128, 256, 8, 3), *_UP_TO_128), 4: _UP_TO_128}
"""Bytes per element of x and the weight -> configurations, largest tile first. In e4m3 a program holds each sum twice
(tensor core, fp32), so registers of a 128 x 256 tile would spill."""
BLOCK_K_BYTES = 128
"""Bytes of a row of x or of the weight that one step over K reads: 64 elements in bf16 or 128 in e4m3."""
GROUP = 8
"""Number of row tiles that use one column tile before the next column tile starts. The weight is read once per group of
row tiles."""
_CPU_BLOCK_ROWS = 32
"""Rows of x in each matmul on a CPU, whose BLAS also picks a kernel by the number of rows. Zeros pad the last block."""


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b, [T, N] in the dtype of x, from matmuls of _CPU_BLOCK_ROWS rows each for every T.

    Args:
        x: [T, K].
        weight: [N, K], in the dtype of x.
        bias: [N], in the dtype of x, or None.
    """
    blocks = F.pad(x, (0, 0, 0, -len(x) % _CPU_BLOCK_ROWS)).split(_CPU_BLOCK_ROWS)
    return torch.cat([F.linear(block, weight, bias) for block in blocks])[: len(x)] if len(x) else F.linear(x, weight)


@jit
def _batch_invariant_linear_kernel(
    x_desc, w_desc, x_scales_ptr, w_scales_ptr, bias_ptr, out_ptr, T, N, K,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    num_t, num_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_t * num_n, tl.num_programs(0)):
        first_block_t = tile // (GROUP * num_n) * GROUP
        group_size = min(num_t - first_block_t, GROUP)
        block_t = first_block_t + tile % (GROUP * num_n) % group_size
        block_n = tile % (GROUP * num_n) // group_size
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


def choose_tile(T: int, N: int, itemsize: int, num_sms: int) -> LinearTileConfig:
    """Return the largest tile of TILE_CONFIGS[itemsize] that leaves no SM without a tile, or the smallest if none does.

    Args:
        T, N: rows and columns of the result.
        itemsize: bytes per element of x and the weight: 1, 2 or 4.
        num_sms: SMs of the GPU.
    """
    tiles_that_fill = (
        tile for tile in TILE_CONFIGS[itemsize] if -(-T // tile.block_t) * -(-N // tile.block_n) >= num_sms
    )
    return next(tiles_that_fill, TILE_CONFIGS[itemsize][-1])


def _launch(x: Tensor, weight: Tensor, scales_e8m0: tuple, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    (T, K), N = x.shape, len(weight)
    out = x.new_empty(T, N, dtype=dtype)
    if not out.numel():
        return out
    if K * x.element_size() % 16:  # TMA needs rows of a multiple of 16 bytes; low-rank adapters may have less
        x, weight = (F.pad(operand, (0, -K % 16)) for operand in (x, weight))
    num_sms = 2 if INTERPRETED else torch.cuda.get_device_properties(x.device).multi_processor_count
    tile = LinearTileConfig(16, 32, 4, 1) if INTERPRETED else choose_tile(T, N, x.element_size(), num_sms)
    block_k = 32 if INTERPRETED else BLOCK_K_BYTES // x.element_size()
    num_tiles = triton.cdiv(T, tile.block_t) * triton.cdiv(N, tile.block_n)
    _batch_invariant_linear_kernel[(min(num_tiles, num_sms),)](
        TensorDescriptor.from_tensor(x.contiguous(), [tile.block_t, block_k]),
        TensorDescriptor.from_tensor(weight, [tile.block_n, block_k]),
        *scales_e8m0, bias, out, T, N, x.shape[1], BLOCK_T=tile.block_t, BLOCK_N=tile.block_n, BLOCK_K=block_k,
        GROUP=GROUP, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def batch_invariant_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return x Wᵀ + b, with the same bits for a row in every batch. Not differentiable.

    Args:
        x: [T, K], floating point.
        weight: [N, K], in the dtype of x, contiguous.
        bias: [N], in the dtype of x, or None for no bias. It is not checked.
        dtype: dtype of the result; None for the dtype of x. A GPU rounds once from fp32 to it, a CPU rounds to the
            dtype of x first.

    Returns:
        [T, N] in `dtype`.

    Raises:
        ValueError: x and weight are not [T, K] and [N, K], their dtypes differ, or weight is not contiguous.
    """
    _check(x, weight, x.dtype)
    if not on_triton(x):
        return reference(x, weight, bias).to(dtype or x.dtype)
    return _launch(x, weight, (None, None), bias, dtype or x.dtype)


def fp8_linear(x: Fp8Tensor, weight: Fp8Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x Wᵀ + b with x and W in e4m3, with the same bits for a row in every batch. Not differentiable.

    out[t, n] = 2 ** (x_scale[t] - 127) * 2 ** (w_scale[n] - 127) * sum over k of x_value[t, k] * w_value[n, k] + b[n]

    Args:
        x: values [T, K], scales [T].
        weight: values [N, K], contiguous, and scales [N].
        bias: [N], in any floating-point dtype, or None for no bias. It is not checked.
        dtype: dtype of the result, which is rounded once from fp32.

    Returns:
        [T, N] in `dtype`.

    Raises:
        ValueError: the values are not [T, K] and [N, K], those of the weight are not e4m3 or not contiguous.
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
