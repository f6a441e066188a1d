"""Divergence between the next-token distributions of a student and a reference, computed from their hidden states.

With L = log p_s - log p_r, everything follows from the pair (p_r, p_s) and L:
    forward  KL(r‖s) = Σ (p_s - p_r - p_r L)           dz_s = p_s - p_r
    reverse  KL(s‖r) = Σ (p_r - p_s + p_s L)           dz_s = p_s (L - KL)
    jsd      ½ KL(r‖m) + ½ KL(s‖m), m the mean         dz_s = p_s (h - Σ p_s h),  h = ½ (log 2 - log(1 + e^-L))

The first pass over the vocabulary computes both models' logits in registers; a shared head's tile is read once for
both. Let s and r be the shares that a token has of its tile's mass under the student and under the reference. The pass
stores the larger share E = max(s, r) in bf16 and D = log s - log r in fp16: 4 bytes per element. bf16 logits of both
models have the same size, but near the reference their difference is mostly rounding error: the gradient's error is
220% at a KL of 3e-5, against 0.2% here from there to hundreds of nats (rounding emulated on a CPU).

The smaller share is E e^-|D|. The rounding error of D, a part in 2,000 of D, is damped by e^-|D|, so the result is as
precise for distant models as for close ones. For close models L = D + (log-ratio of the tile's masses) keeps
p_r (e^L - 1) from cancelling. Equal models give a value and a gradient of exactly 0.

The second pass is elementwise. It replaces E in place by dz_s, and sums the value from non-negative terms, which is the
more precise way if the value is small. A larger forward or reverse KL comes from the first pass, before anything is
rounded, by the chain rule: the KL of the tiles' masses plus the KL within each tile, weighted by its mass.

Cost: 6 T V H FLOP with a frozen head, 8 T V H with a trainable one.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from thinksafe.kernels.checks import (
    check_choice,
    check_head,
    check_no_second_derivative,
    check_tensor,
    check_tma_alignment,
    row_weights,
)
from thinksafe.kernels.chunked_loss import (
    allocate_gradients,
    map_chunks_with_gradients,
    matmul_fp32,
    reduce_loss,
    scale_gradients,
    without_autocast,
)
from thinksafe.kernels.dispatch import INTERPRETED, TensorDescriptor, jit, tl, triton
from thinksafe.kernels.exp_gemm import LOG2E, HeadTileConfig, num_sms, on_tensor_cores

Direction = Literal["forward", "reverse", "jsd"]
"""`forward` is KL(reference‖student), `reverse` KL(student‖reference), `jsd` the Jensen-Shannon divergence of both."""

CHUNK_ROWS = 4096
"""Rows of a chunk in Triton: its E and D have 4096 * 151,936 * 4 bytes = 2.5 GB. Halved if memory runs out."""
REFERENCE_CHUNK_ROWS = 512
"""Rows of a chunk in plain torch, halved if memory runs out."""
ELEMENTWISE_ROWS = 16 if INTERPRETED else 32
"""Rows of a tile in the second, elementwise pass."""
TILE = HeadTileConfig(16, 32, 32, 2, 4, 1) if INTERPRETED else HeadTileConfig(128, 128, 64, 8, 8, 3)


_SMALL_DIVERGENCE = 0.01
"""Forward or reverse KL of a row, in nats, below which the second pass's sum of rounded, non-negative terms is
returned. It is then more precise than the first pass's chain rule, which is returned for larger values."""


def reference(x_student, x_reference, weight, weight_reference=None, direction: Direction = "forward") -> Tensor:
    """Return the divergence of each row in nats, [T], from full logits of both models; differentiable.

    Args:
        x_student: [T, H] hidden states of the student.
        x_reference: [T, H'] hidden states of the reference.
        weight: [V, H], weight matrix of the student's language-model head.
        weight_reference: [V, H'], that of the reference; None if both models share `weight`.
        direction: `forward` KL(reference‖student), `reverse` KL(student‖reference), or `jsd`.
    """
    log_p_student = (x_student @ weight.T).log_softmax(-1)
    log_p_reference = (x_reference @ (weight if weight_reference is None else weight_reference).T).log_softmax(-1)
    return _divergence(log_p_student, log_p_reference, direction)


def _divergence(log_p_student: Tensor, log_p_reference: Tensor, direction: Direction) -> Tensor:
    log_ratio, p_student, p_reference = log_p_student - log_p_reference, log_p_student.exp(), log_p_reference.exp()
    if direction == "forward":
        is_near = log_ratio.abs() < 1
        near_log_ratio = torch.where(is_near, log_ratio, 0.0)  # exp would overflow for large ratios
        value = torch.where(
            is_near,
            p_reference * (torch.expm1(near_log_ratio) - near_log_ratio),
            p_student - p_reference - p_reference * log_ratio,
        )
    elif direction == "reverse":
        value = p_student * log_ratio
    else:
        softplus = torch.nn.functional.softplus
        value = 0.5 * (
            p_reference * (math.log(2) - softplus(log_ratio)) + p_student * (math.log(2) - softplus(-log_ratio))
        )
    return value.sum(-1)


@jit
def _expm1_minus(x):
    """Return exp(x) - 1 - x for |x| < 1/4 from its Taylor series: the plain form cancels. Relative error: 4e-8."""
    return x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720))))


@jit
def _pair_gemm_kernel(
    student_desc, reference_desc, weight_desc, weight_reference_desc, e_desc, d_desc,
    lse_student_ptr, lse_reference_ptr, tile_logmass_diff_ptr, kl_within_tile_ptr, rounding_correction_ptr,
    T, V, H, H_reference,
    SHARED_HEAD: tl.constexpr, REVERSE: tl.constexpr, LOG2E: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    num_t, num_v = tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), num_t * num_v, tl.num_programs(0)):
        first_block_t = tile // (GROUP * num_v) * GROUP
        group_size = min(num_t - first_block_t, GROUP)
        block_t = first_block_t + tile % (GROUP * num_v) % group_size
        block_v = tile % (GROUP * num_v) // group_size
        z_student = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        z_reference = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for h in range(0, H, BLOCK_H):
            w = weight_desc.load([block_v * BLOCK_V, h])
            x = student_desc.load([block_t * BLOCK_T, h])
            z_student = tl.dot(x, w.T, z_student, input_precision="ieee")
            if SHARED_HEAD:
                x = reference_desc.load([block_t * BLOCK_T, h])
                z_reference = tl.dot(x, w.T, z_reference, input_precision="ieee")
        if not SHARED_HEAD:
            for h in range(0, H_reference, BLOCK_H):
                w = weight_reference_desc.load([block_v * BLOCK_V, h])
                x = reference_desc.load([block_t * BLOCK_T, h])
                z_reference = tl.dot(x, w.T, z_reference, input_precision="ieee")
        rows = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
        columns = (block_v * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
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
        e_desc.store([block_t * BLOCK_T, block_v * BLOCK_V], e.to(e_desc.dtype))
        # A log-ratio beyond the range of fp16 is beyond that of a probability too.
        log_ratio = tl.minimum(tl.maximum(log_ratio, -60000.0), 60000.0)
        rounded_log_ratio = log_ratio.to(tl.float16)
        d_desc.store([block_t * BLOCK_T, block_v * BLOCK_V], rounded_log_ratio)
        if REVERSE:  # change of the student's mean of D by rounding
            student_share = tl.where(columns < V, e * tl.exp2(tl.minimum(log_ratio, 0.0) * LOG2E), 0.0)
            correction = tl.sum(student_share * (rounded_log_ratio.to(tl.float32) - log_ratio), axis=1)
            tl.store(rounding_correction_ptr + tile_offsets, correction, mask=row_mask)


@jit
def _divergence_kernel(
    e_ptr, d_ptr, tile_logmass_ptr, tile_logmass_diff_ptr, mean_score_ptr, row_weight_ptr, value_ptr,
    mean_score_out_ptr, T, V, width,
    DIRECTION: tl.constexpr, WRITE_GRADIENT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute from a tile of E and D, per row, the tile's part of the divergence, and with WRITE_GRADIENT the gradient.

    The gradient, row_weight * dz_s, replaces E. Forward and reverse KL take one launch, which stores the value too;
    reverse reads the row's KL from mean_score_ptr. A JSD takes two launches: without WRITE_GRADIENT it stores the value
    and the tile's part of Σ p_s h, with it only the gradient, for which it reads Σ p_s h from mean_score_ptr.
    """
    block_v = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
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
    if DIRECTION == "forward":
        gradient = tl.where(is_near, p_reference * (log_ratio + _expm1_minus(log_ratio)), p_student - p_reference)
        value = tl.where(
            is_near, p_reference * _expm1_minus(log_ratio), p_student - p_reference - p_reference * log_ratio
        )
    elif DIRECTION == "reverse":
        mean_score = tl.load(mean_score_ptr + rows, mask=rows < T, other=0.0)[:, None]
        gradient = p_student * (log_ratio - mean_score)
        # Adding Σ (p_r - p_s) = 0 makes the error quadratic in the error of L, as in the other two directions.
        value = tl.where(is_near, p_student * _expm1_minus(-log_ratio), p_reference - p_student + p_student * log_ratio)
    else:
        # log 2 - log(1 + e^x) for both signs of x from one exponential of -|x|; a Taylor series if |x| is small.
        log2_minus_softplus = 0.6931471805599453 - tl.log(1 + tl.exp(-tl.abs(log_ratio)))
        square = log_ratio * log_ratio
        even_terms = square * (-1 / 16 + square * (1 / 384 - square / 5760))
        score = tl.where(
            is_near, 0.25 * log_ratio + even_terms, 0.5 * (log2_minus_softplus - tl.maximum(-log_ratio, 0.0))
        )
        value = 0.5 * p_reference * (log2_minus_softplus - tl.maximum(log_ratio, 0.0)) + p_student * score
        value = tl.where(is_near, tl.sqrt(p_reference * p_student) * square * (0.125 + square * square / 9216), value)
        if WRITE_GRADIENT:
            mean_score = tl.load(mean_score_ptr + rows, mask=rows < T, other=0.0)[:, None]
            gradient = p_student * (score - mean_score)
        else:
            tl.store(mean_score_out_ptr + tile_offsets, tl.sum(p_student * score, axis=1), mask=rows < T)
    if WRITE_GRADIENT:
        gradient *= tl.load(row_weight_ptr + rows, mask=rows < T, other=0.0)[:, None]
        tl.store(e_ptr + offsets, gradient, mask=mask)
    if DIRECTION != "jsd" or not WRITE_GRADIENT:
        tl.store(value_ptr + tile_offsets, tl.sum(value, axis=1), mask=rows < T)


def _first_pass(x_student, x_reference, weight, weight_reference, reverse: bool) -> tuple[Tensor, ...]:
    """Return E and D of a chunk of rows, and four figures of each vocabulary tile, from both models' logits.

    Args:
        reverse: whether the direction is `reverse`.

    Returns:
        E in the dtype of x and D in fp16, [T, V tiles * BLOCK_V]. Then, for each tile, [V tiles, T] fp32: the log of
        its mass under the reference; the log-ratio of its masses, student to reference; the KL of the shares in it, in
        direction `reverse` if so, else forward; and the change of the student's mean of D by rounding, which is
        uninitialized unless `reverse`.
    """
    (T, H), V = x_student.shape, weight.shape[0]
    num_t, num_v = triton.cdiv(T, TILE.block_t), triton.cdiv(V, TILE.block_v)
    outputs = x_student.new_empty((5, num_v, T), dtype=torch.float32)
    lse_student, lse_reference, tile_logmass_diff, kl_within_tile, rounding_correction = outputs
    e = x_student.new_empty(T, num_v * TILE.block_v)
    d = torch.empty_like(e, dtype=torch.float16)
    x_tile, weight_tile = [TILE.block_t, TILE.block_h], [TILE.block_v, TILE.block_h]
    out_tile = [TILE.block_t, TILE.block_v]
    weight_desc = TensorDescriptor.from_tensor(weight, weight_tile)
    _pair_gemm_kernel[(min(num_t * num_v, num_sms(weight.device)),)](
        TensorDescriptor.from_tensor(x_student, x_tile),
        TensorDescriptor.from_tensor(x_reference, x_tile),
        weight_desc,
        weight_desc if weight_reference is None else TensorDescriptor.from_tensor(weight_reference, weight_tile),
        TensorDescriptor.from_tensor(e, out_tile),
        TensorDescriptor.from_tensor(d, out_tile),
        *outputs, T, V, H, x_reference.shape[1],
        SHARED_HEAD=weight_reference is None, REVERSE=reverse, LOG2E=LOG2E, BLOCK_T=TILE.block_t,
        BLOCK_V=TILE.block_v, BLOCK_H=TILE.block_h, GROUP=TILE.group, num_warps=TILE.num_warps,
        num_stages=TILE.num_stages,
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
    return e, d, tile_logmass, tile_logmass_diff, kl_within_tile, rounding_correction


def _chunk_on_triton(x_student, x_reference, weight, weight_reference, direction, row_weight, needs_x, needs_weight):
    """Return (weighted divergence [T] fp32, dX, dW) of a chunk of T rows, with Triton kernels.

    dX is [T, H] in the dtype of x_student, for an upstream gradient of 1, or None without needs_x. dW is [V, H] fp32,
    or None without needs_weight.
    """
    T, V = len(x_student), len(weight)
    reverse = direction == "reverse"
    e, d, tile_logmass, tile_logmass_diff, kl_within_tile, rounding_correction = _first_pass(
        x_student, x_reference, weight, weight_reference, reverse
    )
    value, mean_score = torch.empty_like(tile_logmass_diff), torch.empty_like(tile_logmass_diff)

    def run_elementwise(write_gradient: bool, row_mean_score: Tensor | None) -> Tensor:
        _divergence_kernel[(len(tile_logmass_diff), triton.cdiv(T, ELEMENTWISE_ROWS))](
            e, d, tile_logmass, tile_logmass_diff, row_mean_score, row_weight, value, mean_score, T, V, e.shape[1],
            DIRECTION=direction, WRITE_GRADIENT=write_gradient, BLOCK_T=ELEMENTWISE_ROWS, BLOCK_V=TILE.block_v,
            num_warps=8,
        )  # fmt: skip
        return value.sum(0)

    needs_gradient = needs_x or needs_weight
    if direction == "jsd":
        divergence = run_elementwise(False, None)
        if needs_gradient:
            run_elementwise(True, mean_score.sum(0))
    else:
        tile_mass = (tile_logmass + tile_logmass_diff if reverse else tile_logmass).exp()
        kl_of_tile = kl_within_tile + tile_logmass_diff if reverse else kl_within_tile - tile_logmass_diff
        chain_rule_kl = (tile_mass * kl_of_tile).sum(0)
        # The gradient reads a rounded D, so it subtracts the mean of the rounded L.
        row_mean_score = chain_rule_kl + (tile_mass * rounding_correction).sum(0) if reverse else None
        divergence = run_elementwise(needs_gradient, row_mean_score)
        divergence = torch.where(chain_rule_kl < _SMALL_DIVERGENCE, divergence, chain_rule_kl)
    dx = matmul_fp32(e[:, :V], weight).to(x_student.dtype) if needs_x else None
    return row_weight * divergence, dx, matmul_fp32(e[:, :V].T, x_student) if needs_weight else None


def _chunk_on_reference(x_student, x_reference, weight, weight_reference, direction, row_weight, needs_x, needs_weight):
    """Return the same as `_chunk_on_triton`, in plain torch; autograd cannot see inside an operator."""
    z_student = matmul_fp32(x_student, weight.T)
    z_reference = matmul_fp32(x_reference, (weight if weight_reference is None else weight_reference).T)
    # An infinite weight can make a logit -inf: 0 * (sum of logits) turns that row into NaN.
    nan_if_infinite = 0 * (z_student.sum(-1) + z_reference.sum(-1))
    log_p_student, log_p_reference = z_student.log_softmax(-1), z_reference.log_softmax(-1)
    value = row_weight * (_divergence(log_p_student, log_p_reference, direction) + nan_if_infinite)
    if not (needs_x or needs_weight):
        return value, None, None
    log_ratio, p_student = log_p_student - log_p_reference, log_p_student.exp()
    if direction == "forward":
        is_near = log_ratio.abs() < 1
        near_log_ratio, p_reference = torch.where(is_near, log_ratio, 0.0), log_p_reference.exp()
        grad = torch.where(is_near, p_reference * torch.expm1(near_log_ratio), p_student - p_reference)
    else:
        score = log_ratio if direction == "reverse" else 0.5 * (math.log(2) - torch.nn.functional.softplus(-log_ratio))
        grad = p_student * (score - (p_student * score).sum(-1, keepdim=True))
    grad *= (row_weight + nan_if_infinite)[:, None]
    dx = matmul_fp32(grad, weight).to(x_student.dtype) if needs_x else None
    return value, dx, matmul_fp32(grad.T, x_student) if needs_weight else None


@torch.library.custom_op("thinksafe::linear_kl", mutates_args=())
@without_autocast
def _linear_kl(
    x_student: Tensor, x_reference: Tensor, weight: Tensor, weight_reference: Tensor | None, row_weight: Tensor,
    direction: str, needs_x: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (weighted divergence [T] fp32, dX [T, H] in the dtype of x_student, dW [V, H] fp32): the value of
    `linear_kl` without reduction, and its gradients by x_student and weight.

    The gradients are for an upstream gradient of 1 in every row, and have no elements without needs_x or needs_weight.
    """
    compute_chunk, chunk_rows = _chunk_on_reference, REFERENCE_CHUNK_ROWS
    reference_head = weight if weight_reference is None else weight_reference
    if on_tensor_cores(x_student):
        compute_chunk, chunk_rows = _chunk_on_triton, CHUNK_ROWS
        check_tma_alignment(
            x_student=x_student, x_reference=x_reference, weight=weight, weight_reference=reference_head
        )
    grad_x, grad_weight = allocate_gradients(x_student, weight, needs_x, needs_weight)
    rows = range(len(x_student))
    values = map_chunks_with_gradients(rows, chunk_rows, grad_x, grad_weight, lambda rows: compute_chunk(
        x_student[rows], x_reference[rows], weight, weight_reference, direction, row_weight[rows], needs_x,
        needs_weight,
    ))  # fmt: skip
    return torch.cat(values) if values else row_weight.clone(), grad_x, grad_weight


@_linear_kl.register_fake
def _(x_student, x_reference, weight, weight_reference, row_weight, direction, needs_x, needs_weight):
    return torch.empty_like(row_weight), *allocate_gradients(x_student, weight, needs_x, needs_weight)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.direction, ctx.needs_x, ctx.needs_weight = inputs[5:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_value, *grad_gradients):
    check_no_second_derivative("linear_kl", *grad_gradients)
    *inputs, row_weight, grad_x, grad_weight = ctx.saved_tensors
    if grad_value is None:
        return (None,) * 8
    dx, dw = scale_gradients(
        grad_value, grad_x if ctx.needs_x else None, grad_weight if ctx.needs_weight else None,
        lambda: _linear_kl(*inputs, row_weight * grad_value, ctx.direction, False, True)[2],
    )  # fmt: skip
    return dx, None, None if dw is None else dw.to(inputs[2].dtype), None, None, None, None, None


_linear_kl.register_autograd(_backward, setup_context=_setup_context)


def linear_kl(
    x_student: Tensor,
    x_reference: Tensor,
    weight: Tensor,
    weight_reference: Tensor | None = None,
    direction: Direction = "forward",
    token_weight: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Return the divergence between the next-token distributions of a student and a reference, in nats.

    Args:
        x_student: [T, H] hidden states of the student, bf16 or fp32; a GPU computes fp32 in plain torch. They get a
            gradient if they require one.
        x_reference: [T, H'] hidden states of the reference, constants, in the dtype of x_student. H' may differ from H
            only with weight_reference.
        weight: [V, H], weight matrix of the language-model head, contiguous, in the dtype of x_student. It gets a
            gradient, summed in fp32, only if it requires one; the reference's use of it adds none.
        weight_reference: [V, H'], that of the reference, a contiguous constant; None if both models share `weight`.
        direction: `forward` KL(reference‖student), `reverse` KL(student‖reference), or `jsd`.
        token_weight: [T] floating point, the loss weight of each row: finite, non-negative constants; None for 1.
        reduction: `none` returns the weighted divergence of each row, `sum` their sum, and `mean` the sum divided by
            the sum of the loss weights (0 for no rows).

    Returns:
        fp32: a scalar, or [T] for `none`. If the models are equal, the value and the gradient are exactly 0. On a GPU
        the relative error of a JSD is within 1e-3, that of a KL within 1e-5 up to about a nat. A row is NaN if its
        hidden states are not finite, and all rows are NaN if a weight matrix is not finite. `first_bad_row` of
        chunked_loss.py takes the result of `none` and returns the index of the first such row.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. On a GPU a device-side assert checks the
            elements of token_weight instead.
    """
    check_choice("direction", direction, "forward", "reverse", "jsd")
    check_choice("reduction", reduction, "mean", "sum", "none")
    check_head(x_student, weight, "x_student")
    if weight_reference is None:
        check_head(x_reference, weight, "x_reference")
    else:
        check_head(x_reference, weight_reference, "x_reference", "weight_reference")
        shape = (len(weight), weight_reference.shape[1])
        check_tensor("weight_reference", weight_reference, shape, weight.dtype, weight.device)
    check_tensor("x_reference", x_reference, (len(x_student), x_reference.shape[1]), x_student.dtype, x_student.device)
    row_weight = row_weights(token_weight, x_student)
    grad = torch.is_grad_enabled()
    value = _linear_kl(
        x_student.contiguous(), x_reference.detach().contiguous(), weight,
        None if weight_reference is None else weight_reference.detach(), row_weight, direction,
        grad and x_student.requires_grad, grad and weight.requires_grad,
    )[0]  # fmt: skip
    return reduce_loss(value, row_weight.sum(), reduction)
