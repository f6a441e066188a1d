"""Log-probabilities on the language-model head, no gradient, at Qwen3's vocabulary and real hidden sizes.

Of every token of a long response, with and without entropy and the most likely token: one pass, 2 T V H FLOP. And a
guard's verdict, two tokens at one position a prompt: below 184 rows that is bound by reading the head once, V H * 2
bytes, and the margin between the two needs no sum over the vocabulary at all. Errors are the largest ones of a
log-probability in nats against fp64, on 64 rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, Sections, figures, measure, peer
from benchmarks.shapes import head_case
from thinksafe.kernels.linear_logprob import linear_logprob, linear_logprob_of, linear_margin

CLAIM = "No logits in memory, and no sum that a verdict does not need."
CHECKED_ROWS, ROUNDS = 64, 5

Scores = dict[str, Callable[..., Any]]


def sections(notes: list[str]) -> Sections:
    """Responses of T = 8,192 tokens in all, and verdicts for 8 to 1,024 prompts."""
    notes.append(f"medians of {ROUNDS} calls; bf16; V = 151,936")
    peers = response_peers(notes)

    def case(hidden: int) -> list[Row]:
        found = []
        for data in ("peaked", "random"):
            x, weight, target = head_case(8192, hidden, data, "cuda")
            found += responses(x, weight, target, data, peers, notes)
            for prompts in (8, 128, 1024):
                found += verdicts(x[:prompts], weight, data, notes)
        return found

    return {f"H {hidden:,}": partial(case, hidden) for hidden in (2048, 4096, 1024)}


def response_peers(notes: list[str]) -> Scores:
    """Log-probabilities [T] of (x, weight, target) by others, as far as they are installed."""
    scores = {"torch": _eager, "torch.compile": torch.compile(_eager, dynamic=False)}
    if liger := peer("liger_kernel.transformers.functional", notes):
        scores["Liger-Kernel"] = lambda *args: -liger.liger_fused_linear_cross_entropy(*args, reduction="none")
    if cce := peer("cut_cross_entropy", notes):
        scores["cut-cross-entropy"] = lambda *args: -cce.linear_cross_entropy(*args, reduction="none")
    if quack := peer("quack.linear_cross_entropy", notes):
        # Its chunked form gives no single losses.
        scores["QuACK"] = lambda x, weight, target: (
            -quack.linear_cross_entropy_func(x, weight, None, target, reduction="none")
        )
    scores["torch, entropy and top-1"] = _eager_by_products
    scores["torch.compile, entropy and top-1"] = torch.compile(_eager_by_products, dynamic=False)
    return scores


def _eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy((x @ weight.T).float(), target, reduction="none")


def _eager_by_products(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logprobs = (x @ weight.T).float().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return torch.stack((logprobs.gather(-1, target[:, None])[:, 0], entropy, logprobs.argmax(-1)))[0]


def _eager_of(x: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return (x @ weight.T).float().log_softmax(-1).gather(-1, token_ids)


def responses(x, weight, target, data, peers: Scores, notes) -> list[Row]:
    """Every token of a response."""
    ours = {
        "ThinkSafe": lambda *args: linear_logprob(*args).logprob,
        "ThinkSafe, entropy and top-1": lambda *args: linear_logprob(*args, by_products=True).logprob,
    }
    flop = 2 * x.numel() * len(weight)
    return _rows("responses", ours | peers, x, weight, target, data, notes, flop, 0)


def verdicts(x, weight, data, notes) -> list[Row]:
    """Two tokens a row, which nobody else scores."""
    token_ids = torch.tensor([[3, 7]], device=x.device).expand(len(x), 2).contiguous()
    variants = {"ThinkSafe": linear_logprob_of, "torch": _eager_of}
    flop = 2 * x.numel() * len(weight)
    rows = _rows("verdicts", variants, x, weight, token_ids, data, notes, flop, weight.nbytes)
    margin = {
        "ThinkSafe, margin alone": lambda x, weight, ids: linear_margin(x, weight, 3, 7),
        "torch, margin alone": lambda x, weight, ids: (x @ weight[3] - x @ weight[7]).float(),
    }
    return rows + _rows("verdicts", margin, x, weight, token_ids, data, notes, 0, x.nbytes + 2 * weight[0].nbytes)


def _rows(what, variants, x, weight, token_ids, data, notes, flop, num_bytes) -> list[Row]:
    checked = torch.randperm(len(x), device=x.device)[:CHECKED_ROWS]
    logprobs = (x[checked].double() @ weight.double().T).log_softmax(-1)
    ids = token_ids[checked]
    exact = logprobs.gather(-1, ids if ids.dim() == 2 else ids[:, None]).squeeze(-1)
    found: dict[str, Tensor] = {}

    def call(name):
        @torch.no_grad()
        def work() -> None:
            found[name] = variants[name](x, weight, token_ids)

        return work

    rows = []
    for name, taken in measure({name: call(name) for name in variants}, ROUNDS, notes).items():
        wanted = exact[:, 0] - exact[:, 1] if "margin" in name else exact
        error = (found[name][checked].double() - wanted).abs().max().item()
        row = {"what": what, "T": len(x), "H": x.shape[1], "data": data, "variant": name}
        rows.append(row | figures(taken, flop, num_bytes) | {"largest error, nats": error})
    return rows
