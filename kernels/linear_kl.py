"""Kullback-Leibler divergence between a student's and a reference's next-token distributions, from hidden states.

With L = log p_s - log p_r, everything follows from the pair (p_r, p_s) and L:
    forward  KL(r‖s) = Σ (p_s - p_r - p_r L)           dz_s = p_s - p_r
    reverse  KL(s‖r) = Σ (p_r - p_s + p_s L)           dz_s = p_s (L - KL)

The first pass over the vocabulary computes both models' logits in registers; a shared head's tile is read once for
both. Let s and r be the shares that a token has of its tile's mass under the student and under the reference. The pass
stores the larger share E = max(s, r) in bf16 and D = log s - log r in fp16: 4 bytes per element. bf16 logits of both
models have the same size, but near the reference their difference is mostly rounding error: the gradient's error is
220% at a KL of 3e-5, against 0.2% here from there to hundreds of nats (rounding emulated on a CPU).

The smaller share is E e^-|D|. The rounding error of D, a part in 2,000 of D, is damped by e^-|D|, so the result is as
precise for distant models as for close ones. For close models L = D + (log-ratio of the tile's masses) keeps
p_r (e^L - 1) from cancelling. Equal models give a value and a gradient of exactly 0.

The second pass is elementwise. It replaces E in place by dz_s, and sums the value from non-negative terms, which is the
more precise way if the value is small. A larger KL comes from the first pass, before anything is rounded, by the chain
rule: the KL of the tiles' masses plus the KL within each tile, weighted by its mass.

Cost: 6 T V H FLOP with a frozen head, 8 T V H with a trainable one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from thinksafe.kernels.checks import check_choice, check_head, check_tensor, check_tma_alignment
from thinksafe.kernels.chunked_loss import (
    allocate_loss,
    loss_in_chunks,
    matmul_fp32,
    reduce_loss,
    register_backward,
    row_weights,
    without_autocast,
)
from thinksafe.kernels.dispatch import INTERPRETED, TensorDescriptor, jit, tl, triton
from thinksafe.kernels.exp_gemm import on_tensor_cores
from thinksafe.kernels.matmul_tile import INTERPRETER_TILE, MatmulTile, tile_position

CHUNK_ROWS, REFERENCE_CHUNK_ROWS = 4096, 512
"""Rows of a chunk in Triton, whose E and D have 4096 * 151,936 * 4 bytes = 2.5 GB, and in plain torch."""
TILE = INTERPRETER_TILE if INTERPRETED else MatmulTile(128, 128, 64, 8, 8, 3)
ELEMENTWISE_ROWS = 16 if INTERPRETED else 32  # of a tile in the second pass
_SMALL_KL = 0.01
"""KL of a row, in nats, below which the second pass's sum of non-negative terms is more precise than the chain rule."""


def reference(x_student, x_reference, weight, weight_reference=None, direction="forward") -> Tensor:
    """Return the KL of each row in nats, [T], from full logits; differentiable. `linear_kl` describes the arguments."""
    log_p_student = (x_student @ weight.T).log_softmax(-1)
    log_p_reference = (x_reference @ (weight if weight_reference is None else weight_reference).T).log_softmax(-1)
    return _kl_and_gradient(log_p_student, log_p_reference, direction == "reverse")[0]


def _kl_and_gradient(log_p_student: Tensor, log_p_reference: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return (KL [T], its gradient by the student's logits [T, V]) from log-probabilities [T, V]."""
    log_ratio, p_student, p_reference = log_p_student - log_p_reference, log_p_student.exp(), log_p_reference.exp()
    if reverse:
        kl = (p_student * log_ratio).sum(-1)
        return kl, p_student * (log_ratio - kl[:, None])
    is_near = log_ratio.abs() < 1
    near_log_ratio = torch.where(is_near, log_ratio, 0.0)  # exp would overflow for large ratios
    ratio_minus_one, difference = torch.expm1(near_log_ratio), p_student - p_reference
    kl = torch.where(is_near, p_reference * (ratio_minus_one - near_log_ratio), difference - p_reference * log_ratio)
    return kl.sum(-1), torch.where(is_near, p_reference * ratio_minus_one, difference)


@jit
def _expm1_minus(x):
    """Return exp(x) - 1 - x for |x| < 1/4 from its Taylor series: the plain form cancels. Relative error: 4e-8."""
    return x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720))))


@jit
def _pair_gemm_kernel(
    student_desc, reference_desc, weight_desc, weight_reference_desc, e_desc, d_desc,
    lse_student_ptr, lse_reference_ptr, tile_logmass_diff_ptr, kl_within_tile_ptr, rounding_correction_ptr,
    T, V, H, H_reference,
    REVERSE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Store E and D, and for each vocabulary tile and row the five figures that end in _ptr.

    They are each model's lse over the tile, the log-ratio of its masses (student to reference), the KL of the shares in
    it, and with REVERSE the change of the student's mean of D by rounding. None for weight_reference_desc means that
    the models share a head.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    num_t, num_v = tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_t * num_v, tl.num_programs(0)):
        block_t, block_v = tile_position(tile, num_t, num_v, GROUP)
        z_student = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        z_reference = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for h in range(0, H, BLOCK_K):
            w = weight_desc.load([block_v * BLOCK_N, h])
            x = student_desc.load([block_t * BLOCK_T, h])
            z_student = tl.dot(x, w.T, z_student, input_precision="ieee")
            if weight_reference_desc is None:
                x = reference_desc.load([block_t * BLOCK_T, h])
                z_reference = tl.dot(x, w.T, z_reference, input_precision="ieee")
        if weight_reference_desc is not None:
            for h in range(0, H_reference, BLOCK_K):
                w = weight_reference_desc.load([block_v * BLOCK_N, h])
                x = reference_desc.load([block_t * BLOCK_T, h])
                z_reference = tl.dot(x, w.T, z_reference, input_precision="ieee")
        rows = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
        columns = (block_v * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        row_mask = rows < T
        tile_offsets = block_v.to(tl.int64) * T + rows
        # In place and one exponential at a time, or registers spill. Both models alike, so equal models cancel exactly.
        max_student = tl.max(tl.where(columns < V, z_student, float("-inf")), axis=1)
        max_reference = tl.max(tl.where(columns < V, z_reference, float("-inf")), axis=1)
        z_reference -= max_reference[:, None]
        log_ratio = (z_student - max_student[:, None]) - z_reference
        e = tl.where(columns < V, tl.exp2(z_reference * LOG2E), 0.0)
        sum_exp = tl.sum(e, axis=1)
        log_sum_reference = tl.log(sum_exp)
        if not REVERSE:  # an infinite weight can make a logit -inf: 0 * inf makes the row NaN
            mean_log_ratio = tl.sum(e * log_ratio, axis=1) / sum_exp
        e = tl.where(columns < V, tl.exp2((z_reference + log_ratio) * LOG2E), 0.0)
        sum_exp = tl.sum(e, axis=1)
        log_sum_student = tl.log(sum_exp)
        if REVERSE:
            mean_log_ratio = tl.sum(e * log_ratio, axis=1) / sum_exp
        lse_diff = log_sum_student - log_sum_reference
        tl.store(lse_student_ptr + tile_offsets, max_student + log_sum_student, mask=row_mask)
        tl.store(lse_reference_ptr + tile_offsets, max_reference + log_sum_reference, mask=row_mask)
        tl.store(tile_logmass_diff_ptr + tile_offsets, (max_student - max_reference) + lse_diff, mask=row_mask)
        kl_within_tile = mean_log_ratio - lse_diff if REVERSE else lse_diff - mean_log_ratio
        tl.store(kl_within_tile_ptr + tile_offsets, kl_within_tile, mask=row_mask)
        log_ratio -= lse_diff[:, None]
        e = tl.exp2((z_reference - log_sum_reference[:, None] + tl.maximum(log_ratio, 0.0)) * LOG2E)
        e_desc.store([block_t * BLOCK_T, block_v * BLOCK_N], e.to(e_desc.dtype))
        # A log-ratio beyond the range of fp16 is beyond that of a probability too.
        log_ratio = tl.minimum(tl.maximum(log_ratio, -60000.0), 60000.0)
        rounded_log_ratio = log_ratio.to(tl.float16)
        d_desc.store([block_t * BLOCK_T, block_v * BLOCK_N], rounded_log_ratio)
        if REVERSE:  # change of the student's mean of D by rounding
            student_share = tl.where(columns < V, e * tl.exp2(tl.minimum(log_ratio, 0.0) * LOG2E), 0.0)
            correction = tl.sum(student_share * (rounded_log_ratio.to(tl.float32) - log_ratio), axis=1)
            tl.store(rounding_correction_ptr + tile_offsets, correction, mask=row_mask)


@jit
def _divergence_kernel(
    e_ptr, d_ptr, tile_logmass_ptr, tile_logmass_diff_ptr, row_kl_ptr, row_weight_ptr, value_ptr, T, V, width,
    REVERSE: tl.constexpr, WRITE_GRADIENT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store each row's part of the KL in a tile of E and D, and with WRITE_GRADIENT row_weight * dz_s over E.

    With REVERSE the gradient needs the row's KL, at row_kl_ptr.
    """
    block_v = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = block_v * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < T)[:, None] & (columns < V)[None, :]
    offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tile_offsets = block_v.to(tl.int64) * T + rows
    tile_logmass = tl.load(tile_logmass_ptr + tile_offsets, mask=rows < T, other=0.0)[:, None]
    tile_logmass_diff = tl.load(tile_logmass_diff_ptr + tile_offsets, mask=rows < T, other=0.0)[:, None]
    e = tl.load(e_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(d_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    log_ratio = d + tile_logmass_diff
    p_reference = e * tl.exp(tile_logmass - tl.maximum(d, 0.0))
    p_student = e * tl.exp(tile_logmass + tile_logmass_diff + tl.minimum(d, 0.0))
    is_near = tl.abs(log_ratio) < 0.25
    if REVERSE:
        gradient = p_student * (log_ratio - tl.load(row_kl_ptr + rows, mask=rows < T, other=0.0)[:, None])
        # Adding Σ (p_r - p_s) = 0 makes the error quadratic in the error of L, as in the forward direction.
        value = tl.where(is_near, p_student * _expm1_minus(-log_ratio), p_reference - p_student + p_student * log_ratio)
    else:
        gradient = tl.where(is_near, p_reference * (log_ratio + _expm1_minus(log_ratio)), p_student - p_reference)
        near_value, value = p_reference * _expm1_minus(log_ratio), p_student - p_reference - p_reference * log_ratio
        value = tl.where(is_near, near_value, value)
    if WRITE_GRADIENT:
        gradient *= tl.load(row_weight_ptr + rows, mask=rows < T, other=0.0)[:, None]
        tl.store(e_ptr + offsets, gradient, mask=mask)
    tl.store(value_ptr + tile_offsets, tl.sum(value, axis=1), mask=rows < T)


def _chunk_on_triton(x_student, x_reference, weight, weight_reference, reverse, row_weight, needs_x, needs_weight):
    """Return (weighted KL [T] fp32, dX [T, H], dW [V, H] fp32) of a chunk of T rows; None for an unneeded gradient."""
    (T, H), V = x_student.shape, len(weight)
    num_v = triton.cdiv(V, TILE.BLOCK_N)
    outputs = x_student.new_empty((5, num_v, T), dtype=torch.float32)
    lse_student, lse_reference, tile_logmass_diff, kl_within_tile, rounding_correction = outputs
    e = x_student.new_empty(T, num_v * TILE.BLOCK_N)
    d = torch.empty_like(e, dtype=torch.float16)
    student_desc, weight_desc = TILE.descriptors(x_student, weight)
    reference_desc, own_desc = TILE.descriptors(x_reference, weight if weight_reference is None else weight_reference)
    _pair_gemm_kernel[TILE.grid(T, V, weight.device)](
        student_desc, reference_desc, weight_desc, None if weight_reference is None else own_desc,
        TensorDescriptor.from_tensor(e, [TILE.BLOCK_T, TILE.BLOCK_N]),
        TensorDescriptor.from_tensor(d, [TILE.BLOCK_T, TILE.BLOCK_N]),
        *outputs, T, V, H, x_reference.shape[1], REVERSE=reverse, **TILE._asdict(),
    )  # fmt: skip
    lse = torch.logsumexp(lse_reference, 0)
    tile_logmass = lse_reference - lse
    # lse_s - lse_r from the differences of the tiles, relative to the likeliest tile's, so that nothing cancels.
    likeliest_diff = tile_logmass_diff.gather(0, tile_logmass.argmax(0, keepdim=True))
    mass_ratio_minus_one = (tile_logmass.exp() * torch.expm1(tile_logmass_diff - likeliest_diff)).sum(0)
    # If this overflows fp32, a tile gained 88 nats, and the difference of the two sums is precise enough.
    lse_diff = torch.where(
        torch.isfinite(mass_ratio_minus_one),
        likeliest_diff[0] + torch.log1p(mass_ratio_minus_one),
        torch.logsumexp(lse_student, 0) - lse,
    )
    # A NaN in one tile makes the whole row NaN.
    tile_logmass_diff = tile_logmass_diff - lse_diff + 0 * kl_within_tile.sum(0)
    tile_mass = (tile_logmass + tile_logmass_diff if reverse else tile_logmass).exp()
    kl_of_tile = kl_within_tile + tile_logmass_diff if reverse else kl_within_tile - tile_logmass_diff
    chain_rule_kl = (tile_mass * kl_of_tile).sum(0)
    # The gradient reads a rounded D, so it subtracts the mean of the rounded L.
    row_kl = chain_rule_kl + (tile_mass * rounding_correction).sum(0) if reverse else None
    value = torch.empty_like(tile_logmass_diff)
    _divergence_kernel[(num_v, triton.cdiv(T, ELEMENTWISE_ROWS))](
        e, d, tile_logmass, tile_logmass_diff, row_kl, row_weight, value, T, V, e.shape[1], REVERSE=reverse,
        WRITE_GRADIENT=needs_x or needs_weight, BLOCK_T=ELEMENTWISE_ROWS, BLOCK_N=TILE.BLOCK_N, num_warps=8,
    )  # fmt: skip
    kl = torch.where(chain_rule_kl < _SMALL_KL, value.sum(0), chain_rule_kl)
    dx = matmul_fp32(e[:, :V], weight).to(x_student.dtype) if needs_x else None
    return row_weight * kl, dx, matmul_fp32(e[:, :V].T, x_student) if needs_weight else None


def _chunk_on_reference(x_student, x_reference, weight, weight_reference, reverse, row_weight, needs_x, needs_weight):
    """Return the same as `_chunk_on_triton`, in plain torch; autograd cannot see inside an operator."""
    z_student = matmul_fp32(x_student, weight.T)
    z_reference = matmul_fp32(x_reference, (weight if weight_reference is None else weight_reference).T)
    # An infinite weight can make a logit -inf: 0 * (sum of logits) turns that row into NaN.
    nan_if_infinite = 0 * (z_student.sum(-1) + z_reference.sum(-1))
    kl, grad = _kl_and_gradient(z_student.log_softmax(-1), z_reference.log_softmax(-1), reverse)
    grad *= (row_weight + nan_if_infinite)[:, None]
    dx = matmul_fp32(grad, weight).to(x_student.dtype) if needs_x else None
    dw = matmul_fp32(grad.T, x_student) if needs_weight else None
    return row_weight * (kl + nan_if_infinite), dx, dw


@torch.library.custom_op("thinksafe::linear_kl", mutates_args=())
@without_autocast
def _linear_kl(
    x_student: Tensor, weight: Tensor, row_weight: Tensor, x_reference: Tensor, weight_reference: Tensor | None,
    reverse: bool, needs_x: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (weighted KL [T] fp32, dX, dW), see `loss_in_chunks`."""
    compute_chunk, chunk_rows = _chunk_on_reference, REFERENCE_CHUNK_ROWS
    if on_tensor_cores(x_student):
        compute_chunk, chunk_rows = _chunk_on_triton, CHUNK_ROWS
        check_tma_alignment(x_student=x_student, x_reference=x_reference, weight=weight)
        if weight_reference is not None:
            check_tma_alignment(weight_reference=weight_reference)
    return loss_in_chunks(
        x_student, weight, needs_x, needs_weight, chunk_rows,
        lambda rows: compute_chunk(
            x_student[rows], x_reference[rows], weight, weight_reference, reverse, row_weight[rows], needs_x,
            needs_weight,
        ),
    )[:3]  # fmt: skip


@_linear_kl.register_fake
def _(x_student, weight, row_weight, x_reference, weight_reference, reverse, needs_x, needs_weight):
    return allocate_loss(x_student, weight, needs_x, needs_weight)


register_backward("linear_kl", _linear_kl)


def linear_kl(
    x_student: Tensor,
    x_reference: Tensor,
    weight: Tensor,
    weight_reference: Tensor | None = None,
    direction: Literal["forward", "reverse"] = "forward",
    token_weight: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Return the KL between a student's and a reference's next-token distributions, in nats.

    It is differentiable once in x_student and weight.

    Args:
        x_student: [T, H] hidden states of the student, bf16 or fp32; a GPU computes fp32 in plain torch.
        x_reference: [T, H'] hidden states of the reference, constants, in the dtype of x_student. H' may differ from H
            only with weight_reference.
        weight: [V, H], weight matrix of the language-model head, contiguous, in the dtype of x_student. It gets a
            gradient, summed in fp32, only if it requires one; the reference's use of it adds none.
        weight_reference: [V, H'], that of the reference, a contiguous constant; None if both models share `weight`.
        direction: `forward` KL(reference‖student) or `reverse` KL(student‖reference).
        token_weight, reduction: as for `linear_cross_entropy`.

    Returns:
        fp32: a scalar, or [T] for `none`. If the models are equal, the value and the gradient are exactly 0. On a GPU
        the relative error is within 1e-5 up to about a nat. A row is NaN if its hidden states are not finite, and all
        rows are NaN if a weight matrix is not finite; `first_bad_row` of chunked_loss.py finds the first such row.

    Raises:
        TypeError, ValueError: an argument is invalid. On a GPU a device-side assert checks the elements of tensors.
    """
    check_choice("direction", direction, "forward", "reverse")
    check_choice("reduction", reduction, "mean", "sum", "none")
    check_head(x_student, weight, "x_student")
    head, head_name = (weight, "weight") if weight_reference is None else (weight_reference, "weight_reference")
    check_head(x_reference, head, "x_reference", head_name)
    check_tensor(head_name, head, (len(weight), head.shape[1]), weight.dtype, weight.device)
    check_tensor("x_reference", x_reference, (len(x_student), x_reference.shape[1]), x_student.dtype, x_student.device)
    row_weight = row_weights(token_weight, x_student)
    grad = torch.is_grad_enabled()
    losses, _, _ = _linear_kl(
        x_student.contiguous(), weight, row_weight, x_reference.detach().contiguous(),
        None if weight_reference is None else weight_reference.detach(), direction == "reverse",
        grad and x_student.requires_grad, grad and weight.requires_grad,
    )  # fmt: skip
    return reduce_loss(losses, row_weight, reduction)
