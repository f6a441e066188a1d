"""Cross-entropy straight from hidden states, without [T, V] logits.

    loss_t = w_t [ lse_t - (1 - s) z_ty - s mean_v z_tv + c lse_t² ],    z = X Wᵀ, s smoothing, c z-loss
    dX_t   = w_t [ a_t p_t W - (1 - s) w_y - s mean_v w_v ],             a_t = 1 + 2 c lse_t

With a frozen head this is attention with K = V = W: the pass of exp_gemm.py leaves E = exp(z - z_y) in bf16, chunk by
chunk, and p W is E W with a row scale, so logits are never rounded and no pass over dlogits exists. The target's part
stays in fp32: 1 - p_y is S / (1 + S) with S the others' sum, exact for confident tokens, where bf16 logits are wrong by
3%. FLOP: 4 T V H with a frozen head, 6 T V H with a trainable one.

Where `exact` is off, a vocabulary block is skipped for a block of rows if every row has at most EPS of its gradient's
mass there, or as a whole at most EPS of the average row's: a token that the model is sure of. Mass is the weight times
1 - p_y; what was dropped is reported. Trained models put nearly all mass on few rows and blocks; random data does not,
and a head that trains needs the small gradients, so exact is the default there.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from thinksafe.kernels.checks import (
    check_choice,
    check_head,
    check_number,
    check_once,
    check_range,
    check_tma,
    check_token_ids,
    row_weights,
)
from thinksafe.kernels.chunked_loss import (
    as_given,
    empty_gradients,
    first_bad_row,
    matmul_fp32,
    over_chunks,
    reduced,
    scaled_gradients,
)
from thinksafe.kernels.dispatch import INTERPRETED, TensorDescriptor, jit, tl, triton
from thinksafe.kernels.exp_gemm import PLAIN, exp_gemm, gather_dot, on_tensor_cores

CHUNK = 8192
"""Rows whose E is held at once: 8192 * 151,936 * 2 bytes = 2.5 GB. Halved where memory runs out."""
REFERENCE_CHUNK = 1024
SPARSE_BLOCK_K, SPARSE_BLOCK_H = (16, 32) if INTERPRETED else (64, 256)
EPS = 2.0**-12
"""Share of gradient mass below which a block of a row, or a row, may be skipped: bf16 rounding of E costs as much."""


class Stats(NamedTuple):
    """What a call did.

    Attributes:
        normaliser: fp32 scalar, what `mean` divided by: the weights of the rows that count, summed.
        dropped_mass: fp32 scalar, share of the rows' gradient mass that was skipped, of the chunk where it was largest;
            0 where exact.
        active_share: fp32 scalar, share of (row block, vocabulary block) pairs whose gradient was computed.
        bad_row: int64 scalar, the first row with a loss that is not finite, or -1.
    """

    normaliser: Tensor
    dropped_mass: Tensor
    active_share: Tensor
    bad_row: Tensor


def reference(x, weight, target, row_weight, label_smoothing=0.0, z_loss=0.0) -> Tensor:
    """Per-row weighted loss through full logits in the dtype's own precision, differentiable. -> [T]."""
    logits = x @ weight.T
    lse = logits.logsumexp(-1)
    chosen = logits.gather(-1, target[:, None])[:, 0]
    loss = lse - (1 - label_smoothing) * chosen - label_smoothing * logits.mean(-1) + z_loss * lse.square()
    return row_weight * loss


@jit
def _sparse_gemm_kernel(
    e_desc, w_desc, out_ptr, blocks_ptr, counts_ptr, T, H, num_v,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out = E W over each row block's list of vocabulary blocks, fp32."""
    block_t, block_h = tl.program_id(1), tl.program_id(0)
    accumulator = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    steps = tl.load(counts_ptr + block_t) * (BLOCK_V // BLOCK_K)
    for step in range(0, steps):
        block = tl.load(blocks_ptr + block_t.to(tl.int64) * num_v + step // (BLOCK_V // BLOCK_K))
        k = block * BLOCK_V + step % (BLOCK_V // BLOCK_K) * BLOCK_K
        e = e_desc.load([block_t * BLOCK_T, k])
        w = w_desc.load([k, block_h * BLOCK_H])
        accumulator = tl.dot(e, w, accumulator, input_precision="ieee")
    rows = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = block_h * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (rows < T)[:, None] & (columns < H)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * H + columns[None, :], accumulator, mask=inside)


@jit
def _combine_kernel(
    product_ptr, weight_ptr, target_ptr, mean_ptr, scale_ptr, own_ptr, spread_ptr, out_ptr, H,
    SPREAD: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dX_t = scale_t * product_t + own_t * w_y + spread_t * mean(w), one row a program."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    scale, own = tl.load(scale_ptr + row), tl.load(own_ptr + row)
    for h in range(0, H, BLOCK_H):
        columns = h + tl.arange(0, BLOCK_H)
        inside = columns < H
        grad = scale * tl.load(product_ptr + row * H + columns, mask=inside, other=0.0).to(tl.float32)
        grad += own * tl.load(weight_ptr + target * H + columns, mask=inside, other=0.0).to(tl.float32)
        if SPREAD:
            grad += tl.load(spread_ptr + row) * tl.load(mean_ptr + columns, mask=inside, other=0.0)
        tl.store(out_ptr + row * H + columns, grad, mask=inside)


def _chunk_on_triton(x, weight, target, row_weight, smoothing, z_loss, exact, needs_x, needs_weight, mean_w):
    """((loss, dropped, active), dX or None, dW or None) of some rows."""
    target_logit = gather_dot(x, weight, target[:, None])[:, 0]
    done = exp_gemm(x, weight, target, target_logit, store=needs_x or needs_weight)
    others = done.sums.sum(0)
    own = torch.exp(target_logit - done.shift)  # 1, but for a row whose shift is its maximum
    total = own + others
    nll = torch.where(own == 1, torch.log1p(others), done.shift - target_logit + torch.log(total))
    lse = nll + target_logit
    loss = nll + z_loss * lse.square()
    if smoothing:
        loss = loss + smoothing * (target_logit - x.float() @ mean_w)
    tilt = 1 + 2 * z_loss * lse
    scale = row_weight * tilt / total
    # tilt * p_y - (1 - smoothing), written so that nothing cancels where p_y is close to 1.
    own_gradient = row_weight * (-others / total + (tilt - 1) * (own / total) + smoothing)
    dropped, active, dx, dw = loss.new_zeros(()), loss.new_ones(()), None, None
    if needs_x:
        if exact:
            product = matmul_fp32(done.e[:, : weight.shape[0]], weight)
        else:
            product, dropped, active = _sparse_product(done, weight, others, row_weight * others / total)
        dx = torch.empty_like(x)
        block = min(triton.next_power_of_2(x.shape[1]), 2048)
        _combine_kernel[(len(x),)](
            product, weight, target, mean_w, scale, own_gradient, -smoothing * row_weight, dx, x.shape[1],
            SPREAD=smoothing > 0, BLOCK_H=block, num_warps=4,
        )  # fmt: skip
    if needs_weight:
        # dW = Eᵀ (scale X) with the target's own gradient put into E: a scatter that no two rows share.
        column = torch.where(scale == 0, 0.0, own_gradient / scale)
        done.e.scatter_(1, target[:, None], column[:, None].to(done.e.dtype))
        dw = matmul_fp32(done.e[:, : weight.shape[0]].T, (scale[:, None] * x.float()).to(x.dtype))
        if smoothing:
            dw -= (smoothing / len(weight)) * (row_weight @ x.float())
    return (row_weight * loss, dropped, active), dx, dw


def _sparse_product(done, weight: Tensor, others: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(E W over the blocks that matter, dropped share of all rows' mass, share of blocks computed)."""
    num_v, T = done.sums.shape
    num_t = triton.cdiv(T, PLAIN.block_t)
    share = done.sums / others.clamp(min=torch.finfo(torch.float32).tiny)
    padded = torch.zeros(num_v, num_t * PLAIN.block_t, dtype=torch.bool, device=share.device)
    padded[:, :T] = ~((share <= EPS) | (mass <= EPS * mass.mean()))  # NaN counts as active
    active = padded.view(num_v, num_t, PLAIN.block_t).any(-1).T.contiguous()  # [row blocks, vocabulary blocks]
    counts = active.sum(1, dtype=torch.int32)
    blocks = torch.argsort(active.int(), dim=1, descending=True, stable=True).int()
    H = weight.shape[1]
    product = torch.empty(T, H, dtype=torch.float32, device=weight.device)
    _sparse_gemm_kernel[(triton.cdiv(H, SPARSE_BLOCK_H), num_t)](
        TensorDescriptor.from_tensor(done.e, [PLAIN.block_t, SPARSE_BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [SPARSE_BLOCK_K, SPARSE_BLOCK_H]),
        product, blocks, counts, T, H, num_v, BLOCK_T=PLAIN.block_t, BLOCK_V=PLAIN.block_v, BLOCK_K=SPARSE_BLOCK_K,
        BLOCK_H=SPARSE_BLOCK_H, num_warps=8, num_stages=3,
    )  # fmt: skip
    row_block = torch.arange(T, device=share.device) // PLAIN.block_t
    dropped = mass @ (share * ~active.T[:, row_block]).sum(0)
    return product, dropped / mass.sum().clamp(min=torch.finfo(torch.float32).tiny), active.float().mean()


def _chunk_on_reference(x, weight, target, row_weight, smoothing, z_loss, exact, needs_x, needs_weight, mean_w):
    """The same in plain torch."""
    logits = matmul_fp32(x, weight.T)
    lse, mean = logits.logsumexp(-1), logits.mean(-1)
    column = target[:, None]
    chosen = logits.gather(-1, column)[:, 0]
    # A logit of -inf, which an infinite weight makes, is a NaN.
    loss = lse - chosen + smoothing * (chosen - mean) + z_loss * lse.square() + 0 * mean
    if needs_x or needs_weight:
        grad, scale = logits.sub_(lse[:, None]).exp_(), row_weight * (1 + 2 * z_loss * lse)
        grad.mul_(scale[:, None]).sub_((smoothing / len(weight)) * row_weight[:, None])
        grad.scatter_add_(-1, column, (smoothing - 1) * row_weight[:, None])
    dx = matmul_fp32(grad, weight).to(x.dtype) if needs_x else None
    dw = matmul_fp32(grad.T, x) if needs_weight else None
    return (row_weight * loss, loss.new_zeros(()), loss.new_ones(())), dx, dw


@torch.library.custom_op("thinksafe::linear_cross_entropy", mutates_args=())
@as_given
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, row_weight: Tensor, ignore_index: int | None, smoothing: float,
    z_loss: float, exact: bool, needs_x: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(weighted loss a row, its dX, dW of their sum, [dropped mass, active share]); row_weight is 0 in ignored rows."""
    rows = range(len(x))
    if ignore_index is not None:
        ignored = target == ignore_index
        if _may_wait(x):
            kept = (~ignored).nonzero()[:, 0]
            rows = kept if len(kept) < len(x) else rows
        else:  # computed with all others, of finite states and with a weight of 0
            x, target = x.masked_fill(ignored[:, None], 0), target.masked_fill(ignored, 0)
    check_range("target", target if isinstance(rows, range) else target[rows], len(weight))
    on_triton = on_tensor_cores(x)
    if on_triton:
        check_tma(x=x, weight=weight)
    run, chunk = (_chunk_on_triton, CHUNK) if on_triton else (_chunk_on_reference, REFERENCE_CHUNK)
    grad_x, grad_weight = empty_gradients(x, weight, needs_x, needs_weight)
    mean_w = weight.float().mean(0) if smoothing and on_triton else None
    chunks = over_chunks(rows, chunk, grad_x, grad_weight, lambda rows: run(
        x[rows], weight, target[rows], row_weight[rows], smoothing, z_loss, exact, needs_x, needs_weight, mean_w,
    ))  # fmt: skip
    loss, dropped, active = torch.zeros_like(row_weight), row_weight.new_zeros(()), row_weight.new_ones(())
    if chunks:
        losses, dropped, active = zip(*chunks, strict=True)
        loss[slice(None) if isinstance(rows, range) else rows] = torch.cat(losses)
        dropped = torch.stack(dropped).amax()
        active = sum(share * len(loss) for loss, share in zip(losses, active, strict=True)) / len(rows)
    return loss, grad_x, grad_weight, torch.stack((dropped, active))


def _may_wait(x: Tensor) -> bool:
    """Whether the host may ask how many rows count: not while a CUDA graph is captured."""
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


@_linear_cross_entropy.register_fake
def _(x, weight, target, row_weight, ignore_index, smoothing, z_loss, exact, needs_x, needs_weight):
    return torch.empty_like(row_weight), *empty_gradients(x, weight, needs_x, needs_weight), row_weight.new_empty(2)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output[1:3])
    ctx.settings = inputs[4:8]
    ctx.needs_x, ctx.needs_weight = inputs[8:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *others):
    check_once("linear_cross_entropy", *others)
    x, weight, target, row_weight, grad_x, grad_weight = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 10
    dx, dw = scaled_gradients(
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
    """Cross-entropy of X Wᵀ against targets, in nats.

    Args:
        x: [T, H] hidden states, bf16, or fp32, which a GPU computes in plain torch.
        weight: [V, H] head, contiguous, dtype of x; gets a gradient, summed in fp32, only if it requires one.
        target: [T] int64 in [0, V), or ignore_index.
        token_weight: [T] finite and not negative, a constant; None for 1.
        ignore_index: rows with this target are left out before anything is computed, which waits for the device to
            count them; a captured CUDA graph cannot, and computes them with a weight of 0. None promises that there
            are none.
        label_smoothing: share of the target's probability spread over the vocabulary.
        z_loss: coefficient of lse².
        reduction: `mean` divides by the weights of the rows that count (a loss of 0 where there are none).
        exact: keep every block of the gradient; None is exact for a head that trains and not for a frozen one.

    Returns:
        The loss, fp32: a scalar, or [T] for `none` with 0 in ignored rows. NaN in rows whose states are not finite, and
        in all that an infinite or NaN weight reaches; `linear_cross_entropy_with_stats` names the first.

    Raises:
        TypeError, ValueError: an argument does not fit, with its name; on a GPU values are asserted by the device.
    """
    rows, normaliser, _ = _rows(
        x, weight, target, token_weight, ignore_index, label_smoothing, z_loss, exact, reduction
    )
    return reduced(rows, normaliser, reduction)


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
    """`linear_cross_entropy`, and what the call did."""
    rows, normaliser, figures = _rows(
        x, weight, target, token_weight, ignore_index, label_smoothing, z_loss, exact, reduction
    )
    return reduced(rows, normaliser, reduction), Stats(normaliser, *figures.detach().unbind(), first_bad_row(rows))


def _rows(x, weight, target, token_weight, ignore_index, label_smoothing, z_loss, exact, reduction):
    """(weighted loss [T], sum of the weights that count, [dropped mass, active share])."""
    check_choice("reduction", reduction, "mean", "sum", "none")
    check_choice("exact", exact, True, False, None)
    check_number("label_smoothing", label_smoothing, 0, 1)
    check_number("z_loss", z_loss, 0)
    if ignore_index is not None:
        check_number("ignore_index", ignore_index, -float("inf"), whole=True)
    check_head(x, weight)
    check_token_ids("target", target, x, (len(x),))
    row_weight = row_weights(token_weight, x)
    if ignore_index is not None:
        row_weight = row_weight.masked_fill(target == ignore_index, 0.0)
    grad = torch.is_grad_enabled()
    needs_x, needs_weight = grad and x.requires_grad, grad and weight.requires_grad
    loss, _, _, figures = _linear_cross_entropy(
        x.contiguous(), weight, target.contiguous(), row_weight, ignore_index, label_smoothing, z_loss,
        needs_weight if exact is None else exact, needs_x, needs_weight,
    )  # fmt: skip
    return loss, row_weight.sum(), figures
