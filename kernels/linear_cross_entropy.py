"""Cross-entropy computed from hidden states, without [T, V] logits.

    loss_t = w_t (lse_t - z_ty),    dX_t = w_t (p_t W - w_y),    z = X Wᵀ

With a frozen head this is attention with K = V = W: the pass of exp_gemm.py stores E = exp(z - z_y) in bf16, chunk by
chunk, and p W is E W with a row scale. Logits are therefore never rounded, and no pass over dlogits exists. The
target's part stays in fp32: 1 - p_y = S / (1 + S), where S is the sum of E over all other tokens. This is exact for
confident tokens, where bf16 logits are wrong by 3%.

Without `exact`, the gradient skips a vocabulary block for a block of rows if each row has at most FILTER_EPS of its
gradient mass, |w| (1 - p_y), in that block, or at most FILTER_EPS of the average row's mass in total, because the model
is sure of its token. Trained models put nearly all mass on few rows and blocks; random data does not. A trainable head
needs the small gradients, so exact is its default.

Cost: 4 T V H FLOP with a frozen head, 6 T V H with a trainable one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from thinksafe.kernels.checks import check_choice, check_head, check_tensor, check_tma_alignment, check_token_id_range
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
from thinksafe.kernels.exp_gemm import LOSS_TILE, exp_gemm, gather_dot, on_tensor_cores

CHUNK_ROWS, REFERENCE_CHUNK_ROWS = 8192, 1024
"""Rows of a chunk in Triton, whose E has 8192 * 151,936 * 2 bytes = 2.5 GB, and in plain torch."""
SPARSE_BLOCK_K, SPARSE_BLOCK_H = (16, 32) if INTERPRETED else (64, 256)
FILTER_EPS = 2.0**-12
"""Share of gradient mass that may be skipped; rounding E to bf16 loses the same."""


class Stats(NamedTuple):
    """What a call of `linear_cross_entropy` skipped: nothing without a gradient of x, with `exact`, or in plain torch.

    Attributes:
        dropped_mass: fp32 scalar, skipped share of the rows' gradient mass, in the chunk with the largest share.
        active_share: fp32 scalar, share of (row block, vocabulary block) pairs whose gradient was computed.
    """

    dropped_mass: Tensor
    active_share: Tensor


def reference(x: Tensor, weight: Tensor, target: Tensor, row_weight: Tensor) -> Tensor:
    """Return the weighted loss of each row, [T], from full logits in the dtype of x; differentiable."""
    return row_weight * F.cross_entropy(x @ weight.T, target, reduction="none")


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
def _grad_x_kernel(product_ptr, weight_ptr, target_ptr, scale_ptr, target_scale_ptr, out_ptr, H, BLOCK_H: tl.constexpr):
    """Store dX_t = scale_t * product_t + target_scale_t * w_y, one row per program."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    scale, target_scale = tl.load(scale_ptr + row), tl.load(target_scale_ptr + row)
    for h in range(0, H, BLOCK_H):
        columns = h + tl.arange(0, BLOCK_H)
        mask = columns < H
        grad = scale * tl.load(product_ptr + row * H + columns, mask=mask, other=0.0).to(tl.float32)
        grad += target_scale * tl.load(weight_ptr + target * H + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * H + columns, grad, mask=mask)


def _chunk_on_triton(x, weight, target, row_weight, exact, needs_x, needs_weight):
    """Return (weighted loss [T] fp32, dX [T, H], dW [V, H] fp32, dropped mass, T * active share) of T rows."""
    target_logit = gather_dot(x, weight, target[:, None])[:, 0]
    sums = exp_gemm(x, weight, target, target_logit, store=needs_x or needs_weight)
    loss = row_weight * (sums.shift - target_logit + sums.log_sum)
    sum_exp = sums.target_exp + sums.other_sum
    scale, target_gradient = row_weight / sum_exp, row_weight * (-sums.other_sum / sum_exp)
    dx, dw, dropped_mass, active_rows = None, None, loss.new_zeros(()), loss.new_full((), len(x))
    if needs_x:
        if exact:
            product = matmul_fp32(sums.e[:, : len(weight)], weight)
        else:
            product, dropped_mass, active_share = _sparse_product(sums, weight, target_gradient.abs())
            active_rows = active_share * len(x)
        dx = torch.empty_like(x)
        _grad_x_kernel[(len(x),)](
            product, weight, target, scale, target_gradient, dx, x.shape[1],
            BLOCK_H=min(triton.next_power_of_2(x.shape[1]), 2048), num_warps=4,
        )  # fmt: skip
    if needs_weight:
        # dW = Eᵀ (scale X) after the target's gradient is put into E. No two rows scatter to the same element.
        target_value = torch.where(scale == 0, 0.0, target_gradient / scale)
        sums.e.scatter_(1, target[:, None], target_value[:, None].to(sums.e.dtype))
        dw = matmul_fp32(sums.e[:, : len(weight)].T, (scale[:, None] * x.float()).to(x.dtype))
    return loss, dx, dw, dropped_mass, active_rows


def _sparse_product(sums, weight: Tensor, row_mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (E W over the active blocks [T, H] fp32, dropped share of all rows' mass, share of blocks computed).

    row_mass is each row's gradient mass: its absolute loss weight times 1 - p_y.
    """
    (num_v, T), H = sums.tile_sums.shape, weight.shape[1]
    tiny = torch.finfo(torch.float32).tiny
    share = sums.tile_sums / sums.other_sum.clamp(min=tiny)
    is_active = ~((share <= FILTER_EPS) | (row_mass <= FILTER_EPS * row_mass.mean()))  # NaN counts as active
    is_active = F.pad(is_active, (0, -T % LOSS_TILE.BLOCK_T)).view(num_v, -1, LOSS_TILE.BLOCK_T)
    active_blocks = is_active.any(-1).T.contiguous()  # [row blocks, vocabulary blocks]
    block_counts = active_blocks.sum(1, dtype=torch.int32)
    block_order = torch.argsort(active_blocks.int(), dim=1, descending=True, stable=True).int()
    product = torch.empty(T, H, dtype=torch.float32, device=weight.device)
    _sparse_gemm_kernel[(triton.cdiv(H, SPARSE_BLOCK_H), len(active_blocks))](
        TensorDescriptor.from_tensor(sums.e, [LOSS_TILE.BLOCK_T, SPARSE_BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [SPARSE_BLOCK_K, SPARSE_BLOCK_H]),
        product, block_order, block_counts, T, H, num_v, BLOCK_T=LOSS_TILE.BLOCK_T, BLOCK_V=LOSS_TILE.BLOCK_N,
        BLOCK_K=SPARSE_BLOCK_K, BLOCK_H=SPARSE_BLOCK_H, num_warps=8, num_stages=3,
    )  # fmt: skip
    row_block = torch.arange(T, device=share.device) // LOSS_TILE.BLOCK_T
    dropped_mass = row_mass @ (share * ~active_blocks.T[:, row_block]).sum(0)
    return product, dropped_mass / row_mass.sum().clamp(min=tiny), active_blocks.float().mean()


def _chunk_on_reference(x, weight, target, row_weight, exact, needs_x, needs_weight):
    """Return the same as `_chunk_on_triton`, in plain torch, which computes all blocks."""
    logits = matmul_fp32(x, weight.T)
    lse, target_column = logits.logsumexp(-1), target[:, None]
    # An infinite weight can make a logit -inf: 0 * (mean logit) turns that row into NaN.
    loss = row_weight * (lse - logits.gather(-1, target_column)[:, 0] + 0 * logits.mean(-1))
    dx = dw = None
    if needs_x or needs_weight:
        grad = logits.sub_(lse[:, None]).exp_().mul_(row_weight[:, None])
        grad.scatter_add_(-1, target_column, -row_weight[:, None])
        dx = matmul_fp32(grad, weight).to(x.dtype) if needs_x else None
        dw = matmul_fp32(grad.T, x) if needs_weight else None
    return loss, dx, dw, loss.new_zeros(()), loss.new_full((), len(x))


@torch.library.custom_op("thinksafe::linear_cross_entropy", mutates_args=())
@without_autocast
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, row_weight: Tensor, target: Tensor, exact: bool, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (weighted loss [T] fp32, dX, dW, [dropped mass, active share] fp32), see `loss_in_chunks` and `Stats`."""
    check_token_id_range("target", target, len(weight))
    compute_chunk, chunk_rows = _chunk_on_reference, REFERENCE_CHUNK_ROWS
    if on_tensor_cores(x):
        compute_chunk, chunk_rows = _chunk_on_triton, CHUNK_ROWS
        check_tma_alignment(x=x, weight=weight)
    *results, statistics = loss_in_chunks(
        x, weight, needs_x, needs_weight, chunk_rows,
        lambda rows: compute_chunk(x[rows], weight, target[rows], row_weight[rows], exact, needs_x, needs_weight),
    )  # fmt: skip
    if not statistics:
        return *results, torch.stack((row_weight.new_zeros(()), row_weight.new_ones(())))
    dropped_masses, active_rows = (torch.stack(figures) for figures in zip(*statistics, strict=True))
    return *results, torch.stack((dropped_masses.amax(), active_rows.sum() / len(x)))


@_linear_cross_entropy.register_fake
def _(x, weight, row_weight, target, exact, needs_x, needs_weight):
    return *allocate_loss(x, weight, needs_x, needs_weight), row_weight.new_empty(2)


register_backward("linear_cross_entropy", _linear_cross_entropy)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    exact: bool | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Return the cross-entropy of the logits X Wᵀ against targets, in nats; differentiable once in x and weight.

    Args:
        x: [T, H] hidden states, bf16 or fp32; a GPU computes fp32 in plain torch.
        weight: [V, H], weight matrix of the language-model head, contiguous, in the dtype of x. It gets a gradient,
            summed in fp32, only if it requires one.
        target: [T] int64 in [0, V).
        token_weight: [T] floating point, the loss weight of each row, a constant of any sign; None for 1.
        reduction: `none` returns the weighted loss of each row, `sum` their sum, and `mean` the sum divided by the sum
            of the absolute loss weights (0 for no rows).
        exact: True computes every block of the gradient; False lets a GPU skip blocks of dX whose share is at most
            FILTER_EPS. None means True if weight requires a gradient and False if not.
        return_stats: also return the `Stats` of the call.

    Returns:
        fp32: a scalar, or [T] for `none`. A row is NaN if its hidden state is not finite or if it reads an infinite or
        NaN weight; `first_bad_row` of chunked_loss.py finds the first such row.

    Raises:
        TypeError, ValueError: an argument is invalid. On a GPU a device-side assert checks the elements of tensors.
    """
    check_choice("reduction", reduction, "mean", "sum", "none")
    check_head(x, weight)
    check_tensor("target", target, x.shape[:1], torch.int64, x.device)
    row_weight = row_weights(token_weight, x)
    grad = torch.is_grad_enabled()
    needs_weight = grad and weight.requires_grad
    losses, _, _, stats = _linear_cross_entropy(
        x.contiguous(), weight, row_weight, target.contiguous(), needs_weight if exact is None else exact,
        grad and x.requires_grad, needs_weight,
    )  # fmt: skip
    loss = reduce_loss(losses, row_weight, reduction)
    return (loss, Stats(*stats.detach().unbind())) if return_stats else loss
