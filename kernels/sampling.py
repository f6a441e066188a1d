"""Sampling of the next token: temperature, top-k, renormalization, top-p, then an exponential race.

The race picks the argmin over candidates of E_id / p_id with E_id ~ Exp(1), so token id wins with probability p_id
exactly. E_id is a hash of (seed, position, token id). A draw therefore depends on its own request only, not on the
batch and not on the order of the candidates, and a rounding error in the logits changes few draws.

Top-p adds up probabilities as integers, in units of 2^-40 of the weight of the most likely token. An integer sum has
the same value in every order of addition. On a GPU csrc/sampling.cu computes the same without sorting; it reads the
logits once.
"""

from ctypes import CDLL

import torch
from torch import Tensor

from thinksafe.kernels.cuda_library import load_library

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, odd, as a signed 64-bit integer
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64  # multipliers of splitmix64's finalizer
_MASS_UNITS = 2.0**40
MAX_VOCAB_SIZE = 2**22
"""Largest vocabulary: the CUDA kernel breaks ties by 22 bits of the token id."""


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Return int64 x shifted right by 1 to 63 bits and filled with zeros; torch's `>>` fills with the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """Return splitmix64's finalizer, a 64-bit hash, of each int64 element; the multiplications wrap."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def exponential_noise(seed: Tensor, position: Tensor, token_ids: Tensor) -> Tensor:
    """Return Exp(1) variates [B, K] fp32; element [b, k] is a pure function of seed[b], position[b], token_ids[b, k].

    They are positive and finite, made of 40 random bits. Among 150,000 equally likely tokens the smallest variate is
    about 7e-6: from 24 bits it would be one of about a hundred values, and ties would decide the race."""
    row_key = splitmix64(splitmix64(seed + _GOLDEN) + position * _GOLDEN)
    bits = _shift_right(splitmix64(row_key[:, None] + (token_ids + 1) * _GOLDEN), 24)
    uniform = ((bits.float() + 0.5) / _MASS_UNITS).clamp(max=1 - 2.0**-24)  # 1 would be infinite noise
    return -torch.log1p(-uniform)


def _top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits of each row in descending order, and their ids; of equal logits the smaller id first.

    `torch.topk` does not promise this order. With logits rounded to bf16 every fifth row has a tie at k = 20, so its
    result would depend on k, and so on the batch."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0 into 0
    sortable = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()  # integers that sort like the floats
    last_id = logits.shape[-1] - 1
    sort_keys = (sortable * 2**32 + torch.arange(last_id, -1, -1, device=logits.device)).topk(k, sorted=True).values
    token_ids = last_id - (sort_keys & 0xFFFFFFFF)
    return logits.gather(-1, token_ids), token_ids


def reference(logits, temperature, top_k, top_p, seed, position) -> tuple[Tensor, Tensor]:
    """Return the result of `sample` in plain torch; its arguments are not checked."""
    vocab_size = logits.shape[-1]
    max_logit, greedy_id = logits.max(-1)
    is_broken = ~torch.isfinite(max_logit)  # the maximum of a row with NaN is NaN
    logits = logits.masked_fill(is_broken[:, None], 0.0)
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    if has_top_k.all() and len(logits):
        candidates, token_ids = _top_k(logits, int(top_k.max()))
    else:
        candidates, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(candidates.shape[-1], device=logits.device)
    outside_top_k = has_top_k[:, None] & (rank >= top_k[:, None])
    relative_logits = candidates - candidates[:, :1]
    weights = (relative_logits / torch.where(temperature == 0, 1.0, temperature)[:, None]).exp()
    masses = (weights * _MASS_UNITS).round().long().masked_fill(outside_top_k, 0)
    target_mass = (top_p.double() * masses.sum(-1).double()).ceil().long()
    target_mass = torch.where(top_p < 1, target_mass, torch.iinfo(torch.int64).max)  # 1 keeps even tokens of mass 0
    outside_nucleus = masses.cumsum(-1) - masses >= target_mass[:, None]
    race_times = exponential_noise(seed, position, token_ids) / weights
    race_times = race_times.masked_fill(outside_top_k | outside_nucleus, torch.inf)
    sampled = token_ids.gather(-1, race_times.argmin(-1, keepdim=True))[:, 0]
    sampled = torch.where(temperature == 0, greedy_id, sampled)
    shifted_logits = logits - logits.amax(-1, keepdim=True)  # for precision if the logits are large
    logprob = shifted_logits.gather(-1, sampled[:, None])[:, 0] - shifted_logits.logsumexp(-1)
    return sampled.masked_fill(is_broken, -1), logprob.masked_fill(is_broken, torch.nan)


def sample_with_library(
    library: CDLL, logits: Tensor, row_settings: tuple[Tensor, ...], stream: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the result of `sample`, computed by the compiled kernel of `library`.

    row_settings is (temperature, top_k, top_p, seed, position), stream the handle of a CUDA stream; None is CUDA's
    default stream, which may not be torch's current stream.

    Raises:
        RuntimeError: the launch of the kernel failed.
    """
    num_rows, vocab_size = logits.shape
    row_settings = [column.contiguous() for column in row_settings]
    workspace = logits.new_empty(library.thinksafe_sample_workspace(num_rows, vocab_size))
    tokens, logprobs = logits.new_empty(num_rows, dtype=torch.int64), logits.new_empty(num_rows)
    pointers = [tensor.data_ptr() for tensor in (*row_settings, workspace, tokens, logprobs)]
    error = library.thinksafe_sample(logits.data_ptr(), logits.stride(0), num_rows, vocab_size, *pointers, stream)
    if error:
        raise RuntimeError(f"the launch of the sampling kernel failed with CUDA error {error}")
    return tokens, logprobs


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Return one sampled token per row, and its log-probability.

    A row is sampled from softmax(logits / temperature), cut to the top_k most likely tokens and renormalized, then cut
    to the most likely of these whose probabilities sum to top_p. The token that crosses top_p is kept. Of equal logits
    the smaller id comes first. The token of a row depends on this row's arguments only.

    Args:
        logits: [B, V] fp32, rows contiguous.
        temperature: [B] fp32, at least 0; 0 takes the most likely token.
        top_k: [B] int64; 0, or a number of at least V, turns top-k off.
        top_p: [B] fp32 in (0, 1]; 1 turns top-p off.
        seed, position: [B] int64, which determine the row's random numbers; position is the index of the sampled token
            in its sequence.

    Returns:
        tokens: [B] int64; -1 for a row that holds NaN or +inf, or only -inf.
        logprobs: [B] fp32, under softmax(logits), before temperature and truncation; NaN where the token is -1.

    Raises:
        ValueError: logits are not [B, V] in fp32 with contiguous rows, or V is above MAX_VOCAB_SIZE.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32 or (logits.numel() and logits.stride(1) != 1):
        raise ValueError(f"logits must be fp32 [B, V] with contiguous rows; found {logits.dtype} {list(logits.shape)}")
    if not 0 < logits.shape[1] <= MAX_VOCAB_SIZE:
        raise ValueError(f"logits must have 1 to {MAX_VOCAB_SIZE} columns; found {logits.shape[1]}")
    row_settings = (temperature, top_k, top_p, seed, position)
    if logits.is_cuda and (library := load_library()):
        return sample_with_library(library, logits, row_settings, torch.cuda.current_stream(logits.device).cuda_stream)
    return reference(logits, *row_settings)
