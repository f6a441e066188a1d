"""Drawing the next token: temperature, top-k, renormalise, top-p, then an exponential race.

A token's chance p is realised as argmin over candidates of E_id / p with E_id ~ Exp(1), which picks id with
probability p exactly. E_id is a hash of (seed, position, token id): a draw depends on nothing but its own request,
neither on the batch nor on the order of the candidates, and a rounding error in the logits changes few draws.
"""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9, the multipliers of the splitmix64 finaliser
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


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
        [B, K] fp32, positive and finite.
    """
    row_key = _mix(_mix(seed + _GOLDEN) + position * _GOLDEN)
    bits = _shift_right(_mix(row_key[:, None] + (token_ids + 1) * _GOLDEN), 41)
    uniform = (bits.float() + 0.5) / 2**23  # with a bit more, fp32 would round the largest to 1 and its noise to inf
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


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor, max_top_k: int
) -> Tensor:
    """Draw one token a row.

    The nucleus keeps the token that crosses top_p. Ties go to the smaller id.

    Args:
        logits: [B, V], any float dtype.
        temperature: [B] fp32; 0 takes the most likely token.
        top_k: [B] int64; 0 is off.
        top_p: [B] fp32 in (0, 1].
        seed, position: [B] int64; position is the index of the token being drawn in its sequence.
        max_top_k: the largest top_k on the host, or 0 when any row has it off.

    Returns:
        [B] int64; -1 for a row with NaN, +inf or nothing but -inf.
    """
    logits = logits.float()
    best, best_id = logits.max(-1)
    broken = ~torch.isfinite(best)  # NaN is the maximum of whatever holds one
    logits = logits.masked_fill(broken[:, None], 0.0)
    if 0 < max_top_k < logits.shape[-1]:
        candidates, token_ids = _top_k(logits, max_top_k)
    else:
        candidates, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(candidates.shape[-1], device=logits.device)
    outside_top_k = (top_k > 0)[:, None] & (rank >= top_k[:, None])
    scaled = candidates / temperature.clamp(min=1e-6)[:, None]
    probability = scaled.masked_fill(outside_top_k, -torch.inf).softmax(-1)
    mass_before = probability.cumsum(-1) - probability
    outside_nucleus = (mass_before >= top_p[:, None]) & (rank > 0)
    race = exponential_noise(seed, position, token_ids) / probability
    race = race.masked_fill(outside_top_k | outside_nucleus, torch.inf)
    drawn = token_ids.gather(-1, race.argmin(-1, keepdim=True))[:, 0]
    return torch.where(broken, -1, torch.where(temperature == 0, best_id, drawn))
