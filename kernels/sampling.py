"""Sampling of the next token: temperature, top-k, renormalization, top-p, then an exponential race.

The race picks the argmin over candidates of E_id / p_id with E_id ~ Exp(1), so token id wins with probability p_id
exactly. E_id is a hash of (seed, position, token id). A draw therefore depends on its own request only, not on the
batch and not on the order of the candidates, and a rounding error in the logits changes few draws.

Top-p adds up probabilities as integers, in units of 2^-40 of the weight of the most likely token. An integer sum has
the same value in every order of addition. On a GPU csrc/sampling.cu computes the same without sorting; it reads the
logits once. In plain torch on a CPU large vocabularies are not sorted either.
"""

from ctypes import CDLL

import torch
from torch import Tensor

from thinksafe.kernels.cuda_library import load_library

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, odd, as a signed 64-bit integer
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64  # multipliers of splitmix64's finalizer
_MASS_UNITS = 2.0**40
MAX_VOCAB_SIZE = 2**22
"""Largest vocabulary: ties are broken by 22 bits of the token id."""
_BLOCK = 64
_MAX_SORTED = 8192
"""Largest vocabulary that is sorted on a CPU. Sorting a larger one takes longer than to avoid it, row by row."""
_BITS_OF_ONE = 0x3F800000  # bits of 1.0 in fp32


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


def _first_k(logits: Tensor, token_ids: Tensor, k: int) -> Tensor:
    """Return the token_ids [..., k] of the k largest logits in descending order; of equal logits the smaller id first.

    `torch.topk` does not promise this order. With logits rounded to bf16 every fifth row has a tie at k = 20, so its
    result would depend on k, and so on the batch."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0 into 0
    sortable = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()  # integers that sort like the floats
    last_id = MAX_VOCAB_SIZE - 1
    sort_keys = (sortable * MAX_VOCAB_SIZE + (last_id - token_ids)).topk(k, sorted=True).values
    return last_id - (sort_keys & last_id)


def _top_k(logits: Tensor, k: int) -> Tensor:
    """Return the ids [B, k] of the first k tokens of logits [B, V], in the order of `_first_k`.

    They are in the first k blocks of 64 tokens, if blocks are ordered by their largest logits in the same way: each of
    these blocks has a token before all tokens of the other blocks. So a floating-point maximum passes over most tokens.
    """
    vocab_size, device = logits.shape[-1], logits.device
    num_blocks = vocab_size // _BLOCK
    if num_blocks <= 4 * k:
        return _first_k(logits, torch.arange(vocab_size, device=device), k)
    block_maxima = logits[:, : num_blocks * _BLOCK].unflatten(-1, (num_blocks, _BLOCK)).amax(-1)
    blocks = _first_k(block_maxima, torch.arange(num_blocks, device=device), k)
    ids_in_blocks = (blocks[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=device)).flatten(1)
    ids_after_blocks = torch.arange(num_blocks * _BLOCK, vocab_size, device=device).expand(len(logits), -1)
    token_ids = torch.cat((ids_in_blocks, ids_after_blocks), -1)
    return _first_k(logits.gather(-1, token_ids), token_ids, k)


def _sample_sorted(logits, token_ids, temperature, top_k, top_p, seed, position) -> tuple[Tensor, Tensor]:
    """Return the result of `sample` for candidates token_ids [B, K] in the order of `_first_k`; top_k is at least 1."""
    max_logit = logits.amax(-1)
    candidates = logits.gather(-1, token_ids)
    outside_top_k = torch.arange(candidates.shape[-1], device=logits.device) >= top_k[:, None]
    relative_logits = candidates - candidates[:, :1]
    weights = (relative_logits / torch.where(temperature == 0, 1.0, temperature)[:, None]).exp()
    masses = (weights * _MASS_UNITS).round().long().masked_fill(outside_top_k, 0)
    target_mass = (top_p.double() * masses.sum(-1).double()).ceil().long()
    target_mass = torch.where(top_p < 1, target_mass, torch.iinfo(torch.int64).max)  # 1 keeps even tokens of mass 0
    outside_nucleus = masses.cumsum(-1) - masses >= target_mass[:, None]
    race_times = exponential_noise(seed, position, token_ids) / weights
    race_times = race_times.masked_fill(outside_top_k | outside_nucleus, torch.inf)
    sampled = token_ids.gather(-1, race_times.argmin(-1, keepdim=True))[:, 0]
    sampled = torch.where(temperature == 0, token_ids[:, 0], sampled)
    logprob = _logprob(logits, max_logit[:, None], sampled[:, None])
    is_broken = ~torch.isfinite(max_logit)  # the maximum of a row with NaN is NaN
    return sampled.masked_fill(is_broken, -1), logprob.masked_fill(is_broken, torch.nan)


def _logprob(logits: Tensor, max_logit: Tensor, sampled: Tensor) -> Tensor:
    """Return the log-probability [B] of `sampled` [B, 1]; max_logit [B, 1] is subtracted for precision if logits are
    large. It is `logsumexp` that does not subtract the maximum again."""
    return (logits.gather(-1, sampled) - max_logit)[:, 0] - (logits - max_logit).exp_().sum(-1).log()


def _nucleus(row: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
    """Return the ids [K] of the first tokens of a row [V] of logits, in the order of `_first_k`, that weigh top_p.

    Sums over intervals of the weight, each 0.2% wide, decide about all tokens but those of one interval, which are
    sorted. The ids are not in this order, but among equal logits the smaller id is first.

    Args:
        weights: [V] fp32, the probability of each token over that of the most likely one."""
    masses = (weights * _MASS_UNITS).round_().long()
    target_mass = (top_p.double() * masses.sum().double()).ceil().long()
    interval = (_BITS_OF_ONE - weights.view(torch.int32)).bitwise_right_shift_(14)  # 0 holds the largest weight, 1
    sums = masses.new_zeros((_BITS_OF_ONE >> 14) + 1).index_add_(0, interval, masses)
    sums_before = sums.cumsum(0) - sums
    last = (sums_before < target_mass).sum() - 1
    undecided = (interval == last).nonzero()[:, 0]
    undecided = _first_k(row[undecided], undecided, len(undecided))
    mass_before = sums_before[last] + masses[undecided].cumsum(0) - masses[undecided]
    return torch.cat(((interval < last).nonzero()[:, 0], undecided[mass_before < target_mass]))


def _sample_unsorted(logits, temperature, _, top_p, seed, position) -> tuple[Tensor, Tensor]:
    """Return the result of `sample` for one row without top-k: logits [1, V] and settings [1]."""
    max_logit = logits.amax(-1, keepdim=True)
    if not max_logit.isfinite():
        return torch.full_like(seed, -1), torch.full_like(temperature, torch.nan)
    row = logits[0]
    if temperature == 0:
        sampled = row.argmax(keepdim=True)
    else:
        weights = (row - max_logit[0]).div_(temperature).exp_()
        token_ids = _nucleus(row, weights, top_p) if top_p < 1 else torch.arange(len(row))
        # Intermediate results of 16,384 tokens fit into a CPU's L2.
        noise = torch.cat([exponential_noise(seed, position, ids[None])[0] for ids in token_ids.split(2**14)])
        race_times = noise / weights[token_ids]
        is_winner = race_times == race_times.amin()  # of several winners the first in the order of `_first_k` is taken
        sampled = token_ids[torch.where(is_winner, row[token_ids], -torch.inf).argmax(keepdim=True)]
    return sampled, _logprob(logits, max_logit, sampled[None])


def reference(logits, temperature, top_k, top_p, seed, position) -> tuple[Tensor, Tensor]:
    """Return the result of `sample` in plain torch; its arguments are not checked."""
    num_rows, vocab_size = logits.shape
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    if has_top_k.all() and num_rows:
        token_ids = _top_k(logits, int(top_k.max()))
    elif logits.is_cuda or vocab_size <= _MAX_SORTED or not num_rows:
        token_ids = logits.sort(dim=-1, descending=True, stable=True).indices
        top_k = torch.where(has_top_k, top_k, vocab_size)
    else:
        rows = zip(*(column.split(1) for column in (logits, temperature, top_k, top_p, seed, position)), strict=True)
        results = [reference(*row) if 0 < row[2] < vocab_size else _sample_unsorted(*row) for row in rows]
        tokens, logprobs = (torch.cat(column) for column in zip(*results, strict=True))
        return tokens, logprobs
    return _sample_sorted(logits, token_ids, temperature, top_k, top_p, seed, position)


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
