"""Tiles of the persistent matmul kernels: their sizes, their order, and the number of programs.

A persistent program computes one [BLOCK_T, BLOCK_N] tile of X Wᵀ after another. GROUP row blocks use a tile of W, while
it is in the L2, before the next tile of W starts. W is therefore read once per group, not once per row block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thinksafe.kernels.dispatch import INTERPRETED, TensorDescriptor, jit, tl


class MatmulTile(NamedTuple):
    """Launch configuration of a kernel that computes tiles of X Wᵀ, with X [T, K] and W [N, K].

    BLOCK_K is one step of the software pipeline, which has num_stages stages.
    """

    BLOCK_T: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP: int
    num_warps: int
    num_stages: int

    def count(self, T: int, N: int) -> int:
        """Return the number of tiles of a [T, N] result."""
        return -(-T // self.BLOCK_T) * -(-N // self.BLOCK_N)

    def grid(self, T: int, N: int, device: torch.device) -> tuple[int]:
        """Return the number of programs: one per SM, or one per tile if there are fewer tiles."""
        return (min(self.count(T, N), num_sms(device)),)

    def descriptors(self, x: Tensor, weight: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
        """Return the descriptors through which TMA copies tiles of X and W."""
        return (
            TensorDescriptor.from_tensor(x, [self.BLOCK_T, self.BLOCK_K]),
            TensorDescriptor.from_tensor(weight, [self.BLOCK_N, self.BLOCK_K]),
        )


INTERPRETER_TILE = MatmulTile(16, 32, 32, 2, 4, 1)


@jit
def tile_position(tile, num_t, num_n, GROUP: tl.constexpr):
    """Return (row block, column block) of a tile number, for num_t row blocks and num_n column blocks."""
    first_block_t = tile // (GROUP * num_n) * GROUP
    group_size = min(num_t - first_block_t, GROUP)
    return first_block_t + tile % (GROUP * num_n) % group_size, tile % (GROUP * num_n) // group_size


def num_sms(device: torch.device) -> int:
    """Return the number of SMs of a GPU; in the interpreter 2."""
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
