"""Rotary position embedding in the half-split layout of the Llama family.

Pairs (x[i], x[i + D/2]) are rotated by position * inv_freq[i]. Angles are formed in fp32: at position 100,000 a bf16
angle would be off by hundreds of radians.
"""

import math

import torch
from torch import Tensor


def inverse_frequencies(head_dim: int, theta: float, llama3_scaling: dict | None = None) -> Tensor:
    """Angular step a position, for each of the D/2 pairs.

    Args:
        head_dim: D.
        theta: the base, 1e4 to 1e6 in practice.
        llama3_scaling: `factor`, `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings`, or
            None. Long wavelengths are slowed by `factor`, short ones kept, those between blended linearly
            (Llama 3.1's context extension).

    Returns:
        [D/2] fp32.
    """
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if llama3_scaling is None:
        return inv_freq
    factor = llama3_scaling["factor"]
    low, high = llama3_scaling["low_freq_factor"], llama3_scaling["high_freq_factor"]
    original_context = llama3_scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    blend = ((original_context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * inv_freq / factor + blend * inv_freq


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head of x.

    Args:
        x: [T, num_heads, D].
        cos, sin: [T, D/2] fp32, of the tokens' positions.

    Returns:
        [T, num_heads, D] in the dtype of x.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
