"""The pass over the vocabulary that cross-entropy and scoring share: sums of exp(x·w_v - shift), no logits in memory.

A persistent program computes a tile of the logits z = X Wᵀ in registers. Its epilogue turns the tile into
E = exp(z - shift), leaves out the target's column, and stores the row sums of the tile. These are plain stores, no
atomics, so the bits are the same in every call. bf16 has the exponent range of fp32. Therefore one shift per row, the
target's logit, is enough unless another logit is larger by tens of nats. Such a row has a huge sum and is recomputed
with its maximum as the shift.

If E is stored (bf16), the gradient is E W with row scales: only the exponentials are rounded, never the logits.

Cost: 2 * T * V * H FLOP.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thinksafe.kernels.dispatch import INTERPRETED, TensorDescriptor, jit, on_triton, tl, triton
from thinksafe.kernels.matmul_tile import INTERPRETER_TILE, MatmulTile, tile_position

MAX_ROW_SUM = 2.0**60
"""Sum of a row's exp(z - shift) above which the row is recomputed with its largest logit as the shift. This is 41 nats,
half the range of fp32, so that matmuls with E do not overflow."""

# sm_90a, bf16: 235 registers if E is stored, else 234. The reductions of entropy and top-1 spill in a tile this large.
LOSS_TILE = INTERPRETER_TILE if INTERPRETED else MatmulTile(128, 256, 64, 8, 8, 3)
ENTROPY_TILE = INTERPRETER_TILE if INTERPRETED else MatmulTile(128, 128, 64, 8, 8, 4)


@jit
def _exp_gemm_kernel(
    x_desc, w_desc, e_desc, target_ptr, shift_ptr, sums_ptr, weighted_sums_ptr, row_max_ptr, argmax_ptr, active_ptr,
    T, V, H,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Overwrite the outputs, e_desc to argmax_ptr, that are not None, in row blocks for which active_ptr holds 1."""
    LOG2E: tl.constexpr = 1.4426950408889634
    num_t, num_v = tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_t * num_v, tl.num_programs(0), flatten=active_ptr is None):
        block_t, block_v = tile_position(tile, num_t, num_v, GROUP)
        is_active = True
        if active_ptr is not None:
            is_active = tl.load(active_ptr + block_t) != 0
        if is_active:
            logits = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            for h in range(0, H, BLOCK_K):
                x = x_desc.load([block_t * BLOCK_T, h])
                w = w_desc.load([block_v * BLOCK_N, h])
                logits = tl.dot(x, w.T, logits, input_precision="ieee")
            rows = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
            columns = block_v * BLOCK_N + tl.arange(0, BLOCK_N)
            row_mask = rows < T
            shift = tl.load(shift_ptr + rows, mask=row_mask, other=0.0)
            target = tl.load(target_ptr + rows, mask=row_mask, other=-1)
            sums_offsets = block_v.to(tl.int64) * T + rows  # T * V / BLOCK_N passes 2^31 at T = 3.6M
            if row_max_ptr is not None:
                valid_logits = tl.where(columns[None, :] < V, logits, float("-inf"))
                row_max = tl.max(valid_logits, axis=1)
                tl.store(row_max_ptr + sums_offsets, row_max, mask=row_mask)
                if argmax_ptr is not None:  # two plain reductions, because one over (value, index) pairs spills
                    argmax = tl.min(tl.where(valid_logits == row_max[:, None], columns[None, :], V), axis=1)
                    tl.store(argmax_ptr + sums_offsets, argmax, mask=row_mask)
            if sums_ptr is not None:
                # An infinite weight can make a logit -inf. Adding 0 * logits makes that row NaN.
                shift += 0.0 * tl.sum(logits, axis=1)
                e = tl.exp2(logits * LOG2E - (shift * LOG2E)[:, None])
                # 32-bit columns relative to the tile: comparing int64 targets would take a sixth of all instructions.
                target_column, column = target.to(tl.int32) - block_v * BLOCK_N, tl.arange(0, BLOCK_N)[None, :]
                e = tl.where((column != target_column[:, None]) & (column < V - block_v * BLOCK_N), e, 0.0)
                if e_desc is not None:
                    e_desc.store([block_t * BLOCK_T, block_v * BLOCK_N], e.to(e_desc.dtype))
                tl.store(sums_ptr + sums_offsets, tl.sum(e, axis=1), mask=row_mask)
                if weighted_sums_ptr is not None:
                    weighted_sum = tl.sum(tl.where(e > 0, e * logits, 0.0), axis=1)
                    tl.store(weighted_sums_ptr + sums_offsets, weighted_sum, mask=row_mask)


@jit
def _gather_dot_kernel(x_ptr, weight_ptr, ids_ptr, out_ptr, K, H, BLOCK_H: tl.constexpr):
    """Store the dot product of x[t] and weight[ids[t, k]] in out[t, k], one per program, summed in fp32."""
    pair = tl.program_id(0).to(tl.int64)
    row, token = pair // K, tl.load(ids_ptr + pair).to(tl.int64)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for h in range(0, H, BLOCK_H):
        columns = h + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + row * H + columns, mask=columns < H, other=0.0).to(tl.float32)
        acc += x * tl.load(weight_ptr + token * H + columns, mask=columns < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + pair, tl.sum(acc))


def gather_dot(x: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """Return the logits x[t] · weight[token_ids[t, k]] of chosen tokens, [T, K] fp32; all arguments are contiguous."""
    out = torch.empty(token_ids.shape, dtype=torch.float32, device=x.device)
    H = x.shape[1]
    block = min(triton.next_power_of_2(H), 2048)
    _gather_dot_kernel[(out.numel(),)](x, weight, token_ids, out, token_ids.shape[1], H, BLOCK_H=block, num_warps=4)
    return out


class ExpGemmResult(NamedTuple):
    """Sums over the vocabulary of E = exp(z - shift), with z = X Wᵀ and E = 0 in the target's column; all in fp32.

    Attributes:
        shift: [T], the target's logit, or the largest logit in a row whose sum would be above MAX_ROW_SUM.
        target_exp: [T], exp(z_target - shift): 1 unless the shift is the largest logit.
        other_sum: [T], the sum of E.
        log_sum: [T], log(target_exp + other_sum), which is lse - shift, precise also for a tiny other_sum.
        tile_sums: [V tiles, T], E summed over each vocabulary tile.
        e: E, [T, V tiles * BLOCK_N] in the dtype of x; None without `store`.
        entropy, top1: [T] fp32 in nats, and [T] int64, the most likely token (the smallest id among equals); None
            without `with_entropy_and_top1`.
    """

    shift: Tensor
    target_exp: Tensor
    other_sum: Tensor
    log_sum: Tensor
    tile_sums: Tensor
    e: Tensor | None
    entropy: Tensor | None
    top1: Tensor | None


def exp_gemm(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    target_logit: Tensor,
    *,
    store: bool = False,
    with_entropy_and_top1: bool = False,
) -> ExpGemmResult:
    """Return sums of exp(x·w_v - shift) over the vocabulary for x [T, H], T at least 1, and weight [V, H].

    Both are aligned as `check_tma_alignment` requires; target is [T] int64 and target_logit [T] fp32.
    """
    tile = ENTROPY_TILE if with_entropy_and_top1 else LOSS_TILE
    T, num_v = len(x), triton.cdiv(len(weight), tile.BLOCK_N)
    sums = x.new_empty(num_v, T, dtype=torch.float32)
    e = x.new_empty(T, num_v * tile.BLOCK_N) if store else None
    weighted_sums = tile_max = tile_argmax = None
    if with_entropy_and_top1:
        weighted_sums, tile_max = torch.empty_like(sums), torch.empty_like(sums)
        tile_argmax = torch.empty_like(sums, dtype=torch.int32)
    _launch(tile, x, weight, target, target_logit, e, sums, weighted_sums, tile_max, tile_argmax)
    # Two gated passes: if no sum is too large they are two empty launches, and the host never waits for the device.
    is_too_large = sums.sum(0) > MAX_ROW_SUM
    active = torch.nn.functional.pad(is_too_large, (0, -T % tile.BLOCK_T)).view(-1, tile.BLOCK_T).any(1).int()
    row_max = x.new_full((triton.cdiv(len(weight), ENTROPY_TILE.BLOCK_N), T), -torch.inf, dtype=torch.float32)
    _launch(ENTROPY_TILE, x, weight, target, target_logit, tile_max=row_max, active=active)
    shift = torch.where(is_too_large, torch.maximum(row_max.amax(0), target_logit), target_logit)
    _launch(tile, x, weight, target, shift, e, sums, weighted_sums, active=active)
    target_exp, other_sum = torch.exp(target_logit - shift), sums.sum(0)
    # 1 + other_sum would round a small sum away.
    log_sum = torch.where(target_exp == 1, torch.log1p(other_sum), torch.log(target_exp + other_sum))
    entropy = top1 = None
    if with_entropy_and_top1:
        mean_logit = (weighted_sums.sum(0) + target_exp * target_logit) / (target_exp + other_sum)
        entropy = shift + log_sum - mean_logit
        top1 = tile_argmax.gather(0, tile_max.argmax(0, keepdim=True))[0].long()
    return ExpGemmResult(shift, target_exp, other_sum, log_sum, sums, e, entropy, top1)


def _launch(
    tile: MatmulTile, x, weight, target, shift, e=None, sums=None, weighted_sums=None, tile_max=None, tile_argmax=None,
    active=None,
) -> None:  # fmt: skip
    """Launch `_exp_gemm_kernel` once; active is [row blocks] int32, or None for all row blocks."""
    e_desc = None if e is None else TensorDescriptor.from_tensor(e, [tile.BLOCK_T, tile.BLOCK_N])
    (T, H), V = x.shape, len(weight)
    _exp_gemm_kernel[tile.grid(T, V, x.device)](
        *tile.descriptors(x, weight), e_desc, target, shift, sums, weighted_sums, tile_max, tile_argmax, active,
        T, V, H, **tile._asdict(),
    )  # fmt: skip


def on_tensor_cores(x: Tensor) -> bool:
    """Return whether operations on the language-model head run as Triton kernels: for 16-bit x, or in the interpreter.

    fp32 on a GPU runs in plain torch, because fp32 tiles of this size do not fit in shared memory.
    """
    return on_triton(x) and (INTERPRETED or x.element_size() == 2)
