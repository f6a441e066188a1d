"""KL from and to a reference on the language-model head, which is frozen and shared.

The suite measures forward and reverse KL on peaked and on random data. The student is close to the reference
(about 1e-3 nats), where bf16 logits give a gradient that is mostly rounding error, or far from it (several nats). Each
row has the time, the value, and the error of dX against fp64 on 64 rows.

The floor is three passes of 2 T V H FLOP.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Row, Sections, import_peer, measure, relative_error, timing_columns
from benchmarks.shapes import head_case
from thinksafe.kernels.linear_kl import linear_kl, reference

CLAIM = "Precise near the reference and far from it, with 4 bytes per pair of logits."
CHECKED_ROWS, TORCH_ROWS, ROUNDS = 64, 1024, 3
DIRECTIONS = {"forward": 0.0, "reverse": 1.0}
"""Direction -> `jsd_beta` of Liger-Kernel, whose generalized JSD is a KL at both ends."""

Losses = dict[str, Callable[[Tensor, Tensor, Tensor, str], Tensor]]
"""Variant -> function of (x, x_reference, weight, direction) that returns the mean KL in nats, a scalar."""


def sections(notes: list[str]) -> Sections:
    """Return the suite's sections: both directions at T = 8,192 and three hidden sizes, forward KL at T = 32,768.

    Args:
        notes: gets facts that a reader of the figures needs, and failures while a section is measured.
    """
    notes.append(f"medians of {ROUNDS} calls, forward and backward; bf16; V = 151,936; frozen head, shared")
    losses = peer_losses(notes)

    def measure_shape(T: int, hidden: int, direction: str, steps: tuple[float, ...]) -> list[Row]:
        rows = []
        for data in ("peaked", "random"):
            x, weight, _ = head_case(T, hidden, data, "cuda")
            for step in steps:
                rows += measure_case(x, weight, step, data, direction, losses, notes)
        return rows

    near_steps, far_steps, hidden_sizes = (0.004,), (0.03, 1.0), (2048, 1024, 4096)
    cases = [(8192, 2048, direction, near_steps + far_steps) for direction in DIRECTIONS]
    cases += [(32_768, hidden, "forward", near_steps) for hidden in hidden_sizes]
    cases += [(8192, hidden, direction, near_steps) for hidden in hidden_sizes[1:] for direction in DIRECTIONS]
    return {
        f"T {T:,}, H {hidden:,}, {direction}": partial(measure_shape, T, hidden, direction, steps)
        for T, hidden, direction, steps in cases
    }


def peer_losses(notes: list[str]) -> Losses:
    """Return the variants of torch and of the installed peers. Those of torch also run the backward pass.

    Args:
        notes: gets the peers that are not installed or cannot be imported.
    """
    compiled_eager = torch.compile(_eager, dynamic=False)

    def in_row_chunks(divergence):
        def loss(x: Tensor, x_reference: Tensor, weight: Tensor, direction: str) -> Tensor:
            """Return the mean KL, detached, after its backward pass in chunks of rows.

            All at once, two fp32 copies of the logits would take 40 GB at T = 32k.
            """
            loss_sum = 0.0
            for start in range(0, len(x), TORCH_ROWS):
                rows = slice(start, start + TORCH_ROWS)
                chunk_loss = divergence(x[rows], x_reference[rows], weight, direction).sum() / len(x)
                chunk_loss.backward()
                loss_sum = loss_sum + chunk_loss.detach()
            return loss_sum

        return loss

    losses = {
        "torch, 1,024 rows a part": in_row_chunks(_eager),
        "torch.compile, 1,024 rows a part": in_row_chunks(compiled_eager),
    }
    if liger := import_peer("liger_kernel.transformers.functional", notes):
        losses["Liger-Kernel"] = lambda x, x_reference, weight, direction: liger.liger_fused_linear_jsd(
            x, weight, x_reference, weight, jsd_beta=DIRECTIONS[direction]
        )
    return losses


def _eager(x: Tensor, x_reference: Tensor, weight: Tensor, direction: str) -> Tensor:
    log_p_student = (x @ weight.T).float().log_softmax(-1)
    log_p_reference = (x_reference @ weight.T).float().log_softmax(-1)
    if direction == "forward":
        return (log_p_reference.exp() * (log_p_reference - log_p_student)).sum(-1)
    return (log_p_student.exp() * (log_p_student - log_p_reference)).sum(-1)


def measure_case(x_reference, weight, step, data, direction, losses: Losses, notes) -> list[Row]:
    """Return time, value and error of dX on one case: one row per variant that did not fail.

    Args:
        x_reference: [T, H] hidden states of the reference.
        weight: [V, H], weight matrix of the language-model head of both models.
        step: standard deviation of the noise that is added to x_reference to get the student's hidden states.
        data: kind of data, a column of the rows only.
        direction: `forward` or `reverse`.
        losses: variants of torch and of peers; ThinkSafe is added.
        notes: gets failures.
    """
    (T, H), V = x_reference.shape, len(weight)
    x = (x_reference.float() + step * torch.randn_like(x_reference, dtype=torch.float32)).to(x_reference.dtype)
    x.requires_grad_()
    thinksafe_losses = {
        "ThinkSafe": lambda x, x_reference, weight, direction: linear_kl(x, x_reference, weight, None, direction)
    }
    variants, values = thinksafe_losses | losses, {}

    def forward_backward(name):
        def call() -> None:
            x.grad = None
            value = variants[name](x, x_reference, weight, direction)
            values[name] = value.detach()
            if value.requires_grad:
                value.backward()

        return call

    checked_rows = torch.randperm(T, device=x.device)[:CHECKED_ROWS]
    x_checked = x[checked_rows].detach().double().requires_grad_()
    exact = reference(x_checked, x_reference[checked_rows].double(), weight.double(), direction=direction)
    exact.sum().backward()
    errors = {}

    def record_error(name: str) -> None:
        errors[name] = relative_error(x.grad[checked_rows] * T, x_checked.grad)

    rows = []
    for name, measurement in measure(
        {name: forward_backward(name) for name in variants}, ROUNDS, notes, record_error
    ).items():
        row = {"T": T, "H": H, "data": data, "direction": direction, "nats": exact.mean().item(), "variant": name}
        row |= timing_columns(measurement, 3 * 2 * T * V * H)
        rows.append(row | {"value": values[name].item(), "error of dX": errors[name]})
    return rows
