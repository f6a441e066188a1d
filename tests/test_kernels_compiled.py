"""Every shipped kernel and configuration compiles for a Hopper GPU into what it was meant to be; no GPU is needed.

The same file runs under the oldest supported Triton, put first on PYTHONPATH.
"""

import pytest

pytest.importorskip("triton")

from benchmarks.compiled import builds, compile_for_hopper
from thinksafe.kernels.dispatch import INTERPRETED

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

SHARED_MEMORY_LIMIT = 232_448
"""Bytes a program may use on sm_90; the compiler lets more pass, and the launch fails."""


@pytest.mark.parametrize("build", builds(), ids=lambda build: build.name)
def test_kernel_compiles_without_spills_within_shared_memory_and_with_the_intended_instructions(build):
    figures = compile_for_hopper(build)
    assert figures.stack_bytes == 0 and figures.spill_instructions == 0
    assert figures.shared_bytes <= SHARED_MEMORY_LIMIT
    assert figures.offsets_64_bit, "T * V and T * H pass 2^31"
    if build.tensor_cores:
        assert figures.wgmma > 0 and figures.tma_loads > 0
    else:
        assert figures.wide_loads > 0, "memory-bound kernels read 16 bytes at a time"
