"""Sampling of tokens against the same with sorting, and against transformers' logits processors.

Sorting samples the same tokens, bit for bit: with top-k it selects from integer keys of all tokens, which order ties
too; without top-k it sorts every token. transformers samples from the same distribution with another random number
generator. The logits are normal with a standard deviation of 2, at temperature 0.6.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from benchmarks.harness import Row, Sections, add_speedups, measure
from thinksafe.kernels.sampling import exponential_noise, sample

CLAIM = "Sampling from a large vocabulary sorts almost nothing."
_CASES = {
    "Qwen3, top-k": (151_936, 200, 20),
    "Qwen3, top-p alone": (151_936, 200, 0),
    "Qwen3, one row, top-k": (151_936, 1, 20),
    "Qwen3, one row, top-p alone": (151_936, 1, 0),
    "Mistral, top-p alone": (32_768, 32, 0),
    "model organism": (135, 64, 0),
}
"""Name -> vocabulary, rows, top_k. All have a top_p of 0.95."""


def sections(notes: list[str]) -> Sections:
    """Return a section for each case.

    Args:
        notes: gets failures while a section is measured.
    """
    return {name: partial(_measure_case, name, notes) for name in _CASES}


def sample_by_sorting(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the result of `thinksafe.kernels.sampling.sample` from candidates in descending order."""
    vocab_size = logits.shape[-1]
    max_logit, greedy_id = logits.max(-1)
    is_broken = ~torch.isfinite(max_logit)
    logits = logits.masked_fill(is_broken[:, None], 0.0)
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    if has_top_k.all() and len(logits):
        bits = (logits + 0.0).view(torch.int32)
        keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() * 2**32
        keys += torch.arange(vocab_size - 1, -1, -1, device=logits.device)  # of equal logits the smaller id first
        token_ids = vocab_size - 1 - (keys.topk(int(top_k.max()), sorted=True).values & 0xFFFFFFFF)
        candidates = logits.gather(-1, token_ids)
    else:
        candidates, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(candidates.shape[-1], device=logits.device)
    is_outside = has_top_k[:, None] & (rank >= top_k[:, None])
    weights = ((candidates - candidates[:, :1]) / torch.where(temperature == 0, 1.0, temperature)[:, None]).exp()
    masses = (weights * 2.0**40).round().long().masked_fill(is_outside, 0)
    target_mass = (top_p.double() * masses.sum(-1).double()).ceil().long()
    is_outside |= (top_p < 1)[:, None] & (masses.cumsum(-1) - masses >= target_mass[:, None])
    race_times = (exponential_noise(seed, position, token_ids) / weights).masked_fill(is_outside, torch.inf)
    sampled = token_ids.gather(-1, race_times.argmin(-1, keepdim=True))[:, 0]
    sampled = torch.where(temperature == 0, greedy_id, sampled)
    shifted_logits = logits - logits.amax(-1, keepdim=True)
    logprob = shifted_logits.gather(-1, sampled[:, None])[:, 0] - shifted_logits.logsumexp(-1)
    return sampled.masked_fill(is_broken, -1), logprob.masked_fill(is_broken, torch.nan)


def _transformers_sampling(temperature: float, top_k: int, top_p: float) -> Callable[[Tensor], Tensor]:
    """Return a function from logits to tokens, with the steps of `generate`."""
    processors = [TemperatureLogitsWarper(temperature), *([TopKLogitsWarper(top_k)] if top_k else [])]
    processors.append(TopPLogitsWarper(top_p))

    def sample_tokens(logits: Tensor) -> Tensor:
        for process in processors:
            logits = process(None, logits)
        return torch.multinomial(logits.softmax(-1), 1)

    return sample_tokens


def _measure_case(name: str, notes: list[str]) -> list[Row]:
    """Return a row for each variant that did not fail."""
    vocab_size, num_rows, k = _CASES[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = 2 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)).to(device)
    temperature, top_p = (torch.full((num_rows,), value, device=device) for value in (0.6, 0.95))
    row_numbers = torch.arange(num_rows, device=device)
    settings = (temperature, torch.full_like(row_numbers, k), top_p, row_numbers, row_numbers)
    variants = {
        "ThinkSafe": lambda: sample(logits, *settings),
        "with sorting": lambda: sample_by_sorting(logits, *settings),
        "transformers": partial(_transformers_sampling(0.6, k, 0.95), logits),
    }
    calls = 1 if logits.numel() > 1e6 else 20  # per timed round
    repeated = {variant: partial(_repeat, call, calls) for variant, call in variants.items()}
    rows = [
        {"case": name, "vocabulary": vocab_size, "rows": num_rows, "top_k": k, "variant": variant}
        | {"ms": 1e3 * measurement.seconds / calls, "rows/s": calls * num_rows / measurement.seconds}
        for variant, measurement in measure(repeated, 5, notes).items()
    ]
    add_speedups(rows, "rows/s")
    return rows


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()
