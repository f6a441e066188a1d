"""Divergence between a student's and a reference's next-token distributions, straight from their hidden states.

With L = log p_s - log p_r, everything follows from the pair (p_r, p_s) and L:
    forward  KL(r‖s) = Σ (p_s - p_r - p_r L)           dz_s = p_s - p_r
    reverse  KL(s‖r) = Σ (p_r - p_s + p_s L)           dz_s = p_s (L - KL)
    jsd      ½ KL(r‖m) + ½ KL(s‖m), m the mean         dz_s = p_s (h - Σ p_s h),  h = ½ (log 2 - log(1 + e^-L))
A first pass over the vocabulary forms both models' logits in registers, sharing each tile of the head between them. Of
a token's two shares in its tile, s and r, it stores the larger one in bf16, E = max(s, r), and D = log s - log r in
fp16: 4 bytes an element, where bf16 logits of both would be the same bytes and, near the reference, all noise: a
gradient error of 220% at a KL of 3e-5, against 0.2% from there to hundreds of nats (rounding emulated on a CPU). The
smaller share is E e^-|D|, so D's rounding, a part in 2,000 of it, is damped by e^-|D|, and models far apart are as
precise as near ones, where L = D + what the tile's masses differ by keeps p_r (e^L - 1) from cancelling. Equal models
give a value and a gradient of exactly 0.

A second, elementwise pass turns the pair, in place, into dz_s, and into the value where that is small: sums of terms
that are not negative. A larger forward or reverse KL comes unrounded from the first pass, by the chain rule: that of
the tiles' masses and, weighted by these, that of the shares in each. FLOP: 6 T V H with a frozen head, 8 T V H where
it trains.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from thinksafe.kernels.checks import check_choice, check_head, check_once, check_tensor, check_tma, row_weights
from thinksafe.kernels.chunked_loss import (
    as_given,
    empty_gradients,
    matmul_fp32,
    over_chunks,
    reduced,
    scaled_gradients,
)
from thinksafe.kernels.dispatch import INTERPRETED, TensorDescriptor, jit, tl, triton
from thinksafe.kernels.exp_gemm import LOG2E, Tiles, num_processors, on_tensor_cores

Direction = Literal["forward", "reverse", "jsd"]

CHUNK = 4096
"""Rows whose E and D are held at once: 4096 * 151,936 * 4 bytes = 2.5 GB. Halved where memory runs out."""
REFERENCE_CHUNK = 512
ELEMENTWISE_ROWS = 16 if INTERPRETED else 32
TILES = Tiles(16, 32, 32, 2, 4, 1) if INTERPRETED else Tiles(128, 128, 64, 8, 8, 3)


_NEAR = 0.01
"""A divergence in nats below which the sum of rounded, non-negative terms is the more precise one."""


def reference(x_student, x_reference, weight, weight_reference=None, direction: Direction = "forward") -> Tensor:
    """Per-row divergence through both models' full logits, differentiable. -> [T]."""
    student = (x_student @ weight.T).log_softmax(-1)
    other = (x_reference @ (weight if weight_reference is None else weight_reference).T).log_softmax(-1)
    return _divergence(student, other, direction)


def _divergence(student: Tensor, other: Tensor, direction: Direction) -> Tensor:
    ratio, p_student, p_other = student - other, student.exp(), other.exp()
    if direction == "forward":
        near = ratio.abs() < 1
        term = torch.where(near, ratio, 0.0)  # e^ratio overflows far away
        value = torch.where(near, p_other * (torch.expm1(term) - term), p_student - p_other - p_other * ratio)
    elif direction == "reverse":
        value = p_student * ratio
    else:
        softplus = torch.nn.functional.softplus
        value = 0.5 * (p_other * (math.log(2) - softplus(ratio)) + p_student * (math.log(2) - softplus(-ratio)))
    return value.sum(-1)


@jit
def _expm1_minus(x):
    """exp(x) - 1 - x by its Taylor series, for |x| < 1/4, where the plain form cancels; 4e-8 relative."""
    return x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720))))


@jit
def _pair_gemm_kernel(
    student_desc, reference_desc, weight_desc, weight_reference_desc, e_desc, d_desc,
    lse_student_ptr, lse_reference_ptr, gap_ptr, within_ptr, slip_ptr, T, V, H, H_reference,
    SHARED_HEAD: tl.constexpr, REVERSE: tl.constexpr, LOG2E: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    num_t, num_v = tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), num_t * num_v, tl.num_programs(0)):
        first = tile // (GROUP * num_v) * GROUP
        height = min(num_t - first, GROUP)
        block_t = first + tile % (GROUP * num_v) % height
        block_v = tile % (GROUP * num_v) // height
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
        inside = rows < T
        out = block_v.to(tl.int64) * T + rows
        # In place, and one exponential at a time, or registers spill. Both models alike, so that equals cancel exactly.
        best_student = tl.max(tl.where(columns < V, z_student, float("-inf")), axis=1)
        best_reference = tl.max(tl.where(columns < V, z_reference, float("-inf")), axis=1)
        z_reference -= best_reference[:, None]
        difference = (z_student - best_student[:, None]) - z_reference
        e = tl.where(columns < V, tl.exp2(z_reference * LOG2E), 0.0)
        total = tl.sum(e, axis=1)
        log_reference = tl.log(total)
        if not REVERSE:  # a logit of -inf, which an infinite weight makes, is 0 * inf: its row becomes a NaN
            mean = tl.sum(e * difference, axis=1) / total
        e = tl.where(columns < V, tl.exp2((z_reference + difference) * LOG2E), 0.0)
        total = tl.sum(e, axis=1)
        log_student = tl.log(total)
        if REVERSE:
            mean = tl.sum(e * difference, axis=1) / total
        apart = log_student - log_reference
        tl.store(lse_student_ptr + out, best_student + log_student, mask=inside)
        tl.store(lse_reference_ptr + out, best_reference + log_reference, mask=inside)
        tl.store(gap_ptr + out, (best_student - best_reference) + apart, mask=inside)
        tl.store(within_ptr + out, mean - apart if REVERSE else apart - mean, mask=inside)
        difference -= apart[:, None]
        e = tl.exp2((z_reference - log_reference[:, None] + tl.maximum(difference, 0.0)) * LOG2E)
        e_desc.store([block_t * BLOCK_T, block_v * BLOCK_V], e.to(e_desc.dtype))
        # Beyond fp16 is beyond any probability as well.
        difference = tl.minimum(tl.maximum(difference, -60000.0), 60000.0)
        rounded = difference.to(tl.float16)
        d_desc.store([block_t * BLOCK_T, block_v * BLOCK_V], rounded)
        if REVERSE:  # what rounding adds to the student's mean of D
            share = tl.where(columns < V, e * tl.exp2(tl.minimum(difference, 0.0) * LOG2E), 0.0)
            tl.store(slip_ptr + out, tl.sum(share * (rounded.to(tl.float32) - difference), axis=1), mask=inside)


@jit
def _divergence_kernel(
    e_ptr, d_ptr, log_mass_ptr, gap_ptr, mean_ptr, row_weight_ptr, value_ptr, mean_out_ptr, T, V, width,
    DIRECTION: tl.constexpr, WRITE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One tile of the first pass: its part of the value and of Σ p_s h, or, with WRITE, dz_s in the place of E."""
    block_v = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (rows < T)[:, None] & (columns < V)[None, :]
    offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
    out = block_v.to(tl.int64) * T + rows
    log_mass = tl.load(log_mass_ptr + out, mask=rows < T, other=0.0)[:, None]
    gap = tl.load(gap_ptr + out, mask=rows < T, other=0.0)[:, None]
    e = tl.load(e_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    ratio = d + gap
    p_reference = e * tl.exp(log_mass - tl.maximum(d, 0.0))
    p_student = e * tl.exp(log_mass + gap + tl.minimum(d, 0.0))
    near = tl.abs(ratio) < 0.25
    if DIRECTION == "forward":
        gradient = tl.where(near, p_reference * (ratio + _expm1_minus(ratio)), p_student - p_reference)
        value = tl.where(near, p_reference * _expm1_minus(ratio), p_student - p_reference - p_reference * ratio)
    elif DIRECTION == "reverse":
        mean = tl.load(mean_ptr + rows, mask=rows < T, other=0.0)[:, None]
        gradient = p_student * (ratio - mean)
        # Σ (p_r - p_s) = 0 is added, so that an error in L counts squared, as in the other two.
        value = tl.where(near, p_student * _expm1_minus(-ratio), p_reference - p_student + p_student * ratio)
    else:
        # log 2 - log(1 + e^x) for both signs of x from one exponential of -|x|; near by, by its Taylor series.
        tail = 0.6931471805599453 - tl.log(1 + tl.exp(-tl.abs(ratio)))
        square = ratio * ratio
        even = square * (-1 / 16 + square * (1 / 384 - square / 5760))
        slope = tl.where(near, 0.25 * ratio + even, 0.5 * (tail - tl.maximum(-ratio, 0.0)))
        value = 0.5 * p_reference * (tail - tl.maximum(ratio, 0.0)) + p_student * slope
        value = tl.where(near, tl.sqrt(p_reference * p_student) * square * (0.125 + square * square / 9216), value)
        if WRITE:
            mean = tl.load(mean_ptr + rows, mask=rows < T, other=0.0)[:, None]
            gradient = p_student * (slope - mean)
        else:
            tl.store(mean_out_ptr + out, tl.sum(p_student * slope, axis=1), mask=rows < T)
    if WRITE:
        gradient *= tl.load(row_weight_ptr + rows, mask=rows < T, other=0.0)[:, None]
        tl.store(e_ptr + offsets, gradient, mask=inside)
    if DIRECTION != "jsd" or not WRITE:
        tl.store(value_ptr + out, tl.sum(value, axis=1), mask=rows < T)


def _pair(x_student, x_reference, weight, weight_reference, reverse: bool) -> tuple[Tensor, ...]:
    """The first pass: E and D [T, width], and for every tile [V tiles, T] the log of its mass under the reference, the
    log-ratio of its masses, the KL of the shares in it, and what rounding D adds to the student's mean of D."""
    (T, H), V = x_student.shape, weight.shape[0]
    num_t, num_v = triton.cdiv(T, TILES.block_t), triton.cdiv(V, TILES.block_v)
    lse_student, lse_reference, gap, within, slip = x_student.new_empty((5, num_v, T), dtype=torch.float32)
    e = x_student.new_empty(T, num_v * TILES.block_v)
    d = torch.empty_like(e, dtype=torch.float16)
    rows, columns = [TILES.block_t, TILES.block_h], [TILES.block_v, TILES.block_h]
    out = [TILES.block_t, TILES.block_v]
    weight_desc = TensorDescriptor.from_tensor(weight, columns)
    _pair_gemm_kernel[(min(num_t * num_v, num_processors(weight.device)),)](
        TensorDescriptor.from_tensor(x_student, rows),
        TensorDescriptor.from_tensor(x_reference, rows),
        weight_desc,
        weight_desc if weight_reference is None else TensorDescriptor.from_tensor(weight_reference, columns),
        TensorDescriptor.from_tensor(e, out),
        TensorDescriptor.from_tensor(d, out),
        lse_student, lse_reference, gap, within, slip, T, V, H, x_reference.shape[1],
        SHARED_HEAD=weight_reference is None, REVERSE=reverse, LOG2E=LOG2E, BLOCK_T=TILES.block_t,
        BLOCK_V=TILES.block_v, BLOCK_H=TILES.block_h, GROUP=TILES.group, num_warps=TILES.num_warps,
        num_stages=TILES.num_stages,
    )  # fmt: skip
    lse = torch.logsumexp(lse_reference, 0)
    log_mass = lse_reference - lse
    # lse_s - lse_r from the tiles' own differences, less that of the likeliest one, so that nothing cancels.
    start = gap.gather(0, log_mass.argmax(0, keepdim=True))
    shift = (log_mass.exp() * torch.expm1(gap - start)).sum(0)
    # Beyond fp32, a tile is 88 nats more likely than it was, and the two sums are precise enough.
    delta = torch.where(torch.isfinite(shift), start[0] + torch.log1p(shift), torch.logsumexp(lse_student, 0) - lse)
    # A NaN in one tile is one in all of the row.
    return e, d, log_mass, gap - delta + 0 * within.sum(0), within, slip


def _chunk_on_triton(x_student, x_reference, weight, weight_reference, direction, row_weight, needs_x, needs_weight):
    """(weighted divergence, dX or None, dW or None) of some rows."""
    T, V = len(x_student), len(weight)
    reverse = direction == "reverse"
    e, d, log_mass, gap, within, slip = _pair(x_student, x_reference, weight, weight_reference, reverse)
    value, mean = torch.empty_like(gap), torch.empty_like(gap)

    def elementwise(write: bool, row_mean: Tensor | None) -> Tensor:
        _divergence_kernel[(len(gap), triton.cdiv(T, ELEMENTWISE_ROWS))](
            e, d, log_mass, gap, row_mean, row_weight, value, mean, T, V, e.shape[1],
            DIRECTION=direction, WRITE=write, BLOCK_T=ELEMENTWISE_ROWS, BLOCK_V=TILES.block_v, num_warps=8,
        )  # fmt: skip
        return value.sum(0)

    wants_gradient = needs_x or needs_weight
    if direction == "jsd":
        found = elementwise(False, None)
        if wants_gradient:
            elementwise(True, mean.sum(0))
    else:
        mass = (log_mass + gap if reverse else log_mass).exp()
        chained = (mass * (within + gap if reverse else within - gap)).sum(0)
        # What the gradient subtracts is the mean of the L it gets, D's rounding included.
        found = elementwise(wants_gradient, chained + (mass * slip).sum(0) if reverse else None)
        found = torch.where(chained < _NEAR, found, chained)
    dx = matmul_fp32(e[:, :V], weight).to(x_student.dtype) if needs_x else None
    return row_weight * found, dx, matmul_fp32(e[:, :V].T, x_student) if needs_weight else None


def _chunk_on_reference(x_student, x_reference, weight, weight_reference, direction, row_weight, needs_x, needs_weight):
    """The same in plain torch; inside an operator autograd sees nothing, so the gradients are written out."""
    student = matmul_fp32(x_student, weight.T)
    other = matmul_fp32(x_reference, (weight if weight_reference is None else weight_reference).T)
    # A logit of -inf, which an infinite weight makes, is a NaN.
    broken = 0 * (student.sum(-1) + other.sum(-1))
    student, other = student.log_softmax(-1), other.log_softmax(-1)
    value = row_weight * (_divergence(student, other, direction) + broken)
    if not (needs_x or needs_weight):
        return value, None, None
    ratio, p_student = student - other, student.exp()
    if direction == "forward":
        near = ratio.abs() < 1
        grad = torch.where(near, other.exp() * torch.expm1(torch.where(near, ratio, 0.0)), p_student - other.exp())
    else:
        slope = ratio if direction == "reverse" else 0.5 * (math.log(2) - torch.nn.functional.softplus(-ratio))
        grad = p_student * (slope - (p_student * slope).sum(-1, keepdim=True))
    grad *= (row_weight + broken)[:, None]
    dx = matmul_fp32(grad, weight).to(x_student.dtype) if needs_x else None
    return value, dx, matmul_fp32(grad.T, x_student) if needs_weight else None


@torch.library.custom_op("thinksafe::linear_kl", mutates_args=())
@as_given
def _linear_kl(
    x_student: Tensor, x_reference: Tensor, weight: Tensor, weight_reference: Tensor | None, row_weight: Tensor,
    direction: str, needs_x: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(weighted divergence a row, its dX, dW of their sum)."""
    run, chunk = _chunk_on_reference, REFERENCE_CHUNK
    other = weight if weight_reference is None else weight_reference
    if on_tensor_cores(x_student):
        run, chunk = _chunk_on_triton, CHUNK
        check_tma(x_student=x_student, x_reference=x_reference, weight=weight, weight_reference=other)
    grad_x, grad_weight = empty_gradients(x_student, weight, needs_x, needs_weight)
    values = over_chunks(range(len(x_student)), chunk, grad_x, grad_weight, lambda rows: run(
        x_student[rows], x_reference[rows], weight, weight_reference, direction, row_weight[rows], needs_x,
        needs_weight,
    ))  # fmt: skip
    return torch.cat(values) if values else row_weight.clone(), grad_x, grad_weight


@_linear_kl.register_fake
def _(x_student, x_reference, weight, weight_reference, row_weight, direction, needs_x, needs_weight):
    return torch.empty_like(row_weight), *empty_gradients(x_student, weight, needs_x, needs_weight)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.direction, ctx.needs_x, ctx.needs_weight = inputs[5:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_value, *others):
    check_once("linear_kl", *others)
    *inputs, row_weight, grad_x, grad_weight = ctx.saved_tensors
    if grad_value is None:
        return (None,) * 8
    dx, dw = scaled_gradients(
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
    """Divergence of the student from the reference at every row, in nats.

    Args:
        x_student: [T, H] hidden states, bf16, or fp32, which a GPU computes in plain torch; gets a gradient.
        x_reference: [T, H'] the reference's, a constant; H' may differ from H where the reference has its own head.
        weight: [V, H] head, contiguous; gets a gradient, summed in fp32, only if it requires one.
        weight_reference: [V, H'] the reference's own head, a constant, or None where both share `weight`.
        direction: `forward` KL(reference‖student), `reverse` KL(student‖reference), or `jsd`.
        token_weight: [T] finite and not negative, a constant; None for 1.
        reduction: `mean` divides by the weights' sum (0 for no rows).

    Returns:
        fp32: a scalar, or [T] for `none`. Where student equals reference, exactly 0 with a gradient of exactly 0. On
        a GPU the JSD's value is within a thousandth, the others' within 1e-5 up to about a nat. NaN
        in rows whose states are not finite, and in all if a head is not; `first_bad_row` of chunked_loss.py names the
        first, given the rows.

    Raises:
        TypeError, ValueError: an argument does not fit, with its name; on a GPU values are asserted by the device.
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
    return reduced(value, row_weight.sum(), reduction)
