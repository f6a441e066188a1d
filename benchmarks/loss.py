"""Cross-entropy on the language-model head, forward and backward, at Qwen3's vocabulary and real hidden sizes.

The floor is 2 T V H FLOP a pass over the vocabulary: two passes with a frozen head, three where it trains. Data is both
peaked, as a trained model's, and random, since skipping blocks pays on the first alone; on random data a filter drops
what is all the gradient there is. Errors are of dX against fp64 on 64 rows.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, Sections, figures, measure, peer, relative_error
from benchmarks.shapes import head_case
from thinksafe.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with_stats

CLAIM = "Logits stay in registers; what is frozen or negligible is not computed."
CHECKED_ROWS, ROUNDS = 64, 5


def sections(notes: list[str]) -> Sections:
    """T = 8,192 and 32,768 with a frozen head, T = 8,192 with a trainable one."""
    notes.append(f"medians of {ROUNDS} calls, forward and backward; bf16; V = 151,936")
    losses = peers(notes)

    def case(T: int, hidden: int, trainable: bool) -> list[Row]:
        found = []
        for data in ("peaked", "random"):
            found += at(*head_case(T, hidden, data, "cuda"), data, trainable, losses, notes)
        return found

    return {
        f"T {T:,}, H {hidden:,}, {'trainable' if trainable else 'frozen'} head": partial(case, T, hidden, trainable)
        for T, trainable in ((8192, False), (32_768, False), (8192, True))
        for hidden in (2048, 1024, 4096)
    }


def peers(notes: list[str]) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Mean losses of (x, weight, target) by others, as far as they are installed."""
    losses = {"torch": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    if liger := peer("liger_kernel.transformers.functional", notes):
        losses["Liger-Kernel"] = liger.liger_fused_linear_cross_entropy
    if cce := peer("cut_cross_entropy", notes):
        losses["cut-cross-entropy"] = cce.linear_cross_entropy
        losses["cut-cross-entropy, no filter"] = lambda *args: cce.linear_cross_entropy(*args, filter_eps=None)
    if quack := peer("quack.linear_cross_entropy", notes):
        losses["QuACK"] = quack.chunked_linear_cross_entropy
    return losses


def eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.T).float(), target)


def at(x, weight, target, data, trainable, losses, notes) -> list[Row]:
    """One row a variant."""
    (T, H), V = x.shape, len(weight)
    x.requires_grad_(), weight.requires_grad_(trainable)
    ours = {"ThinkSafe": lambda *args: linear_cross_entropy(*args, ignore_index=None, exact=True)}
    if not trainable:
        ours["ThinkSafe, skipping"] = lambda *args: linear_cross_entropy(*args, ignore_index=None, exact=False)

    def step(loss):
        def work() -> None:
            x.grad = weight.grad = None
            loss(x, weight, target).backward()

        return work

    checked = torch.randperm(T, device=x.device)[:CHECKED_ROWS]
    exact, errors = _gradient_in_fp64(x[checked].detach(), weight.detach(), target[checked]), {}

    def check(name: str) -> None:
        errors[name] = relative_error(x.grad[checked] * T, exact)

    measured = measure({name: step(loss) for name, loss in (ours | losses).items()}, ROUNDS, notes, check)
    x.grad = weight.grad = None
    rows = []
    for name, found in measured.items():
        row = {"T": T, "H": H, "data": data, "head": "trainable" if trainable else "frozen", "variant": name}
        row |= figures(found, (3 if trainable else 2) * 2 * T * V * H) | {"error of dX": errors[name]}
        if name == "ThinkSafe, skipping":
            stats = linear_cross_entropy_with_stats(x, weight, target, ignore_index=None, exact=False)[1]
            row |= {"rho": stats.active_share.item(), "dropped mass": stats.dropped_mass.item()}
        rows.append(row)
    return rows


def _gradient_in_fp64(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Of each row's own loss."""
    x = x.double().requires_grad_()
    F.cross_entropy(x @ weight.double().T, target, reduction="sum").backward()
    return x.grad
