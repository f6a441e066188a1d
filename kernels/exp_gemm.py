"""The pass over the vocabulary that cross-entropy and scoring share: sums of exp(x·w_v - shift), no logits in memory.

A persistent program computes a [BLOCK_T, BLOCK_V] tile of the logits X Wᵀ in registers. Its epilogue turns the tile
into E = exp(z - shift), leaves out the target's column, and writes the row sums to `sums`, which has one row per
vocabulary tile. These are plain stores, no atomics, so the bits are the same in every call. bf16 has the exponent range
of fp32. Therefore one shift per row, the target's logit, is enough unless another logit is larger by tens of nats. Such
a row has a huge sum and is recomputed with its maximum as the shift.

If E is stored (bf16), the gradient is E W with row scales: only the exponentials are rounded, never the logits.

Cost: 2 * T * V * H FLOP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinksafe.kernels.dispatch import INTERPRETED, TensorDescriptor, jit, on_triton, tl, triton

LOG2E = 1.4426950408889634
MAX_ROW_SUM = 2.0**60
"""Sum of a row's exp(z - shift) above which the row is recomputed with its largest logit as the shift. This is 41 nats,
half the range of fp32, so that matmuls with E do not overflow."""


@dataclass(frozen=True)
class HeadTileConfig:
    """Launch configuration of a kernel that computes tiles of logits X Wᵀ, here and in linear_kl.py.

    Attributes:
        block_t: rows of X, and of the logits, in a tile.
        block_v: vocabulary entries of a tile.
        block_h: hidden dimensions of one step of the matmul.
        group: row blocks that use a vocabulary tile, while it is in the L2, before the next vocabulary tile starts.
        num_warps: warps per program.
        num_stages: stages of the software pipeline over the hidden dimensions.
    """

    block_t: int
    block_v: int
    block_h: int
    group: int
    num_warps: int
    num_stages: int


# sm_90a, bf16: 235 registers if E is stored, else 234. The reductions of entropy and top-1 spill in a tile this large.
LOSS_TILE = HeadTileConfig(16, 32, 32, 2, 4, 1) if INTERPRETED else HeadTileConfig(128, 256, 64, 8, 8, 3)
ENTROPY_TILE = HeadTileConfig(16, 16, 32, 2, 4, 1) if INTERPRETED else HeadTileConfig(128, 128, 64, 8, 8, 4)


@jit
def _exp_gemm_kernel(
    x_desc, w_desc, e_desc, target_ptr, shift_ptr, sums_ptr, weighted_sums_ptr, row_max_ptr, argmax_ptr, active_ptr,
    T, V, H,
    SUMS: tl.constexpr, STORE: tl.constexpr, ENTROPY: tl.constexpr, ROW_MAX: tl.constexpr, ARGMAX: tl.constexpr,
    GATED: tl.constexpr, LOG2E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    num_t, num_v = tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), num_t * num_v, tl.num_programs(0), flatten=not GATED):
        # GROUP row blocks use a vocabulary tile before the next one: W is read once per group, not once per block.
        first_block_t = tile // (GROUP * num_v) * GROUP
        group_size = min(num_t - first_block_t, GROUP)
        block_t = first_block_t + tile % (GROUP * num_v) % group_size
        block_v = tile % (GROUP * num_v) // group_size
        is_active = True
        if GATED:
            is_active = tl.load(active_ptr + block_t) != 0
        if is_active:
            logits = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
            for h in range(0, H, BLOCK_H):
                x = x_desc.load([block_t * BLOCK_T, h])
                w = w_desc.load([block_v * BLOCK_V, h])
                logits = tl.dot(x, w.T, logits, input_precision="ieee")
            rows = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
            columns = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
            row_mask = rows < T
            shift = tl.load(shift_ptr + rows, mask=row_mask, other=0.0)
            target = tl.load(target_ptr + rows, mask=row_mask, other=-1)
            sums_offsets = block_v.to(tl.int64) * T + rows  # T * V / BLOCK_V passes 2^31 at T = 3.6M
            if ROW_MAX:
                valid_logits = tl.where(columns[None, :] < V, logits, float("-inf"))
                row_max = tl.max(valid_logits, axis=1)
                tl.store(row_max_ptr + sums_offsets, row_max, mask=row_mask)
                if ARGMAX:  # two plain reductions, because one over (value, index) pairs spills
                    argmax = tl.min(tl.where(valid_logits == row_max[:, None], columns[None, :], V), axis=1)
                    tl.store(argmax_ptr + sums_offsets, argmax, mask=row_mask)
            if SUMS:
                # An infinite weight can make a logit -inf. Adding 0 * logits makes that row NaN instead of dropping the
                # token.
                shift += 0.0 * tl.sum(logits, axis=1)
                e = tl.exp2(logits * LOG2E - (shift * LOG2E)[:, None])
                # 32-bit columns relative to the tile: comparing int64 targets would take a sixth of all instructions.
                target_column, column = target.to(tl.int32) - block_v * BLOCK_V, tl.arange(0, BLOCK_V)[None, :]
                e = tl.where((column != target_column[:, None]) & (column < V - block_v * BLOCK_V), e, 0.0)
                if STORE:
                    e_desc.store([block_t * BLOCK_T, block_v * BLOCK_V], e.to(e_desc.dtype))
                tl.store(sums_ptr + sums_offsets, tl.sum(e, axis=1), mask=row_mask)
                if ENTROPY:
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
    """Return the logits of chosen tokens, x[t] · weight[token_ids[t, k]], [T, K] fp32. Cost: 2 * T * K * H FLOP.

    It always runs as a Triton kernel.

    Args:
        x: [T, H], contiguous.
        weight: [V, H], contiguous.
        token_ids: [T, K] int64 in [0, V), contiguous.
    """
    out = torch.empty(token_ids.shape, dtype=torch.float32, device=x.device)
    if out.numel():
        H = x.shape[1]
        block = min(triton.next_power_of_2(H), 2048)
        _gather_dot_kernel[(out.numel(),)](x, weight, token_ids, out, token_ids.shape[1], H, BLOCK_H=block, num_warps=4)
    return out


@dataclass(frozen=True)
class ExpGemmResult:
    """Outputs of `exp_gemm`, with z = X Wᵀ and E = exp(z - shift), 0 in the target's column.

    Attributes:
        shift: [T] fp32, the number subtracted from each row's logits: the target's logit, or the largest logit in a row
            whose sum would be above MAX_ROW_SUM.
        sums: [V tiles, T] fp32, E summed over each vocabulary tile.
        e: E, [T, V tiles * BLOCK_V] in the dtype of x; None without `store`.
        weighted_sums: [V tiles, T] fp32, E * z summed over each tile; None without `with_entropy_and_top1`.
        tile_max, tile_argmax: [V tiles, T] fp32 and int32, the largest logit of each tile (target included) and its
            token id, the smallest among equals; None without `with_entropy_and_top1`.
    """

    shift: Tensor
    sums: Tensor
    e: Tensor | None
    weighted_sums: Tensor | None
    tile_max: Tensor | None
    tile_argmax: Tensor | None


def exp_gemm(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    target_logit: Tensor,
    *,
    store: bool = False,
    with_entropy_and_top1: bool = False,
) -> ExpGemmResult:
    """Return the sums of exp(x·w_v - shift) over the vocabulary and, on request, E and the sums for entropy and top-1.

    The device decides which row blocks have a sum above MAX_ROW_SUM and repeats the pass for them; the host does not
    wait. It always runs as a Triton kernel.

    Args:
        x: [T, H], T at least 1, contiguous and aligned as `check_tma_alignment` requires.
        weight: [V, H], contiguous and aligned likewise.
        target: [T] int64 in [0, V).
        target_logit: [T] fp32, x·w_target.
        store: return E.
        with_entropy_and_top1: return weighted_sums, tile_max and tile_argmax.
    """
    tile = ENTROPY_TILE if with_entropy_and_top1 else LOSS_TILE
    sums_shape = (triton.cdiv(weight.shape[0], tile.block_v), x.shape[0])
    sums = x.new_empty(sums_shape, dtype=torch.float32)
    weighted_sums = torch.empty_like(sums) if with_entropy_and_top1 else None
    tile_max = torch.empty_like(sums) if with_entropy_and_top1 else None
    tile_argmax = torch.empty_like(sums, dtype=torch.int32) if with_entropy_and_top1 else None
    e = x.new_empty(x.shape[0], sums_shape[0] * tile.block_v) if store else None
    _launch(tile, x, weight, target, target_logit, None, sums, e, weighted_sums, tile_max, tile_argmax)
    # Two gated passes: if no sum is too large they are two empty launches, and the host never waits for the device.
    is_too_large = sums.sum(0) > MAX_ROW_SUM
    num_blocks = triton.cdiv(x.shape[0], tile.block_t)
    active_blocks = torch.zeros(num_blocks * tile.block_t, dtype=torch.bool, device=x.device)
    active_blocks[: x.shape[0]] = is_too_large
    active_blocks = active_blocks.view(num_blocks, tile.block_t).any(1).int()
    shift_max = x.new_full(
        (triton.cdiv(weight.shape[0], ENTROPY_TILE.block_v), x.shape[0]), -torch.inf, dtype=torch.float32
    )
    _launch(ENTROPY_TILE, x, weight, target, target_logit, active_blocks, None, None, None, shift_max, None)
    shift = torch.where(is_too_large, torch.maximum(shift_max.amax(0), target_logit), target_logit)
    _launch(tile, x, weight, target, shift, active_blocks, sums, e, weighted_sums, None, None)
    return ExpGemmResult(shift, sums, e, weighted_sums, tile_max, tile_argmax)


def _launch(
    tile: HeadTileConfig, x, weight, target, shift, active_blocks, sums, e, weighted_sums, tile_max, tile_argmax
) -> None:
    """Launch `_exp_gemm_kernel` once. It overwrites the outputs, `sums` to `tile_argmax`; None is not computed.

    Args:
        active_blocks: [row blocks] int32; row blocks with 0 are skipped and keep their outputs. None computes all.
    """
    (T, H), V = x.shape, weight.shape[0]
    num_tiles = triton.cdiv(T, tile.block_t) * triton.cdiv(V, tile.block_v)
    x_desc = TensorDescriptor.from_tensor(x, [tile.block_t, tile.block_h])
    _exp_gemm_kernel[(min(num_tiles, num_sms(x.device)),)](
        x_desc,
        TensorDescriptor.from_tensor(weight, [tile.block_v, tile.block_h]),
        x_desc if e is None else TensorDescriptor.from_tensor(e, [tile.block_t, tile.block_v]),
        target, shift, sums, weighted_sums, tile_max, tile_argmax, active_blocks, T, V, H,
        SUMS=sums is not None, STORE=e is not None, ENTROPY=weighted_sums is not None, ROW_MAX=tile_max is not None,
        ARGMAX=tile_argmax is not None, GATED=active_blocks is not None, LOG2E=LOG2E, BLOCK_T=tile.block_t,
        BLOCK_V=tile.block_v, BLOCK_H=tile.block_h, GROUP=tile.group,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def num_sms(device: torch.device) -> int:
    """Return the number of SMs of a GPU; in the interpreter 1."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def on_tensor_cores(x: Tensor) -> bool:
    """Return whether operations on the language-model head use Triton kernels for hidden states x.

    This is so for 16-bit x on a GPU, and for every x in the interpreter. In all other cases they use the plain PyTorch
    reference, also for fp32 on a GPU: fp32 tiles of this size do not fit in shared memory.

    Raises:
        RuntimeError: x is on a GPU and Triton is not installed.
    """
    return on_triton(x) and (INTERPRETED or x.element_size() == 2)
