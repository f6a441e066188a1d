"""Drawing the next token: temperature, top-k, renormalise, top-p, then an exponential race.

A token's chance p is realised as argmin over candidates of E_id / p with E_id ~ Exp(1), which picks id with
probability p exactly. E_id is a hash of (seed, position, token id): a draw depends on nothing but its own request,
neither on the batch nor on the order of the candidates, and a rounding error in the logits changes few draws.

The nucleus is measured in integers, units of 2^-40 of the likeliest token's weight, so that a sum has one value in
whatever order it is taken. On a GPU csrc/sampling.cu does the same without sorting, reading the logits once.
"""

from ctypes import CDLL

import torch
from torch import Tensor

from thinksafe.kernels.native import library

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9, the multipliers of the splitmix64 finaliser
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_UNITS = 2.0**40
MAX_VOCAB_SIZE = 2**22
"""The CUDA kernel orders ties by 22 bits of the token id."""


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Splitmix64's finaliser on int64; multiplication wraps, as it must."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def exponential_noise(seed: Tensor, position: Tensor, token_ids: Tensor) -> Tensor:
    """Exp(1) variates that are a pure function of their arguments.

    Args:
        seed, position: [B] int64.
        token_ids: [B, K] int64.

    Returns:
        [B, K] fp32, positive and finite, with 40 bits behind them: among 150,000 equally likely tokens the winner's is
        about 7e-6, which 24 bits would round to a hundred steps and settle by ties.
    """
    row_key = _mix(_mix(seed + _GOLDEN) + position * _GOLDEN)
    bits = _shift_right(_mix(row_key[:, None] + (token_ids + 1) * _GOLDEN), 24)
    uniform = ((bits.float() + 0.5) / _UNITS).clamp(max=1 - 2.0**-24)  # 1 would be infinite noise
    return -torch.log1p(-uniform)


def _top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest, in order, and their ids. Ties go to the smaller id, which `topk` does not promise: with logits
    that were rounded to bf16 every fifth row has a tie at k = 20, and the choice would depend on k, so on the batch."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0 into 0
    ordered = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()  # integers in the order of the floats
    last = logits.shape[-1] - 1
    keys = (ordered * 2**32 + torch.arange(last, -1, -1, device=logits.device)).topk(k, sorted=True).values
    token_ids = last - (keys & 0xFFFFFFFF)
    return logits.gather(-1, token_ids), token_ids


def _sample_in_torch(logits, temperature, top_k, top_p, seed, position) -> tuple[Tensor, Tensor]:
    vocab_size = logits.shape[-1]
    best, best_id = logits.max(-1)
    broken = ~torch.isfinite(best)  # NaN is the maximum of whatever holds one
    logits = logits.masked_fill(broken[:, None], 0.0)
    limited = (top_k > 0) & (top_k < vocab_size)
    if limited.all() and len(logits):
        candidates, token_ids = _top_k(logits, int(top_k.max()))
    else:
        candidates, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(candidates.shape[-1], device=logits.device)
    outside_top_k = limited[:, None] & (rank >= top_k[:, None])
    below_best = candidates - candidates[:, :1]
    weight = (below_best / torch.where(temperature == 0, 1.0, temperature)[:, None]).exp()
    mass = (weight * _UNITS).round().long().masked_fill(outside_top_k, 0)
    target = (top_p.double() * mass.sum(-1).double()).ceil().long()
    target = torch.where(top_p < 1, target, torch.iinfo(torch.int64).max)  # 1 keeps even a token of no mass
    outside_nucleus = mass.cumsum(-1) - mass >= target[:, None]
    race = exponential_noise(seed, position, token_ids) / weight
    race = race.masked_fill(outside_top_k | outside_nucleus, torch.inf)
    drawn = token_ids.gather(-1, race.argmin(-1, keepdim=True))[:, 0]
    drawn = torch.where(temperature == 0, best_id, drawn)
    relative = logits - logits.amax(-1, keepdim=True)  # a large logit would swallow what logsumexp adds to it
    logprob = relative.gather(-1, drawn[:, None])[:, 0] - relative.logsumexp(-1)
    return drawn.masked_fill(broken, -1), logprob.masked_fill(broken, torch.nan)


def sample_with(
    handle: CDLL, logits: Tensor, columns: tuple[Tensor, ...], stream: int | None = None
) -> tuple[Tensor, Tensor]:
    """`sample` by the compiled kernel; `columns` are its arguments after the logits.

    Raises:
        RuntimeError: the kernel could not be launched.
    """
    rows, vocab_size = logits.shape
    columns = [column.contiguous() for column in columns]
    workspace = logits.new_empty(handle.thinksafe_sample_workspace(rows, vocab_size))
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    pointers = [tensor.data_ptr() for tensor in (*columns, workspace, tokens, logprobs)]
    error = handle.thinksafe_sample(logits.data_ptr(), logits.stride(0), rows, vocab_size, *pointers, stream)
    if error:
        raise RuntimeError(f"the sampling kernel did not start: CUDA error {error}")
    return tokens, logprobs


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    The nucleus keeps the token that crosses top_p. Ties go to the smaller id.

    Args:
        logits: [B, V] fp32, rows contiguous.
        temperature: [B] fp32; 0 takes the most likely token.
        top_k: [B] int64; 0 is off.
        top_p: [B] fp32 in (0, 1].
        seed, position: [B] int64; position is the index of the token being drawn in its sequence.

    Returns:
        tokens: [B] int64; -1 for a row with NaN, +inf or nothing but -inf.
        logprobs: [B] fp32, of those tokens under softmax(logits): before temperature and truncation. NaN for -1.

    Raises:
        ValueError: logits are not [B, V] in fp32 with contiguous rows, or V is above MAX_VOCAB_SIZE.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32 or (logits.numel() and logits.stride(1) != 1):
        raise ValueError(f"logits must be [B, V] in fp32 with contiguous rows, not {list(logits.shape)} {logits.dtype}")
    if not 0 < logits.shape[1] <= MAX_VOCAB_SIZE:
        raise ValueError(f"a vocabulary of {logits.shape[1]} is not between 1 and {MAX_VOCAB_SIZE}")
    columns = (temperature, top_k, top_p, seed, position)
    if logits.is_cuda and (handle := library()):
        return sample_with(handle, logits, columns, torch.cuda.current_stream(logits.device).cuda_stream)
    return _sample_in_torch(logits, *columns)
