"""Cross-entropy and log-probabilities on the language-model head, at Qwen3's vocabulary and real hidden sizes.

The floor counts FLOP at 790 TFLOP/s bf16, the rate of a large cuBLAS product on an H200: 2 T V H a pass, one pass for
scoring, two for a loss with a frozen head, three where the head trains. Data is both peaked, as a trained model's, and
random, since skipping blocks pays on the first alone. Errors are of dX (of the log-probability where nothing has a
gradient) against fp64 on 64 rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Measured, Result, measure, peer, progress
from benchmarks.shapes import head_case
from thinksafe.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with_stats
from thinksafe.kernels.linear_logprob import linear_logprob

RATE = 790e12
_CHECKED_ROWS = 64


def run() -> Result:
    """T = 8,192 with frozen and trainable head, T = 32,768 with a frozen one."""
    if not torch.cuda.is_available():
        return Result("loss", "Needs a GPU: on a CPU both sides run plain torch, so nothing was measured.", [])
    rows, notes = [], ["medians of 5 calls, forward and backward; bf16; V = 151,936"]
    peers = {name: peer(name, notes) for name in ("liger_kernel.transformers.functional", "cut_cross_entropy")}
    peers["quack"] = peer("quack.linear_cross_entropy", notes)
    compiled = torch.compile(_eager)
    for T, heads in ((8192, (False, True)), (32_768, (False,))):
        for hidden in (1024, 2048, 4096):
            for data in ("peaked", "random"):
                for trainable in heads:
                    progress(f"loss: T {T:,}, H {hidden}, {data}, {'trainable' if trainable else 'frozen'} head")
                    rows += _at(*head_case(T, hidden, data, "cuda"), data, trainable, peers, compiled, notes)
    return Result("loss", "Logits stay in registers; what is frozen or negligible is not computed.", rows, notes)


def _eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.T).float(), target)


def _at(x, weight, target, data, trainable, peers, compiled, notes) -> list[dict]:
    (T, H), V = x.shape, len(weight)
    x.requires_grad_(), weight.requires_grad_(trainable)
    liger, cce, quack = peers.values()

    def training(loss):
        def work() -> None:
            x.grad = weight.grad = None
            loss().backward()

        return work

    losses = {
        "ThinkSafe": lambda: linear_cross_entropy(x, weight, target, ignore_index=None, exact=True),
        "torch": lambda: _eager(x, weight, target),
        "torch.compile": lambda: compiled(x, weight, target),
    }
    if not trainable:
        losses["ThinkSafe, skipping"] = lambda: linear_cross_entropy(x, weight, target, ignore_index=None, exact=False)
    if liger:
        losses["Liger-Kernel"] = lambda: liger.liger_fused_linear_cross_entropy(x, weight, target)
    if cce:
        losses["cut-cross-entropy"] = lambda: cce.linear_cross_entropy(x, weight, target)
        losses["cut-cross-entropy, exact"] = lambda: cce.linear_cross_entropy(x, weight, target, impl="cce_exact")
    if quack:
        losses["QuACK"] = lambda: quack.chunked_linear_cross_entropy(x, weight, target)
    variants = {name: training(loss) for name, loss in losses.items()}
    checked = torch.randperm(T, device=x.device)[:_CHECKED_ROWS]
    exact_gradient, exact_logprob = _in_fp64(x, weight, target, checked)
    errors = {}

    def check(name: str) -> None:
        errors[name] = relative_error(x.grad[checked].double() * T, exact_gradient)

    measured = measure(variants, 5, notes, check)
    x.grad = weight.grad = None
    common = {"T": T, "H": H, "data": data, "head": "trainable" if trainable else "frozen"}
    rows = []
    for name, found in measured.items():
        row = common | {"variant": name} | figures(found, (3 if trainable else 2) * 2 * T * V * H)
        row["error of dX"] = errors[name]
        if name == "ThinkSafe, skipping":
            stats = linear_cross_entropy_with_stats(x, weight, target, ignore_index=None, exact=False)[1]
            row |= {"rho": stats.active_share.item(), "dropped mass": stats.dropped_mass.item()}
        rows.append(row)
    if not trainable:
        rows += _scoring(x.detach(), weight, target, checked, exact_logprob, common, notes)
    return rows


def _scoring(x, weight, target, checked, exact, common, notes) -> list[dict]:
    """Log-probabilities of the targets, no gradients; torch needs [T, V] logits for it."""
    found = {}

    def ours() -> None:
        found["ThinkSafe, scoring"] = linear_logprob(x, weight, target).logprob

    @torch.no_grad()
    def eager() -> None:
        found["torch, scoring"] = -F.cross_entropy((x @ weight.T).float(), target, reduction="none")

    rows = []
    for name, taken in measure({"ThinkSafe, scoring": ours, "torch, scoring": eager}, 5, notes).items():
        error = (found[name][checked].double() - exact).abs().max().item()
        row = common | {"variant": name} | figures(taken, 2 * x.numel() * len(weight))
        rows.append(row | {"error of log p": error})
    return rows


def _in_fp64(x: Tensor, weight: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of each chosen row's own loss, its target's log-probability)."""
    weight = weight.detach().double()
    logprobs = (x[rows].detach().double() @ weight.T).log_softmax(-1)
    chosen = target[rows, None]
    grad = logprobs.exp().scatter_add(-1, chosen, torch.full_like(chosen, -1, dtype=torch.float64))
    return grad @ weight, logprobs.gather(-1, chosen)[:, 0]


def figures(found: Measured, flop: float) -> dict:
    """Time and memory beside the floor that the counted FLOP set."""
    return {
        "ms": 1e3 * found.seconds,
        "floor ms": 1e3 * flop / RATE,
        "share of the floor": flop / RATE / found.seconds,
        "TFLOP/s": flop / found.seconds / 1e12,
        "peak GB": found.peak_bytes / 1e9,
    }


def relative_error(found: Tensor, exact: Tensor) -> float:
    """In the 2-norm."""
    return ((found - exact).norm() / exact.norm()).item()
