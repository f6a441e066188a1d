"""Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * weight.

Reads x once and writes y once: 2 * T * H * itemsize bytes. The mean is taken in fp32, whatever the dtype of x,
because a bf16 sum over H = 4096 squares keeps only two digits.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension.

    Args:
        x: [..., H], floating point.
        weight: [H], the learned gain.
        eps: added to the mean square.

    Returns:
        [..., H] in the dtype of x. The gain is applied after rounding to that dtype, as Hugging Face's models do.
    """
    x32 = x.float()
    normalised = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)
