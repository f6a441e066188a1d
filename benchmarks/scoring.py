"""Log-probabilities on the language-model head, without gradient, at Qwen3's vocabulary and real hidden sizes.

Responses: the log-probability of every token, with and without entropy and top-1. The floor is one pass, 2 T V H FLOP.
Verdicts: a guard's two tokens at one position per prompt. Below 184 rows the floor is reading the head once, V H * 2
bytes. The error is the largest one of a log-probability in nats against fp64, on 64 rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, Sections, import_peer, measure, timing_columns
from benchmarks.shapes import head_case
from thinksafe.kernels.linear_logprob import linear_logprob, linear_logprob_of

CLAIM = "No logits in memory, and one sum over the vocabulary for all tokens of a verdict."
CHECKED_ROWS, ROUNDS = 64, 5

Scores = dict[str, Callable[..., Any]]
"""Variant -> function of (x, weight, target) that returns the log-probability of each row's target, [T]."""


def sections(notes: list[str]) -> Sections:
    """Return the suite's sections, one per hidden size: responses of 8,192 tokens, verdicts for 8 to 1,024 prompts.

    Args:
        notes: gets facts that a reader of the figures needs, and failures while a section is measured.
    """
    notes.append(f"medians of {ROUNDS} calls; bf16; V = 151,936")
    scores = peer_scores(notes)

    def measure_hidden_size(hidden: int) -> list[Row]:
        rows = []
        for data in ("peaked", "random"):
            x, weight, target = head_case(8192, hidden, data, "cuda")
            rows += measure_responses(x, weight, target, data, scores, notes)
            for prompts in (8, 128, 1024):
                rows += measure_verdicts(x[:prompts], weight, data, notes)
        return rows

    return {f"H {hidden:,}": partial(measure_hidden_size, hidden) for hidden in (2048, 4096, 1024)}


def peer_scores(notes: list[str]) -> Scores:
    """Return functions that compute the log-probabilities of target tokens: torch's, torch.compile's and those of the
    installed peers.

    Args:
        notes: gets the peers that are not installed or cannot be imported.
    """
    scores = {"torch": _eager, "torch.compile": torch.compile(_eager, dynamic=False)}
    if liger := import_peer("liger_kernel.transformers.functional", notes):
        scores["Liger-Kernel"] = lambda *args: -liger.liger_fused_linear_cross_entropy(*args, reduction="none")
    if cce := import_peer("cut_cross_entropy", notes):
        scores["cut-cross-entropy"] = lambda *args: -cce.linear_cross_entropy(*args, reduction="none")
    if quack := import_peer("quack.linear_cross_entropy", notes):
        # The chunked form of QuACK returns no per-row losses.
        scores["QuACK"] = lambda x, weight, target: (
            -quack.linear_cross_entropy_func(x, weight, None, target, reduction="none")
        )
    scores["torch, entropy and top-1"] = _eager_with_entropy_and_top1
    scores["torch.compile, entropy and top-1"] = torch.compile(_eager_with_entropy_and_top1, dynamic=False)
    return scores


def _eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy((x @ weight.T).float(), target, reduction="none")


def _eager_with_entropy_and_top1(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logprobs = (x @ weight.T).float().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return torch.stack((logprobs.gather(-1, target[:, None])[:, 0], entropy, logprobs.argmax(-1)))[0]


def _eager_of(x: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return (x @ weight.T).float().log_softmax(-1).gather(-1, token_ids)


def measure_responses(x, weight, target, data, peers: Scores, notes) -> list[Row]:
    """Return time and error of the log-probabilities of all response tokens: one row per variant that did not fail.

    Args:
        x, weight, target: hidden states [T, H], weight matrix of the language-model head [V, H], target ids [T].
        data: kind of data, a column of the rows only.
        peers: variants of torch and of peers; those of ThinkSafe are added.
        notes: gets failures.
    """
    thinksafe_scores = {
        "ThinkSafe": lambda x, weight, target: linear_logprob_of(x, weight, target[:, None])[:, 0],
        "ThinkSafe, entropy and top-1": lambda *args: linear_logprob(*args).logprob,
    }
    flop = 2 * x.numel() * len(weight)
    return _measure_variants("responses", thinksafe_scores | peers, x, weight, target, data, notes, flop, 0)


def measure_verdicts(x, weight, data, notes) -> list[Row]:
    """Return time and error of the log-probabilities of two tokens per row.

    Args:
        x: [T, H] hidden states, one row per prompt.
        weight: [V, H], weight matrix of the language-model head.
        data: kind of data, a column of the rows only.
        notes: gets failures.

    Returns:
        One row per variant that did not fail; the variants are ThinkSafe and torch, because no peer scores two tokens.
    """
    token_ids = torch.tensor([[3, 7]], device=x.device).expand(len(x), 2).contiguous()
    variants = {"ThinkSafe": linear_logprob_of, "torch": _eager_of}
    flop = 2 * x.numel() * len(weight)
    return _measure_variants("verdicts", variants, x, weight, token_ids, data, notes, flop, weight.nbytes)


def _measure_variants(task, variants, x, weight, token_ids, data, notes, flop, num_bytes) -> list[Row]:
    checked_rows = torch.randperm(len(x), device=x.device)[:CHECKED_ROWS]
    logprobs = (x[checked_rows].double() @ weight.double().T).log_softmax(-1)
    ids = token_ids[checked_rows]
    exact = logprobs.gather(-1, ids if ids.dim() == 2 else ids[:, None]).squeeze(-1)
    outputs: dict[str, Tensor] = {}

    def score(name):
        @torch.no_grad()
        def call() -> None:
            outputs[name] = variants[name](x, weight, token_ids)

        return call

    rows = []
    for name, measurement in measure({name: score(name) for name in variants}, ROUNDS, notes).items():
        error = (outputs[name][checked_rows].double() - exact).abs().max().item()
        row = {"what": task, "T": len(x), "H": x.shape[1], "data": data, "variant": name}
        rows.append(row | timing_columns(measurement, flop, num_bytes) | {"largest error, nats": error})
    return rows
