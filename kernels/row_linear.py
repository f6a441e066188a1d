"""Linear maps whose rows know nothing of each other: a row has the same bits whatever stands beside it.

cuBLAS picks another kernel, and with it another order of summation, for another number of rows, so that a token's
hidden state depends on who else is in the batch. Here every output is one sum over K in steps of BLOCK_K, in one order,
never split between programs. Only the tile's other two sides follow the shape: the largest tile of which there are
enough for all processors. They decide which program computes an output, not how.

With both operands in e4m3 (fp8.py) the same kernel is the product of frozen weights that were quantised when they were
loaded and of inputs that are quantised row by row, once for all weights that read them. It reads half the bytes and
multiplies at twice the rate of bf16, and so is twice as fast on either side of the 184 rows (on an H200) up to which
reading weights is the limit. Weights in e4m3 against inputs in bf16 would be so only below 92 rows, and two ways to
compute one product, chosen by the number of rows, would make a response depend on its batch. Tensor cores add up e4m3
with 14 bits; every BLOCK_K of it goes to fp32.

2 * T * N * K FLOP; bytes of the weight, once, of x and of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thinksafe.kernels.dispatch import INTERPRETED, TensorDescriptor, jit, on_triton, tl, triton
from thinksafe.kernels.fp8 import E4M3, Quantised, power_of_two, scales


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of a tile of the result, warps a program, and stages of the software pipeline."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


_UP_TO_128 = (Tiles(128, 128, 8, 4), Tiles(64, 64, 4, 4), Tiles(64, 32, 4, 4))
TILES = {1: _UP_TO_128, 2: (Tiles(128, 256, 8, 3), *_UP_TO_128), 4: _UP_TO_128}
"""By itemsize, largest first. e4m3 holds every sum twice, in the tensor core and in fp32: at 128 x 256 they spill."""
BLOCK_BYTES = 128
"""Of K at a time: a line of shared memory, 64 numbers of bf16 or 128 of e4m3."""
GROUP = 8
"""Tiles of rows that run over a tile of columns before the next one: the weight is read once a group."""
_CPU_ROWS = 32
"""Rows at a time on a CPU, with zeros for those that are missing: its BLAS also picks a kernel by their number."""


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, the same number of rows at a time whatever their number is."""
    blocks = F.pad(x, (0, 0, 0, -len(x) % _CPU_ROWS)).split(_CPU_ROWS)
    return torch.cat([F.linear(block, weight, bias) for block in blocks])[: len(x)] if len(x) else F.linear(x, weight)


@jit
def _row_linear_kernel(
    x_desc, w_desc, x_exponents_ptr, w_exponents_ptr, bias_ptr, out_ptr, T, N, K,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    num_t, num_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_t * num_n, tl.num_programs(0)):
        first = tile // (GROUP * num_n) * GROUP
        height = min(num_t - first, GROUP)
        block_t = first + tile % (GROUP * num_n) % height
        block_n = tile % (GROUP * num_n) // height
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([block_t * BLOCK_T, k])
            w = w_desc.load([block_n * BLOCK_N, k])
            acc = tl.dot(x, w.T, acc, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
        rows = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
        columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if x_exponents_ptr is not None:
            x_exponent = tl.load(x_exponents_ptr + rows, mask=rows < T, other=127).to(tl.int32)
            w_exponent = tl.load(w_exponents_ptr + columns, mask=columns < N, other=127).to(tl.int32)
            acc = acc * power_of_two(x_exponent)[:, None] * power_of_two(w_exponent)[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        at = rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(out_ptr + at, acc, mask=(rows < T)[:, None] & (columns < N)[None, :])


def tiles_of(T: int, N: int, itemsize: int, processors: int) -> Tiles:
    """The largest tile of which there is one for every processor, or the smallest."""
    enough = (tiles for tiles in TILES[itemsize] if -(-T // tiles.rows) * -(-N // tiles.columns) >= processors)
    return next(enough, TILES[itemsize][-1])


def _launch(x: Tensor, weight: Tensor, exponents: tuple, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    (T, K), N = x.shape, len(weight)
    out = x.new_empty(T, N, dtype=dtype)
    if not out.numel():
        return out
    if K * x.element_size() % 16:  # the copy engine wants rows of whole 16 bytes; adapters of low rank may be narrower
        x, weight = (F.pad(operand, (0, -K % 16)) for operand in (x, weight))
    processors = 2 if INTERPRETED else torch.cuda.get_device_properties(x.device).multi_processor_count
    tiles = Tiles(16, 32, 4, 1) if INTERPRETED else tiles_of(T, N, x.element_size(), processors)
    block_k = 32 if INTERPRETED else BLOCK_BYTES // x.element_size()
    num_tiles = triton.cdiv(T, tiles.rows) * triton.cdiv(N, tiles.columns)
    _row_linear_kernel[(min(num_tiles, processors),)](
        TensorDescriptor.from_tensor(x.contiguous(), [tiles.rows, block_k]),
        TensorDescriptor.from_tensor(weight, [tiles.columns, block_k]),
        *exponents, bias, out, T, N, x.shape[1], BLOCK_T=tiles.rows, BLOCK_N=tiles.columns, BLOCK_K=block_k,
        GROUP=GROUP, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """x Wᵀ + b, row by row the same bits in every batch. Not differentiable.

    Args:
        x: [T, K].
        weight: [N, K], in the dtype of x, contiguous.
        bias: [N] or None.
        dtype: of the result, which is rounded once from fp32 on a GPU; that of x if it is None.

    Returns:
        [T, N].

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    _check(x, weight, x.dtype)
    if not on_triton(x):
        return reference(x, weight, bias).to(dtype or x.dtype)
    return _launch(x, weight, (None, None), bias, dtype or x.dtype)


def fp8_linear(x: Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x Wᵀ + b with both in e4m3. Not differentiable.

    Args:
        x: [T, K], K a multiple of 16 on a GPU.
        weight: [N, K], contiguous.
        bias: [N] or None.
        dtype: of the result, which is rounded once from fp32.

    Returns:
        [T, N], row by row the same bits in every batch.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    _check(x.values, weight.values, E4M3)
    if on_triton(x.values):
        return _launch(x.values, weight.values, (x.exponents, weight.exponents), bias, dtype)
    out = reference(x.values.float(), weight.values.float()) * scales(x.exponents)[:, None] * scales(weight.exponents)
    return (out if bias is None else out + bias).to(dtype)


def _check(x: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x is {list(x.shape)}, weight is {list(weight.shape)}: expected [T, K] and [N, K]")
    if weight.dtype != dtype or not weight.is_contiguous():
        raise ValueError(f"weight is {weight.dtype}, expected {dtype}, contiguous")
