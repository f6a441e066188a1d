"""Kernels on the language-model head against plain torch, at Qwen3's vocabulary and real hidden sizes.

The floor counts FLOP at 790 TFLOP/s bf16, the rate of a large cuBLAS product on an H200: 2 T V H a pass. Data is both
peaked, as a trained model's, and random, since skipping blocks pays on the first alone. A GPU is needed: on a CPU the
reference runs on both sides.
"""

import statistics

import torch
import torch.nn.functional as F

from benchmarks.harness import Result, interleaved
from thinksafe.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with_stats
from thinksafe.kernels.linear_kl import linear_kl
from thinksafe.kernels.linear_logprob import linear_logprob

_V, _RATE = 151_936, 790e12


def run() -> Result:
    """Measure every operation at T = 8,192."""
    if not torch.cuda.is_available():
        return Result("loss", "Needs a GPU; nothing was measured.", [])
    rows = []
    for hidden in (1024, 2048, 4096):
        for data in ("peaked", "random"):
            rows += _at(8192, hidden, data)
    return Result(
        "loss", "Logits stay in registers.", rows, [f"V = {_V:,}, bf16, T = 8,192, frozen head, medians of 5"]
    )


def _at(T: int, H: int, data: str) -> list[dict]:
    weight = torch.randn(_V, H, device="cuda", dtype=torch.bfloat16) / H**0.5
    target = torch.randint(_V, (T,), device="cuda")
    noise = torch.randn(T, H, device="cuda")
    x = (noise + 12 * H**0.5 * weight[target].float() if data == "peaked" else noise).bfloat16().requires_grad_()
    near = (x.detach().float() + 0.02 * torch.randn(T, H, device="cuda")).bfloat16()

    def backward(loss: torch.Tensor) -> None:
        x.grad = None
        loss.backward()

    def torch_kl() -> None:
        for part in range(0, T, 1024):  # in one piece two fp32 copies of the logits would take 20 GB
            chosen = slice(part, part + 1024)
            student = (x[chosen] @ weight.T).float().log_softmax(-1)
            other = (near[chosen] @ weight.T).float().log_softmax(-1)
            backward(F.kl_div(student, other, log_target=True, reduction="sum"))

    variants = {
        "linear_logprob": (1, lambda: linear_logprob(x.detach(), weight, target)),
        "linear_cross_entropy exact": (2, lambda: backward(_ours(x, weight, target, True))),
        "linear_cross_entropy": (2, lambda: backward(_ours(x, weight, target, False))),
        "torch cross_entropy": (2, lambda: backward(F.cross_entropy((x @ weight.T).float(), target))),
        "linear_kl": (3, lambda: backward(linear_kl(x, near, weight))),
        "torch kl_div, chunks of 1,024": (3, torch_kl),
    }
    times = interleaved({name: work for name, (_, work) in variants.items()}, rounds=5)
    active = linear_cross_entropy_with_stats(x, weight, target, ignore_index=None, exact=False)[1].active_share.item()
    rows = []
    for name, (passes, _) in variants.items():
        floor = passes * 2 * T * _V * H / _RATE
        seconds = statistics.median(times[name])
        row = {"H": H, "data": data, "variant": name, "ms": 1e3 * seconds, "floor ms": 1e3 * floor}
        row |= {"share of the floor": floor / seconds, "TFLOP/s": passes * 2 * T * _V * H / seconds / 1e12}
        rows.append(row | ({"blocks computed": active} if name == "linear_cross_entropy" else {}))
    return rows


def _ours(x, weight, target, exact: bool) -> torch.Tensor:
    return linear_cross_entropy(x, weight, target, ignore_index=None, exact=exact)
