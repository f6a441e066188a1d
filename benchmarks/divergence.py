"""Forward KL from a reference on the language-model head, frozen and shared: three passes of 2 T V H FLOP at least.

Data is peaked and random; the student is a small step away from the reference (about 1e-3 nats), where bf16 logits
leave a gradient that is mostly rounding: the error of dX against fp64 on 64 rows stands beside the time.
"""

import torch
import torch.nn.functional as F

from benchmarks.harness import Result, measure, peer, progress
from benchmarks.loss import figures, relative_error
from benchmarks.shapes import head_case
from thinksafe.kernels.linear_kl import linear_kl, reference

_CHECKED_ROWS = 64


def run() -> Result:
    """T = 8,192 and 32,768 at three hidden sizes."""
    if not torch.cuda.is_available():
        return Result("divergence", "Needs a GPU: on a CPU both sides run plain torch, so nothing was measured.", [])
    rows, notes = [], ["medians of 3 calls, forward and backward; bf16; V = 151,936; frozen head, shared"]
    liger = peer("liger_kernel.transformers.functional", notes)
    for T in (8192, 32_768):
        for hidden in (1024, 2048, 4096):
            for data in ("peaked", "random"):
                progress(f"divergence: T {T:,}, H {hidden}, {data}")
                rows += _at(*head_case(T, hidden, data, "cuda")[:2], data, liger, notes)
    return Result("divergence", "Exact where student and reference are near, and 4 bytes a logit pair.", rows, notes)


def _at(x_reference, weight, data, liger, notes) -> list[dict]:
    (T, H), V = x_reference.shape, len(weight)
    x = (x_reference.float() + 0.03 * torch.randn_like(x_reference, dtype=torch.float32)).bfloat16().requires_grad_()

    def ours() -> None:
        x.grad = None
        linear_kl(x, x_reference, weight).backward()

    def eager() -> None:
        x.grad = None
        for part in range(0, T, 1024):  # in one piece two fp32 copies of the logits would take 40 GB at T = 32k
            rows = slice(part, part + 1024)
            student = (x[rows] @ weight.T).float().log_softmax(-1)
            other = (x_reference[rows] @ weight.T).float().log_softmax(-1)
            (F.kl_div(student, other, log_target=True, reduction="sum") / T).backward()

    def liger_forward_kl() -> None:
        x.grad = None
        liger.liger_fused_linear_jsd(x, weight, x_reference, weight, jsd_beta=0.0).backward()

    checked = torch.randperm(T, device=x.device)[:_CHECKED_ROWS]
    leaf = x[checked].detach().double().requires_grad_()
    divergence = reference(leaf, x_reference[checked].double(), weight.double())
    divergence.sum().backward()
    errors = {}

    def check(name: str) -> None:
        errors[name] = relative_error(x.grad[checked].double() * T, leaf.grad)

    variants = {"ThinkSafe": ours, "torch, chunks of 1,024": eager}
    if liger:
        variants["Liger-Kernel JSD, beta 0"] = liger_forward_kl
    return [
        {"T": T, "H": H, "data": data, "variant": name, "KL": divergence.mean().item()}
        | figures(found, 3 * 2 * T * V * H)
        | {"error of dX": errors[name]}
        for name, found in measure(variants, 3, notes, check).items()
    ]
