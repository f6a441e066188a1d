"""Cross-entropy computed from hidden states, without [T, V] logits.

    loss_t = w_t [ lse_t - (1 - s) z_ty - s mean_v z_tv + c lse_t² ],    z = X Wᵀ, s smoothing, c z-loss
    dX_t   = w_t [ a_t p_t W - (1 - s) w_y - s mean_v w_v ],             a_t = 1 + 2 c lse_t

With a frozen head this is attention with K = V = W: the pass of exp_gemm.py stores E = exp(z - z_y) in bf16, chunk by
chunk, and p W is E W with a row scale. Logits are therefore never rounded, and no pass over dlogits exists. The
target's part stays in fp32: 1 - p_y = S / (1 + S), where S is the sum of exp(z - z_y) over all other tokens. This is
exact for confident tokens, where bf16 logits are wrong by 3%.

Without `exact`, the gradient skips a vocabulary block for a block of rows if each row has at most FILTER_EPS of its
gradient mass in that block, or has at most FILTER_EPS of the average row's mass in total, because the model is sure of
its token. The mass of a row is its weight times 1 - p_y. `Stats.dropped_mass` reports the skipped share. Trained models
put nearly all mass on few rows and blocks; random data does not. A trainable head needs the small gradients, so exact
is its default.

Cost: 4 T V H FLOP with a frozen head, 6 T V H with a trainable one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from thinksafe.kernels.checks import (
    check_choice,
    check_head,
    check_no_second_derivative,
    check_number,
    check_tma_alignment,
    check_token_id_range,
    check_token_ids,
    row_weights,
)
from thinksafe.kernels.chunked_loss import (
    allocate_gradients,
    first_bad_row,
    map_chunks_with_gradients,
    matmul_fp32,
    reduce_loss,
    scale_gradients,
    without_autocast,
)
from thinksafe.kernels.dispatch import INTERPRETED, TensorDescriptor, jit, tl, triton
from thinksafe.kernels.exp_gemm import LOSS_TILE, exp_gemm, gather_dot, on_tensor_cores

CHUNK_ROWS = 8192
"""Rows of a chunk in Triton: its E has 8192 * 151,936 * 2 bytes = 2.5 GB. Halved if memory runs out."""
REFERENCE_CHUNK_ROWS = 1024
"""Rows of a chunk in plain torch, halved if memory runs out."""
SPARSE_BLOCK_K, SPARSE_BLOCK_H = (16, 32) if INTERPRETED else (64, 256)
FILTER_EPS = 2.0**-12
"""Share of gradient mass up to which the gradient may be skipped. It applies to a row's mass in one vocabulary block,
relative to the row's whole mass, and to a row's whole mass, relative to the average row's. Rounding E to bf16 loses the
same."""


class Stats(NamedTuple):
    """Statistics of one call of `linear_cross_entropy_with_stats`.

    Attributes:
        normalizer: fp32 scalar, the divisor of `mean`: the sum of the loss weights of all rows that are not ignored.
        dropped_mass: fp32 scalar, share of the rows' gradient mass that was skipped, in the chunk with the largest
            share. 0 if no gradient of x is computed, or with `exact`, or in plain torch.
        active_share: fp32 scalar, share of (row block, vocabulary block) pairs whose gradient was computed. 1 in the
            three cases in which dropped_mass is 0.
        bad_row: int64 scalar, index of the first row whose loss is NaN or infinite, or -1 if all are finite.
    """

    normalizer: Tensor
    dropped_mass: Tensor
    active_share: Tensor
    bad_row: Tensor


def reference(x, weight, target, row_weight, label_smoothing=0.0, z_loss=0.0) -> Tensor:
    """Return the weighted loss of each row, [T], from full logits z = x Wᵀ in the dtype of x; differentiable.

    loss[t] = row_weight[t] * (lse - (1 - label_smoothing) * z[target[t]] - label_smoothing * mean(z) + z_loss * lse²)

    Args:
        x: [T, H] hidden states.
        weight: [V, H], weight matrix of the language-model head.
        target: [T] int64 in [0, V); no value is ignored.
        row_weight: [T], factor of each row's loss.
        label_smoothing: share of the target's probability that is spread over the vocabulary.
        z_loss: coefficient of lse².
    """
    logits = x @ weight.T
    lse = logits.logsumexp(-1)
    target_logit = logits.gather(-1, target[:, None])[:, 0]
    loss = lse - (1 - label_smoothing) * target_logit - label_smoothing * logits.mean(-1) + z_loss * lse.square()
    return row_weight * loss


@jit
def _sparse_gemm_kernel(
    e_desc, w_desc, out_ptr, blocks_ptr, counts_ptr, T, H, num_v,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Compute one [BLOCK_T, BLOCK_H] tile of out = E W in fp32, over the vocabulary blocks that its row block lists.

    Row block b lists counts_ptr[b] block indices, the first of row b of blocks_ptr [row blocks, num_v].
    """
    block_t, block_h = tl.program_id(1), tl.program_id(0)
    acc = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    num_steps = tl.load(counts_ptr + block_t) * (BLOCK_V // BLOCK_K)
    for step in range(0, num_steps):
        block_v = tl.load(blocks_ptr + block_t.to(tl.int64) * num_v + step // (BLOCK_V // BLOCK_K))
        k = block_v * BLOCK_V + step % (BLOCK_V // BLOCK_K) * BLOCK_K
        e = e_desc.load([block_t * BLOCK_T, k])
        w = w_desc.load([k, block_h * BLOCK_H])
        acc = tl.dot(e, w, acc, input_precision="ieee")
    rows = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = block_h * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (rows < T)[:, None] & (columns < H)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * H + columns[None, :], acc, mask=mask)


@jit
def _grad_x_kernel(
    product_ptr, weight_ptr, target_ptr, mean_weight_ptr, scale_ptr, target_scale_ptr, mean_scale_ptr, out_ptr, H,
    SMOOTHING: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Store dX_t = scale_t * product_t + target_scale_t * w_y + mean_scale_t * mean(w), one row per program.

    The last term is computed with SMOOTHING only.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    scale, target_scale = tl.load(scale_ptr + row), tl.load(target_scale_ptr + row)
    for h in range(0, H, BLOCK_H):
        columns = h + tl.arange(0, BLOCK_H)
        mask = columns < H
        grad = scale * tl.load(product_ptr + row * H + columns, mask=mask, other=0.0).to(tl.float32)
        grad += target_scale * tl.load(weight_ptr + target * H + columns, mask=mask, other=0.0).to(tl.float32)
        if SMOOTHING:
            grad += tl.load(mean_scale_ptr + row) * tl.load(mean_weight_ptr + columns, mask=mask, other=0.0)
        tl.store(out_ptr + row * H + columns, grad, mask=mask)


def _chunk_on_triton(x, weight, target, row_weight, smoothing, z_loss, exact, needs_x, needs_weight, mean_weight):
    """Return ((loss, dropped mass, active share), dX, dW) of a chunk of T rows, with Triton kernels.

    loss is [T] fp32 and weighted; dropped mass and active share are scalars, see `Stats`. dX is [T, H] in the dtype of
    x, for an upstream gradient of 1, or None without needs_x. dW is [V, H] fp32, or None without needs_weight.
    mean_weight is the mean of the weight's rows, [H] fp32, which is read if smoothing is above 0, else None.
    """
    target_logit = gather_dot(x, weight, target[:, None])[:, 0]
    exp_pass = exp_gemm(x, weight, target, target_logit, store=needs_x or needs_weight)
    other_sum = exp_pass.sums.sum(0)
    target_exp = torch.exp(target_logit - exp_pass.shift)  # 1, except in a row whose shift is its maximum
    sum_exp = target_exp + other_sum
    nll = torch.where(target_exp == 1, torch.log1p(other_sum), exp_pass.shift - target_logit + torch.log(sum_exp))
    lse = nll + target_logit
    loss = nll + z_loss * lse.square()
    if smoothing:
        loss = loss + smoothing * (target_logit - x.float() @ mean_weight)
    lse_factor = 1 + 2 * z_loss * lse
    scale = row_weight * lse_factor / sum_exp
    # lse_factor * p_y - (1 - smoothing), written so that nothing cancels if p_y is close to 1.
    target_gradient = row_weight * (-other_sum / sum_exp + (lse_factor - 1) * (target_exp / sum_exp) + smoothing)
    dropped_mass, active_share, dx, dw = loss.new_zeros(()), loss.new_ones(()), None, None
    if needs_x:
        if exact:
            product = matmul_fp32(exp_pass.e[:, : weight.shape[0]], weight)
        else:
            product, dropped_mass, active_share = _sparse_product(
                exp_pass, weight, other_sum, row_weight * other_sum / sum_exp
            )
        dx = torch.empty_like(x)
        block = min(triton.next_power_of_2(x.shape[1]), 2048)
        _grad_x_kernel[(len(x),)](
            product, weight, target, mean_weight, scale, target_gradient, -smoothing * row_weight, dx, x.shape[1],
            SMOOTHING=smoothing > 0, BLOCK_H=block, num_warps=4,
        )  # fmt: skip
    if needs_weight:
        # dW = Eᵀ (scale X) after the target's gradient is put into E. No two rows scatter to the same element.
        target_value = torch.where(scale == 0, 0.0, target_gradient / scale)
        exp_pass.e.scatter_(1, target[:, None], target_value[:, None].to(exp_pass.e.dtype))
        dw = matmul_fp32(exp_pass.e[:, : weight.shape[0]].T, (scale[:, None] * x.float()).to(x.dtype))
        if smoothing:
            dw -= (smoothing / len(weight)) * (row_weight @ x.float())
    return (row_weight * loss, dropped_mass, active_share), dx, dw


def _sparse_product(exp_pass, weight: Tensor, other_sum: Tensor, row_mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (E W over the active blocks [T, H] fp32, dropped share of all rows' mass, share of blocks computed).

    Args:
        exp_pass: the chunk's `ExpGemmResult`.
        weight: [V, H].
        other_sum: [T], sum of E of each row.
        row_mass: [T], gradient mass of each row: its loss weight times 1 - p_y.
    """
    num_v, T = exp_pass.sums.shape
    num_t = triton.cdiv(T, LOSS_TILE.block_t)
    share = exp_pass.sums / other_sum.clamp(min=torch.finfo(torch.float32).tiny)
    is_active = torch.zeros(num_v, num_t * LOSS_TILE.block_t, dtype=torch.bool, device=share.device)
    is_active[:, :T] = ~((share <= FILTER_EPS) | (row_mass <= FILTER_EPS * row_mass.mean()))  # NaN counts as active
    # [row blocks, vocabulary blocks]
    active_blocks = is_active.view(num_v, num_t, LOSS_TILE.block_t).any(-1).T.contiguous()
    block_counts = active_blocks.sum(1, dtype=torch.int32)
    block_order = torch.argsort(active_blocks.int(), dim=1, descending=True, stable=True).int()
    H = weight.shape[1]
    product = torch.empty(T, H, dtype=torch.float32, device=weight.device)
    _sparse_gemm_kernel[(triton.cdiv(H, SPARSE_BLOCK_H), num_t)](
        TensorDescriptor.from_tensor(exp_pass.e, [LOSS_TILE.block_t, SPARSE_BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [SPARSE_BLOCK_K, SPARSE_BLOCK_H]),
        product, block_order, block_counts, T, H, num_v, BLOCK_T=LOSS_TILE.block_t, BLOCK_V=LOSS_TILE.block_v,
        BLOCK_K=SPARSE_BLOCK_K, BLOCK_H=SPARSE_BLOCK_H, num_warps=8, num_stages=3,
    )  # fmt: skip
    row_block = torch.arange(T, device=share.device) // LOSS_TILE.block_t
    dropped_mass = row_mass @ (share * ~active_blocks.T[:, row_block]).sum(0)
    dropped_share = dropped_mass / row_mass.sum().clamp(min=torch.finfo(torch.float32).tiny)
    return product, dropped_share, active_blocks.float().mean()


def _chunk_on_reference(x, weight, target, row_weight, smoothing, z_loss, exact, needs_x, needs_weight, mean_weight):
    """Return the same as `_chunk_on_triton`, in plain torch, which computes all blocks: dropped mass 0, active share
    1."""
    logits = matmul_fp32(x, weight.T)
    lse, mean_logit = logits.logsumexp(-1), logits.mean(-1)
    target_column = target[:, None]
    target_logit = logits.gather(-1, target_column)[:, 0]
    # An infinite weight can make a logit -inf: 0 * mean_logit turns that row into NaN.
    loss = lse - target_logit + smoothing * (target_logit - mean_logit) + z_loss * lse.square() + 0 * mean_logit
    if needs_x or needs_weight:
        grad, scale = logits.sub_(lse[:, None]).exp_(), row_weight * (1 + 2 * z_loss * lse)
        grad.mul_(scale[:, None]).sub_((smoothing / len(weight)) * row_weight[:, None])
        grad.scatter_add_(-1, target_column, (smoothing - 1) * row_weight[:, None])
    dx = matmul_fp32(grad, weight).to(x.dtype) if needs_x else None
    dw = matmul_fp32(grad.T, x) if needs_weight else None
    return (row_weight * loss, loss.new_zeros(()), loss.new_ones(())), dx, dw


@torch.library.custom_op("thinksafe::linear_cross_entropy", mutates_args=())
@without_autocast
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, row_weight: Tensor, ignore_index: int | None, smoothing: float,
    z_loss: float, exact: bool, needs_x: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (weighted loss [T] fp32, dX [T, H], dW [V, H] fp32, [dropped mass, active share] fp32).

    The gradients are for an upstream gradient of 1 in every row, and have no elements without needs_x or needs_weight.
    row_weight must be 0 in ignored rows, whose loss and dX are 0.
    """
    rows = range(len(x))
    if ignore_index is not None:
        is_ignored = target == ignore_index
        if _host_may_sync(x):
            kept_rows = (~is_ignored).nonzero()[:, 0]
            rows = kept_rows if len(kept_rows) < len(x) else rows
        else:  # ignored rows are computed too, with hidden states of 0 and a weight of 0
            x, target = x.masked_fill(is_ignored[:, None], 0), target.masked_fill(is_ignored, 0)
    check_token_id_range("target", target if isinstance(rows, range) else target[rows], len(weight))
    on_triton = on_tensor_cores(x)
    if on_triton:
        check_tma_alignment(x=x, weight=weight)
    compute_chunk = _chunk_on_triton if on_triton else _chunk_on_reference
    chunk_rows = CHUNK_ROWS if on_triton else REFERENCE_CHUNK_ROWS
    grad_x, grad_weight = allocate_gradients(x, weight, needs_x, needs_weight)
    mean_weight = weight.float().mean(0) if smoothing and on_triton else None
    chunks = map_chunks_with_gradients(rows, chunk_rows, grad_x, grad_weight, lambda rows: compute_chunk(
        x[rows], weight, target[rows], row_weight[rows], smoothing, z_loss, exact, needs_x, needs_weight, mean_weight,
    ))  # fmt: skip
    loss, dropped_mass, active_share = torch.zeros_like(row_weight), row_weight.new_zeros(()), row_weight.new_ones(())
    if chunks:
        losses, dropped_mass, active_share = zip(*chunks, strict=True)
        loss[slice(None) if isinstance(rows, range) else rows] = torch.cat(losses)
        dropped_mass = torch.stack(dropped_mass).amax()
        active_rows = sum(share * len(loss) for loss, share in zip(losses, active_share, strict=True))
        active_share = active_rows / len(rows)
    return loss, grad_x, grad_weight, torch.stack((dropped_mass, active_share))


def _host_may_sync(x: Tensor) -> bool:
    """Return False if x is on a GPU that is capturing a CUDA graph, else True: the host may read values."""
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


@_linear_cross_entropy.register_fake
def _(x, weight, target, row_weight, ignore_index, smoothing, z_loss, exact, needs_x, needs_weight):
    return torch.empty_like(row_weight), *allocate_gradients(x, weight, needs_x, needs_weight), row_weight.new_empty(2)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output[1:3])
    ctx.settings = inputs[4:8]
    ctx.needs_x, ctx.needs_weight = inputs[8:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *grad_gradients):
    check_no_second_derivative("linear_cross_entropy", *grad_gradients)
    x, weight, target, row_weight, grad_x, grad_weight = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 10
    dx, dw = scale_gradients(
        grad_loss, grad_x if ctx.needs_x else None, grad_weight if ctx.needs_weight else None,
        lambda: _linear_cross_entropy(x, weight, target, row_weight * grad_loss, *ctx.settings, False, True)[2],
    )  # fmt: skip
    return dx, None if dw is None else dw.to(weight.dtype), *(None,) * 8


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    exact: bool | None = None,
) -> Tensor:
    """Return the cross-entropy of the logits X Wᵀ against targets, in nats; differentiable once in x and weight.

    Args:
        x: [T, H] hidden states, bf16 or fp32; a GPU computes fp32 in plain torch.
        weight: [V, H], weight matrix of the language-model head, contiguous, in the dtype of x. It gets a gradient,
            summed in fp32, only if it requires one.
        target: [T] int64 in [0, V), or ignore_index.
        token_weight: [T] floating point, the loss weight of each row: finite, non-negative constants; None for 1.
        ignore_index: rows with this target are removed before anything is computed. The host waits for the device to
            count them. A captured CUDA graph cannot wait, so it computes them with a weight of 0. None promises that no
            row is ignored.
        label_smoothing: share of the target's probability that is spread over the vocabulary, in [0, 1).
        z_loss: coefficient of lse², at least 0.
        reduction: `none` returns the weighted loss of each row, `sum` their sum, and `mean` the sum divided by the sum
            of the loss weights of all rows that are not ignored (0 if there are none).
        exact: True computes every block of the gradient; False lets a GPU skip blocks of dX whose share is at most
            FILTER_EPS. None means True if weight requires a gradient and False if not.

    Returns:
        The loss in fp32: a scalar, or [T] for `none`, with 0 in ignored rows. A row is NaN if its hidden state is not
        finite or if it reads an infinite or NaN weight; `linear_cross_entropy_with_stats` returns the first such row.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it. On a GPU a device-side assert checks the
            elements of target and token_weight instead.
    """
    row_losses, normalizer, _ = _row_losses(
        x, weight, target, token_weight, ignore_index, label_smoothing, z_loss, exact, reduction
    )
    return reduce_loss(row_losses, normalizer, reduction)


def linear_cross_entropy_with_stats(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    exact: bool | None = None,
) -> tuple[Tensor, Stats]:
    """Return (loss, statistics of the call); arguments, loss and errors are those of `linear_cross_entropy`."""
    row_losses, normalizer, mass_and_share = _row_losses(
        x, weight, target, token_weight, ignore_index, label_smoothing, z_loss, exact, reduction
    )
    return reduce_loss(row_losses, normalizer, reduction), Stats(
        normalizer, *mass_and_share.detach().unbind(), first_bad_row(row_losses)
    )


def _row_losses(x, weight, target, token_weight, ignore_index, label_smoothing, z_loss, exact, reduction):
    """Check the arguments of `linear_cross_entropy` and compute its loss before the reduction.

    Return (weighted loss [T], sum of the loss weights of the rows not ignored, [dropped mass, active share]).
    """
    check_choice("reduction", reduction, "mean", "sum", "none")
    check_choice("exact", exact, True, False, None)
    check_number("label_smoothing", label_smoothing, 0, 1)
    check_number("z_loss", z_loss, 0)
    if ignore_index is not None:
        check_number("ignore_index", ignore_index, -float("inf"), integer=True)
    check_head(x, weight)
    check_token_ids("target", target, x, (len(x),))
    row_weight = row_weights(token_weight, x)
    if ignore_index is not None:
        row_weight = row_weight.masked_fill(target == ignore_index, 0.0)
    grad = torch.is_grad_enabled()
    needs_x, needs_weight = grad and x.requires_grad, grad and weight.requires_grad
    loss, _, _, mass_and_share = _linear_cross_entropy(
        x.contiguous(), weight, target.contiguous(), row_weight, ignore_index, label_smoothing, z_loss,
        needs_weight if exact is None else exact, needs_x, needs_weight,
    )  # fmt: skip
    return loss, row_weight.sum(), mass_and_share
