"""The pass over the vocabulary that cross-entropy and scoring share: sums of exp(x·w_v - shift), no logits in memory.

Logits live in registers only. A persistent program computes a [BLOCK_T, BLOCK_V] tile of X Wᵀ (2 * T * V * H FLOP in
all) and turns it in its epilogue into E = exp(z - shift) with the target's column left out, row sums of which go to
`sums`, one row a vocabulary tile: plain stores, no atomics, so the same bits every time. bf16 has fp32's exponent
range, so one shift a row, the target's own logit, is enough unless another logit is larger by tens of nats; such a row
shows as a huge sum and is computed again with its maximum as the shift.

Where E is kept (bf16), the gradient is E W with row scales: the logits are never rounded, only their exponentials.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinksafe.kernels.dispatch import INTERPRETED, TensorDescriptor, jit, on_triton, tl, triton

LOG2E = 1.4426950408889634
LARGEST_SUM = 2.0**60
"""A row's sum from which it is computed again: 41 nats, half of fp32's, so that products with E keep their range."""


@dataclass(frozen=True)
class Tiles:
    """One configuration of the kernel: tile sizes, row blocks that share a vocabulary tile while it is in the L2, warps
    a program, and stages of the software pipeline."""

    block_t: int
    block_v: int
    block_h: int
    group: int
    num_warps: int
    num_stages: int


# sm_90a, bf16: 235 registers with E stored, 234 without. By-products need a smaller tile, or their reductions spill.
PLAIN = Tiles(16, 32, 32, 2, 4, 1) if INTERPRETED else Tiles(128, 256, 64, 8, 8, 3)
BY_PRODUCTS = Tiles(16, 16, 32, 2, 4, 1) if INTERPRETED else Tiles(128, 128, 64, 8, 8, 4)


@jit
def _exp_gemm_kernel(
    x_desc, w_desc, e_desc, target_ptr, shift_ptr, sums_ptr, weighted_ptr, best_ptr, best_id_ptr, gate_ptr, T, V, H,
    SUMS: tl.constexpr, STORE: tl.constexpr, ENTROPY: tl.constexpr, BEST: tl.constexpr, BEST_ID: tl.constexpr,
    GATED: tl.constexpr, LOG2E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    num_t, num_v = tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), num_t * num_v, tl.num_programs(0), flatten=not GATED):
        # GROUP row blocks run over a vocabulary tile before the next one: W is read once a group, not once a block.
        first = tile // (GROUP * num_v) * GROUP
        height = min(num_t - first, GROUP)
        block_t = first + tile % (GROUP * num_v) % height
        block_v = tile % (GROUP * num_v) // height
        wanted = True
        if GATED:
            wanted = tl.load(gate_ptr + block_t) != 0
        if wanted:
            logits = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
            for h in range(0, H, BLOCK_H):
                x = x_desc.load([block_t * BLOCK_T, h])
                w = w_desc.load([block_v * BLOCK_V, h])
                logits = tl.dot(x, w.T, logits, input_precision="ieee")
            rows = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
            columns = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
            inside = rows < T
            shift = tl.load(shift_ptr + rows, mask=inside, other=0.0)
            target = tl.load(target_ptr + rows, mask=inside, other=-1)
            out = block_v.to(tl.int64) * T + rows  # T * V / BLOCK_V passes 2^31 at T = 3.6M
            if BEST:
                seen = tl.where(columns[None, :] < V, logits, float("-inf"))
                best = tl.max(seen, axis=1)
                tl.store(best_ptr + out, best, mask=inside)
                if BEST_ID:  # two plain reductions; one over (value, index) pairs spills
                    where = tl.min(tl.where(seen == best[:, None], columns[None, :], V), axis=1)
                    tl.store(best_id_ptr + out, where, mask=inside)
            if SUMS:
                # 0 times all logits: one of -inf, which an infinite weight makes, is no token of no chance but a NaN.
                shift += 0.0 * tl.sum(logits, axis=1)
                e = tl.exp2(logits * LOG2E - (shift * LOG2E)[:, None])
                # In the tile's own 32-bit columns: comparing int64 targets took a sixth of all instructions.
                place, column = target.to(tl.int32) - block_v * BLOCK_V, tl.arange(0, BLOCK_V)[None, :]
                e = tl.where((column != place[:, None]) & (column < V - block_v * BLOCK_V), e, 0.0)
                if STORE:
                    e_desc.store([block_t * BLOCK_T, block_v * BLOCK_V], e.to(e_desc.dtype))
                tl.store(sums_ptr + out, tl.sum(e, axis=1), mask=inside)
                if ENTROPY:
                    tl.store(weighted_ptr + out, tl.sum(tl.where(e > 0, e * logits, 0.0), axis=1), mask=inside)


@jit
def _gather_dot_kernel(x_ptr, weight_ptr, ids_ptr, out_ptr, K, H, BLOCK_H: tl.constexpr):
    """One dot product a program, fp32."""
    pair = tl.program_id(0).to(tl.int64)
    row, token = pair // K, tl.load(ids_ptr + pair).to(tl.int64)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for h in range(0, H, BLOCK_H):
        columns = h + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + row * H + columns, mask=columns < H, other=0.0).to(tl.float32)
        total += x * tl.load(weight_ptr + token * H + columns, mask=columns < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + pair, tl.sum(total))


def gather_dot(x: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """Logits of chosen tokens: x [T, H], weight [V, H], token_ids [T, K] int64 -> [T, K] fp32. 2 * T * K * H FLOP."""
    out = torch.empty(token_ids.shape, dtype=torch.float32, device=x.device)
    if out.numel():
        H = x.shape[1]
        block = min(triton.next_power_of_2(H), 2048)
        _gather_dot_kernel[(out.numel(),)](x, weight, token_ids, out, token_ids.shape[1], H, BLOCK_H=block, num_warps=4)
    return out


@dataclass(frozen=True)
class Pass:
    """What one pass leaves behind.

    Attributes:
        shift: [T] fp32, what was subtracted from each row's logits.
        sums: [V tiles, T] fp32, exp(z - shift) summed over each tile, targets left out.
        e: [T, V tiles * BLOCK_V] bf16 (or the dtype of x), or None.
        weighted: [V tiles, T], e * z summed, or None.
        best, best_id: [V tiles, T], each tile's largest logit and where, or None.
    """

    shift: Tensor
    sums: Tensor
    e: Tensor | None
    weighted: Tensor | None
    best: Tensor | None
    best_id: Tensor | None


def exp_gemm(
    x: Tensor, weight: Tensor, target: Tensor, target_logit: Tensor, *, store: bool = False, by_products: bool = False
) -> Pass:
    """Run the pass, and again, on the device's own decision, for row blocks with a sum above LARGEST_SUM.

    Args:
        x: [T, H], T at least 1; weight: [V, H]; both contiguous and as `check_tma` asks.
        target: [T] int64.
        target_logit: [T] fp32, x·w_target.
        store: keep E.
        by_products: keep what entropy and the most likely token need.
    """
    tiles = BY_PRODUCTS if by_products else PLAIN
    table = (triton.cdiv(weight.shape[0], tiles.block_v), x.shape[0])
    sums = x.new_empty(table, dtype=torch.float32)
    weighted = torch.empty_like(sums) if by_products else None
    best = torch.empty_like(sums) if by_products else None
    best_id = torch.empty_like(sums, dtype=torch.int32) if by_products else None
    e = x.new_empty(x.shape[0], table[0] * tiles.block_v) if store else None
    _launch(tiles, x, weight, target, target_logit, None, sums, e, weighted, best, best_id)
    # Two gated passes that are two empty launches where no sum is too large, and no wait for the device.
    too_large = sums.sum(0) > LARGEST_SUM
    num_blocks = triton.cdiv(x.shape[0], tiles.block_t)
    gate = torch.zeros(num_blocks * tiles.block_t, dtype=torch.bool, device=x.device)
    gate[: x.shape[0]] = too_large
    gate = gate.view(num_blocks, tiles.block_t).any(1).int()
    maxima = x.new_full(
        (triton.cdiv(weight.shape[0], BY_PRODUCTS.block_v), x.shape[0]), -torch.inf, dtype=torch.float32
    )
    _launch(BY_PRODUCTS, x, weight, target, target_logit, gate, None, None, None, maxima, None)
    shift = torch.where(too_large, torch.maximum(maxima.amax(0), target_logit), target_logit)
    _launch(tiles, x, weight, target, shift, gate, sums, e, weighted, None, None)
    return Pass(shift, sums, e, weighted, best, best_id)


def _launch(tiles: Tiles, x, weight, target, shift, gate, sums, e, weighted, best, best_id) -> None:
    """One launch; what is None is not computed."""
    (T, H), V = x.shape, weight.shape[0]
    num_tiles = triton.cdiv(T, tiles.block_t) * triton.cdiv(V, tiles.block_v)
    x_desc = TensorDescriptor.from_tensor(x, [tiles.block_t, tiles.block_h])
    _exp_gemm_kernel[(min(num_tiles, num_processors(x.device)),)](
        x_desc,
        TensorDescriptor.from_tensor(weight, [tiles.block_v, tiles.block_h]),
        x_desc if e is None else TensorDescriptor.from_tensor(e, [tiles.block_t, tiles.block_v]),
        target, shift, sums, weighted, best, best_id, gate, T, V, H,
        SUMS=sums is not None, STORE=e is not None, ENTROPY=weighted is not None, BEST=best is not None,
        BEST_ID=best_id is not None, GATED=gate is not None, LOG2E=LOG2E, BLOCK_T=tiles.block_t,
        BLOCK_V=tiles.block_v, BLOCK_H=tiles.block_h, GROUP=tiles.group,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def num_processors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def on_tensor_cores(x: Tensor) -> bool:
    """Whether operations on the head run these kernels: in 16 bits on a GPU, or in the interpreter. fp32 tiles of this
    size do not fit in shared memory, so fp32 takes the reference path on a GPU too."""
    return on_triton(x) and (INTERPRETED or x.element_size() == 2)
