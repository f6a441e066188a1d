"""The rule that decides where an operation runs; all Triton operations follow it.

CUDA tensors go to the Triton kernels and CPU tensors to the plain PyTorch reference. TRITON_INTERPRET=1 sends CPU
tensors to the Triton kernels in the interpreter, which is exact in fp32 only. Only this file imports Triton, so a
machine without Triton can run every operation on the CPU.
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
"""Whether CPU tensors go to the Triton kernels in Triton's interpreter."""


def jit(kernel):
    """Return `triton.jit(kernel)`. Without Triton return the function unchanged; nothing calls it then."""
    return triton.jit(kernel) if triton else kernel


def on_triton(x: Tensor) -> bool:
    """Return whether an operation on x runs as a Triton kernel; if not, it runs the plain PyTorch reference.

    Raises:
        RuntimeError: it would run as a Triton kernel, but Triton is not installed.
    """
    if not (x.is_cuda or INTERPRETED):
        return False
    if triton is None:
        raise RuntimeError("Triton is not installed; a GPU needs it: pip install 'thinksafe[gpu]'")
    return True
