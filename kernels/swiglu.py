"""SwiGLU, the gate of the feed-forward block: silu(gate) * up. Reads two [T, I] tensors, writes one."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element.

    Args:
        gate, up: [T, I], same dtype.

    Returns:
        [T, I].
    """
    return F.silu(gate) * up
