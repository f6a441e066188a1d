"""Cross-entropy on the language-model head, forward and backward, at Qwen3's vocabulary and real hidden sizes.

The floor is 2 T V H FLOP per pass over the vocabulary: two passes with a frozen head, three with a trainable one. Data
is peaked, like that of a trained model, or random, because skipping blocks helps only on peaked data. On random data
all of the gradient is in small elements, and a filter drops it. The error is that of dX against fp64 on 64 rows.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, Sections, import_peer, measure, relative_error, timing_columns
from benchmarks.shapes import head_case
from thinksafe.kernels.linear_cross_entropy import linear_cross_entropy

CLAIM = "Logits stay in registers; frozen and negligible gradients are not computed."
CHECKED_ROWS, ROUNDS = 64, 5


def sections(notes: list[str]) -> Sections:
    """Return the suite's sections: T = 8,192 and 32,768 with a frozen head, T = 8,192 with a trainable one.

    Args:
        notes: gets facts that a reader of the figures needs, and failures while a section is measured.
    """
    notes.append(f"medians of {ROUNDS} calls, forward and backward; bf16; V = 151,936")
    losses = peer_losses(notes)

    def measure_shape(T: int, hidden: int, trainable: bool) -> list[Row]:
        rows = []
        for data in ("peaked", "random"):
            rows += measure_case(*head_case(T, hidden, data, "cuda"), data, trainable, losses, notes)
        return rows

    return {
        f"T {T:,}, H {hidden:,}, {'trainable' if trainable else 'frozen'} head": partial(
            measure_shape, T, hidden, trainable
        )
        for T, trainable in ((8192, False), (32_768, False), (8192, True))
        for hidden in (2048, 1024, 4096)
    }


def peer_losses(notes: list[str]) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Return variant -> function of (x, weight, target) that returns the mean loss, for torch and the installed peers.

    Args:
        notes: gets the peers that are not installed or cannot be imported.
    """
    losses = {"torch": eager_loss, "torch.compile": torch.compile(eager_loss, dynamic=False)}
    if liger := import_peer("liger_kernel.transformers.functional", notes):
        losses["Liger-Kernel"] = liger.liger_fused_linear_cross_entropy
    if cce := import_peer("cut_cross_entropy", notes):
        losses["cut-cross-entropy"] = cce.linear_cross_entropy
        losses["cut-cross-entropy, no filter"] = lambda *args: cce.linear_cross_entropy(*args, filter_eps=None)
    if quack := import_peer("quack.linear_cross_entropy", notes):
        losses["QuACK"] = quack.chunked_linear_cross_entropy
    return losses


def eager_loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy of the logits x Wᵀ against target [T], a scalar, in plain torch."""
    return F.cross_entropy((x @ weight.T).float(), target)


def measure_case(x, weight, target, data, trainable, losses, notes) -> list[Row]:
    """Return time of forward and backward, and error of dX, on one case: one row per variant that did not fail.

    Args:
        x, weight, target: hidden states [T, H], weight matrix of the language-model head [V, H], target ids [T].
        data: kind of data, a column of the rows only.
        trainable: whether the head gets a gradient.
        losses: variants of torch and of peers; those of ThinkSafe are added.
        notes: gets failures.
    """
    (T, H), V = x.shape, len(weight)
    x.requires_grad_(), weight.requires_grad_(trainable)
    thinksafe_losses = {"ThinkSafe": lambda *args: linear_cross_entropy(*args, exact=True)}
    if not trainable:
        thinksafe_losses["ThinkSafe, skipping"] = lambda *args: linear_cross_entropy(*args, exact=False)

    def forward_backward(loss):
        def call() -> None:
            x.grad = weight.grad = None
            loss(x, weight, target).backward()

        return call

    checked_rows = torch.randperm(T, device=x.device)[:CHECKED_ROWS]
    exact_grad, errors = _fp64_gradient(x[checked_rows].detach(), weight.detach(), target[checked_rows]), {}

    def record_error(name: str) -> None:
        errors[name] = relative_error(x.grad[checked_rows] * T, exact_grad)

    measurements = measure(
        {name: forward_backward(loss) for name, loss in (thinksafe_losses | losses).items()},
        ROUNDS,
        notes,
        record_error,
    )
    x.grad = weight.grad = None
    rows = []
    for name, measurement in measurements.items():
        row = {"T": T, "H": H, "data": data, "head": "trainable" if trainable else "frozen", "variant": name}
        row |= timing_columns(measurement, (3 if trainable else 2) * 2 * T * V * H) | {"error of dX": errors[name]}
        if name == "ThinkSafe, skipping":
            _, stats = linear_cross_entropy(x, weight, target, exact=False, return_stats=True)
            row |= {"rho": stats.active_share.item(), "dropped mass": stats.dropped_mass.item()}
        rows.append(row)
    return rows


def _fp64_gradient(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of the sum of the rows' losses with respect to x, [T, H] fp64."""
    x = x.double().requires_grad_()
    F.cross_entropy(x @ weight.double().T, target, reduction="sum").backward()
    return x.grad
