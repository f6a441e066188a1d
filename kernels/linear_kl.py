"""Divergence between a student's and a reference's next-token distributions, straight from their hidden states.

With D = z_s - z_r and Δ = lse_s - lse_r, the log-ratio of the two probabilities is L = D - Δ, and everything follows
from the pair (p_r, L), p_s = p_r e^L:
    forward  KL(r‖s) = Σ p_r (e^L - 1 - L)            dz_s = p_r (e^L - 1)
    reverse  KL(s‖r) = Σ p_s (e^-L - 1 + L)            dz_s = p_s (L - KL)
    jsd      ½ KL(r‖m) + ½ KL(s‖m), m the mean         dz_s = p_s (h - Σ p_s h),  h = ½ (log 2 - log(1 + e^-L))
A first pass over the vocabulary forms both models' logits in registers, sharing each tile of the head between them, and
stores E = exp(z_r - tile maximum) in bf16 and D in fp16: 4 bytes an element, where bf16 logits of both would be the
same bytes and, near the reference, all noise (a gradient error of 220% at a KL of 3e-5, against 0.25%). Δ is formed
from the D that was stored, as the D of a likely token plus log(1 + Σ p_r (e^(D - that) - 1)). So nothing cancels, and
what rounding moves the likely tokens by moves Δ alike: equal models give a value and a gradient of exactly 0, and far
apart, where D is some units large, a gradient is as precise as near by. A second, elementwise pass turns the pair into
the value and, in place, into dz_s. FLOP: 6 T V H with a frozen head, 8 T V H where it trains.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from thinksafe.kernels.chunked_loss import empty_gradients, matmul_fp32, over_chunks, reduced, scaled_gradients
from thinksafe.kernels.dispatch import INTERPRETED, TensorDescriptor, jit, tl, triton
from thinksafe.kernels.exp_gemm import LOG2E, Tiles, check_head, num_processors, on_tensor_cores

Direction = Literal["forward", "reverse", "jsd"]

CHUNK = 4096
"""Rows whose E and D are held at once: 4096 * 151,936 * 4 bytes = 2.5 GB. Halved where memory runs out."""
REFERENCE_CHUNK = 512
ELEMENTWISE_ROWS = 16 if INTERPRETED else 32
TILES = Tiles(16, 32, 32, 2, 4, 1) if INTERPRETED else Tiles(128, 128, 64, 8, 8, 3)


def reference(x_student, x_reference, weight, weight_reference=None, direction: Direction = "forward") -> Tensor:
    """Per-row divergence through both models' full logits, differentiable. -> [T]."""
    student = (x_student @ weight.T).log_softmax(-1)
    other = (x_reference @ (weight if weight_reference is None else weight_reference).T).log_softmax(-1)
    return _divergence(student, other, direction)


def _divergence(student: Tensor, other: Tensor, direction: Direction) -> Tensor:
    ratio = student - other
    if direction == "forward":
        return (other.exp() * (torch.expm1(ratio) - ratio)).sum(-1)
    if direction == "reverse":
        return (student.exp() * ratio).sum(-1)
    softplus = torch.nn.functional.softplus
    below, above = math.log(2) - softplus(ratio), math.log(2) - softplus(-ratio)
    return 0.5 * (other.exp() * below + student.exp() * above).sum(-1)


@jit
def _expm1_minus(x):
    """exp(x) - 1 - x by its Taylor series, for |x| < 1/4, where the plain form cancels; 4e-8 relative."""
    return x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720))))


@jit
def _pair_gemm_kernel(
    student_desc, reference_desc, weight_desc, weight_reference_desc, e_desc, d_desc,
    best_ptr, sum_ptr, pivot_ptr, tilt_ptr, student_best_ptr, student_sum_ptr, T, V, H, H_reference,
    SHARED_HEAD: tl.constexpr, LOG2E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
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
        # The order keeps two tiles alive at a time, or registers spill.
        best = tl.max(tl.where(columns < V, z_student, float("-inf")), axis=1)
        e = tl.where(columns < V, tl.exp2((z_student - best[:, None]) * LOG2E), 0.0)
        tl.store(student_best_ptr + out, best, mask=inside)
        tl.store(student_sum_ptr + out, tl.sum(e, axis=1), mask=inside)
        difference = z_student - z_reference
        # A difference beyond fp16 is beyond any probability as well; NaN stays NaN.
        difference = tl.where(difference > 60000.0, 60000.0, tl.where(difference < -60000.0, -60000.0, difference))
        rounded = difference.to(tl.float16)
        d_desc.store([block_t * BLOCK_T, block_v * BLOCK_V], rounded)
        kept = rounded.to(tl.float32)
        best = tl.max(tl.where(columns < V, z_reference, float("-inf")), axis=1)
        pivot = tl.max(tl.where(z_reference == best[:, None], kept, float("-inf")), axis=1)
        e = tl.where(columns < V, tl.exp2((z_reference - best[:, None]) * LOG2E), 0.0)
        e_desc.store([block_t * BLOCK_T, block_v * BLOCK_V], e.to(e_desc.dtype))
        tl.store(best_ptr + out, best, mask=inside)
        tl.store(pivot_ptr + out, pivot, mask=inside)
        tl.store(sum_ptr + out, tl.sum(e, axis=1), mask=inside)
        kept -= pivot[:, None]
        grown = tl.where(tl.abs(kept) < 0.25, kept + _expm1_minus(kept), tl.exp(kept) - 1)
        tl.store(tilt_ptr + out, tl.sum(tl.where(e == 0, 0.0, e * grown), axis=1), mask=inside)


@jit
def _divergence_kernel(
    e_ptr, d_ptr, log_scale_ptr, delta_ptr, mean_ptr, row_weight_ptr, value_ptr, mean_out_ptr, T, V, width,
    DIRECTION: tl.constexpr, WRITE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One tile of the first pass: its part of the value and of Σ p_s h, or, with WRITE, dz_s in the place of E."""
    block_v = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (rows < T)[:, None] & (columns < V)[None, :]
    offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
    out = block_v.to(tl.int64) * T + rows
    log_scale = tl.load(log_scale_ptr + out, mask=rows < T, other=0.0)[:, None]
    delta = tl.load(delta_ptr + rows, mask=rows < T, other=0.0)[:, None]
    e = tl.load(e_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    ratio = tl.load(d_ptr + offsets, mask=inside, other=0.0).to(tl.float32) - delta
    p_reference = e * tl.exp(log_scale)
    # As one exponential: p_r e^L would be 0 * inf where the student is far more certain.
    p_student = tl.where(e == 0, 0.0, tl.exp(tl.minimum(tl.log(e) + log_scale + ratio, 0.0)))
    near = tl.abs(ratio) < 0.25
    if DIRECTION == "jsd":
        # log(1 + e^x) for both signs of x from one exponential of -|x|.
        tail = tl.log(1 + tl.exp(-tl.abs(ratio)))
        slope = 0.5 * (0.6931471805599453 - (tl.maximum(-ratio, 0.0) + tail))
        other_slope = 0.5 * (0.6931471805599453 - (tl.maximum(ratio, 0.0) + tail))
    else:
        slope = ratio
    if WRITE:
        if DIRECTION == "forward":
            gradient = tl.where(near, p_reference * (ratio + _expm1_minus(ratio)), p_student - p_reference)
        else:
            mean = tl.load(mean_ptr + rows, mask=rows < T, other=0.0)[:, None]
            gradient = p_student * (slope - mean)
        gradient *= tl.load(row_weight_ptr + rows, mask=rows < T, other=0.0)[:, None]
        tl.store(e_ptr + offsets, tl.where(e == 0, 0.0, gradient), mask=inside)
    if not WRITE or DIRECTION == "forward":
        if DIRECTION == "forward":
            far = p_student - p_reference - p_reference * ratio
            term = tl.where(near, p_reference * _expm1_minus(ratio), far)
        elif DIRECTION == "reverse":
            # Σ (p_r - p_s) = 0 is added, so that an error in L counts squared, as in the other two.
            far = p_reference - p_student + p_student * ratio
            term = tl.where(near, p_student * _expm1_minus(-ratio), far)
        else:
            term = p_reference * other_slope + p_student * slope
            tl.store(mean_out_ptr + out, tl.sum(p_student * slope, axis=1), mask=rows < T)
        tl.store(value_ptr + out, tl.sum(tl.where(e == 0, 0.0, term), axis=1), mask=rows < T)


def _chunk_on_triton(x_student, x_reference, weight, weight_reference, direction, row_weight, grad_x, needs_weight):
    """(weighted divergence, dW or None) of some rows; dX goes to grad_x unless that is None."""
    (T, H), V = x_student.shape, weight.shape[0]
    shape = (triton.cdiv(V, TILES.block_v), T)
    best, sums, pivot, tilt, student_best, student_sums = x_student.new_empty((6, *shape), dtype=torch.float32)
    width = shape[0] * TILES.block_v
    e = x_student.new_empty(T, width)
    d = x_student.new_empty(T, width, dtype=torch.float16)
    rows, columns = [TILES.block_t, TILES.block_h], [TILES.block_v, TILES.block_h]
    out = [TILES.block_t, TILES.block_v]
    weight_desc = TensorDescriptor.from_tensor(weight, columns)
    num_t = triton.cdiv(T, TILES.block_t)
    _pair_gemm_kernel[(min(num_t * shape[0], num_processors(weight.device)),)](
        TensorDescriptor.from_tensor(x_student, rows),
        TensorDescriptor.from_tensor(x_reference, rows),
        weight_desc,
        weight_desc if weight_reference is None else TensorDescriptor.from_tensor(weight_reference, columns),
        TensorDescriptor.from_tensor(e, out),
        TensorDescriptor.from_tensor(d, out),
        best, sums, pivot, tilt, student_best, student_sums, T, V, H, x_reference.shape[1],
        SHARED_HEAD=weight_reference is None, LOG2E=LOG2E, BLOCK_T=TILES.block_t, BLOCK_V=TILES.block_v,
        BLOCK_H=TILES.block_h, GROUP=TILES.group, num_warps=TILES.num_warps,
        num_stages=TILES.num_stages,
    )  # fmt: skip
    lse = torch.logsumexp(best + sums.log(), 0)
    log_scale = best - lse  # turns a tile's E into probabilities
    # From one likely token's D, which the reference's most likely tile knows.
    start = pivot.gather(0, best.argmax(0, keepdim=True))
    apart = pivot - start
    shift = (log_scale.exp() * (sums * torch.expm1(apart) + tilt * torch.exp(apart))).sum(0)
    # Beyond fp32, a student's token is 88 nats more likely than it was, and the two lse are precise enough.
    student_lse = torch.logsumexp(student_best + student_sums.log(), 0)
    delta = torch.where(torch.isfinite(shift), start[0] + torch.log1p(shift), student_lse - lse)
    value, mean = torch.empty_like(sums), torch.zeros_like(sums)

    def elementwise(write: bool, row_mean: Tensor) -> None:
        _divergence_kernel[(shape[0], triton.cdiv(T, ELEMENTWISE_ROWS))](
            e, d, log_scale, delta, row_mean, row_weight, value, mean, T, V, width,
            DIRECTION=direction, WRITE=write, BLOCK_T=ELEMENTWISE_ROWS, BLOCK_V=TILES.block_v, num_warps=8,
        )  # fmt: skip

    wants_gradient = grad_x is not None or needs_weight
    if direction == "forward":
        elementwise(wants_gradient, delta)
    else:
        elementwise(False, delta)
        if wants_gradient:
            elementwise(True, value.sum(0) if direction == "reverse" else mean.sum(0))
    if grad_x is not None:
        grad_x.copy_(matmul_fp32(e[:, :V], weight))
    return row_weight * value.sum(0), matmul_fp32(e[:, :V].T, x_student) if needs_weight else None


def _chunk_on_reference(x_student, x_reference, weight, weight_reference, direction, row_weight, grad_x, needs_weight):
    """The same in plain torch; inside an operator autograd sees nothing, so the gradients are written out."""
    other = (x_reference @ (weight if weight_reference is None else weight_reference).T).float().log_softmax(-1)
    student = (x_student @ weight.T).float().log_softmax(-1)
    value, grad_weight = row_weight * _divergence(student, other, direction), None
    if grad_x is not None or needs_weight:
        ratio = student - other
        if direction == "forward":
            grad = other.exp() * torch.expm1(ratio)
        else:
            slope = ratio if direction == "reverse" else 0.5 * (math.log(2) - torch.nn.functional.softplus(-ratio))
            p_student = student.exp()
            grad = p_student * (slope - (p_student * slope).sum(-1, keepdim=True))
        grad = (row_weight[:, None] * grad).to(weight.dtype)
        if grad_x is not None:
            torch.mm(grad, weight, out=grad_x)
        if needs_weight:
            grad_weight = grad.T @ x_student
    return value, grad_weight


@torch.library.custom_op("thinksafe::linear_kl", mutates_args=())
def _linear_kl(
    x_student: Tensor, x_reference: Tensor, weight: Tensor, weight_reference: Tensor | None, row_weight: Tensor,
    direction: str, needs_x: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(weighted divergence a row, its dX, dW of their sum)."""
    run, chunk = (_chunk_on_triton, CHUNK) if on_tensor_cores(x_student) else (_chunk_on_reference, REFERENCE_CHUNK)
    grad_x, grad_weight = empty_gradients(x_student, weight, needs_x, needs_weight)
    values = over_chunks(len(x_student), chunk, grad_weight, lambda rows: run(
        x_student[rows], x_reference[rows], weight, weight_reference, direction, row_weight[rows],
        grad_x[rows] if needs_x else None, needs_weight,
    ))  # fmt: skip
    return torch.cat(values) if values else row_weight.clone(), grad_x, grad_weight


@_linear_kl.register_fake
def _(x_student, x_reference, weight, weight_reference, row_weight, direction, needs_x, needs_weight):
    return torch.empty_like(row_weight), *empty_gradients(x_student, weight, needs_x, needs_weight)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.direction, ctx.needs_x, ctx.needs_weight = inputs[5:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_value, *_):
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
    *,
    direction: Direction = "forward",
    token_weight: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Divergence of the student from the reference at every row, in nats.

    Args:
        x_student: [T, H] hidden states, gets a gradient.
        x_reference: [T, H'] the reference's, a constant; H' may differ from H where the reference has its own head.
        weight: [V, H] head, contiguous; gets a gradient, summed in fp32, only if it requires one.
        weight_reference: [V, H'] the reference's own head, a constant, or None where both share `weight`.
        direction: `forward` KL(reference‖student), `reverse` KL(student‖reference), or `jsd`.
        token_weight: [T] non-negative, or None for 1.
        reduction: `mean` divides by the weights' sum (0 for no rows).

    Returns:
        fp32: a scalar, or [T] for `none`. Where student equals reference, exactly 0 with a gradient of exactly 0. A
        row of states that are not finite is NaN; `first_bad_row` of chunked_loss.py names it, given the rows. On a
        GPU a token more than 88 nats less likely than its neighbours, by the reference, counts as impossible, and a
        student more than 88 nats away has a rough value.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a word is unknown.
    """
    if direction not in ("forward", "reverse", "jsd") or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown direction {direction!r} or reduction {reduction!r}")
    rows = torch.zeros(len(x_student), dtype=torch.int64, device=x_student.device)
    check_head(x_student, weight, rows)
    check_head(x_reference, weight if weight_reference is None else weight_reference, rows[: len(x_reference)])
    if len(x_reference) != len(x_student) or (weight_reference is not None and len(weight_reference) != len(weight)):
        raise ValueError("student and reference must have the same rows and the same vocabulary")
    if token_weight is not None and token_weight.shape != x_student.shape[:1]:
        raise ValueError(f"token_weight is {list(token_weight.shape)}, x has {len(x_student)} rows")
    row_weight = (
        x_student.new_ones(len(x_student), dtype=torch.float32) if token_weight is None else token_weight.float()
    )
    grad = torch.is_grad_enabled()
    value = _linear_kl(
        x_student.contiguous(), x_reference.detach().contiguous(), weight,
        None if weight_reference is None else weight_reference.detach(), row_weight, direction,
        grad and x_student.requires_grad, grad and weight.requires_grad,
    )[0]  # fmt: skip
    return reduced(value, row_weight.sum(), reduction)
