"""Where an operation runs: one rule for all of them.

CUDA tensors go to the Triton kernels, CPU tensors to the plain PyTorch reference, and TRITON_INTERPRET=1 sends CPU
tensors through the Triton kernels in the interpreter, which is exact in fp32 only. Triton is imported here alone, and a
machine without it still has every operation on the CPU.
"""

import os

from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(kernel):
    """`triton.jit` where there is Triton; elsewhere the function as it is, which nothing calls."""
    return triton.jit(kernel) if triton else kernel


def on_triton(x: Tensor) -> bool:
    """Whether an operation on x runs as a Triton kernel.

    Raises:
        RuntimeError: x is on a GPU and Triton is not installed.
    """
    if not (x.is_cuda or INTERPRETED):
        return False
    if triton is None:
        raise RuntimeError("Triton is not installed; a GPU needs it: pip install 'thinksafe[gpu]'")
    return True
