"""Divergences from a reference on the language-model head, frozen and shared: three passes of 2 T V H FLOP at least.

Forward KL, reverse KL and JSD, on peaked and on random data. The student is a small step away from the reference (about
1e-3 nats), where bf16 logits leave a gradient that is mostly rounding, or far away from it (some nats): the errors of
value and of dX against fp64 on 64 rows stand beside the time.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Row, Sections, figures, measure, peer, relative_error
from benchmarks.shapes import head_case
from thinksafe.kernels.linear_kl import linear_kl, reference

CLAIM = "Precise near the reference and far from it, in 4 bytes a pair."
CHECKED_ROWS, TORCH_ROWS, ROUNDS = 64, 1024, 3
DIRECTIONS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}
"""Direction -> Liger-Kernel's beta."""

Losses = dict[str, Callable[[Tensor, Tensor, Tensor, str], Tensor]]


def sections(notes: list[str]) -> Sections:
    """All directions at T = 8,192 and three hidden sizes, forward KL at T = 32,768."""
    notes.append(f"medians of {ROUNDS} calls, forward and backward; bf16; V = 151,936; frozen head, shared")
    losses = peers(notes)

    def case(T: int, hidden: int, direction: str, steps: tuple[float, ...]) -> list[Row]:
        found = []
        for data in ("peaked", "random"):
            x, weight, _ = head_case(T, hidden, data, "cuda")
            for step in steps:
                found += at(x, weight, step, data, direction, losses, notes)
        return found

    near, far, wide = (0.004,), (0.03, 1.0), (2048, 1024, 4096)
    cases = [(8192, 2048, direction, near + far) for direction in ("jsd", "forward", "reverse")]
    cases += [(32_768, hidden, "forward", near) for hidden in wide]
    cases += [(8192, hidden, direction, near) for hidden in wide[1:] for direction in DIRECTIONS]
    return {
        f"T {T:,}, H {hidden:,}, {direction}": partial(case, T, hidden, direction, steps)
        for T, hidden, direction, steps in cases
    }


def peers(notes: list[str]) -> Losses:
    """Mean divergences of (x, x_reference, weight, direction) by others, as far as they are installed."""
    compiled = torch.compile(_eager, dynamic=False)

    def chunks(divergence):
        def loss(x: Tensor, x_reference: Tensor, weight: Tensor, direction: str) -> Tensor:
            """Backward in parts: in one piece two fp32 copies of the logits would take 40 GB at T = 32k."""
            total = 0.0
            for start in range(0, len(x), TORCH_ROWS):
                rows = slice(start, start + TORCH_ROWS)
                part = divergence(x[rows], x_reference[rows], weight, direction).sum() / len(x)
                part.backward()
                total = total + part.detach()
            return total

        return loss

    losses = {"torch, 1,024 rows a part": chunks(_eager), "torch.compile, 1,024 rows a part": chunks(compiled)}
    if liger := peer("liger_kernel.transformers.functional", notes):
        losses["Liger-Kernel"] = lambda x, x_reference, weight, direction: liger.liger_fused_linear_jsd(
            x, weight, x_reference, weight, jsd_beta=DIRECTIONS[direction]
        )
    return losses


def _eager(x: Tensor, x_reference: Tensor, weight: Tensor, direction: str) -> Tensor:
    student, other = (x @ weight.T).float().log_softmax(-1), (x_reference @ weight.T).float().log_softmax(-1)
    if direction == "forward":
        return (other.exp() * (other - student)).sum(-1)
    if direction == "reverse":
        return (student.exp() * (student - other)).sum(-1)
    middle = torch.logaddexp(student, other) - 0.6931471805599453
    return 0.5 * (other.exp() * (other - middle) + student.exp() * (student - middle)).sum(-1)


def at(x_reference, weight, step, data, direction, losses: Losses, notes) -> list[Row]:
    """One row a variant."""
    (T, H), V = x_reference.shape, len(weight)
    x = (x_reference.float() + step * torch.randn_like(x_reference, dtype=torch.float32)).to(x_reference.dtype)
    x.requires_grad_()
    ours = {"ThinkSafe": lambda x, other, weight, direction: linear_kl(x, other, weight, None, direction)}
    variants, values = ours | losses, {}

    def call(name):
        def work() -> None:
            x.grad = None
            value = variants[name](x, x_reference, weight, direction)
            values[name] = value.detach()
            if value.requires_grad:
                value.backward()

        return work

    checked = torch.randperm(T, device=x.device)[:CHECKED_ROWS]
    leaf = x[checked].detach().double().requires_grad_()
    exact = reference(leaf, x_reference[checked].double(), weight.double(), direction=direction)
    exact.sum().backward()
    errors = {}

    def check(name: str) -> None:
        errors[name] = relative_error(x.grad[checked] * T, leaf.grad)

    rows = []
    for name, found in measure({name: call(name) for name in variants}, ROUNDS, notes, check).items():
        row = {"T": T, "H": H, "data": data, "direction": direction, "nats": exact.mean().item(), "variant": name}
        row |= figures(found, 3 * 2 * T * V * H)
        rows.append(row | {"value": values[name].item(), "error of dX": errors[name]})
    return rows
