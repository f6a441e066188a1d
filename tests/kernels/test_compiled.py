"""Every shipped kernel and configuration compiles for a Hopper GPU into what it was meant to be; no GPU is needed.

The same file runs under the oldest supported Triton, put first on PYTHONPATH.
"""

import pytest

pytest.importorskip("triton")

from thinksafe.kernels.dispatch import INTERPRETED
from tools.hopper.compiled import builds, compile_for_hopper, figures, ranges

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

SHARED_MEMORY, RESERVED = 233_472, 1024
"""Bytes of a processor of sm_90, and those that each program takes beside its own: so one may use 232,448; the compiler
lets more pass, and the launch fails."""
REGISTERS = 65_536
"""Of a processor."""


@pytest.fixture(params=builds(), ids=lambda build: build.name, scope="module")
def build(request):
    """A build and what was compiled from it."""
    return request.param, compile_for_hopper(request.param)


def test_kernel_compiles_without_spills_within_shared_memory_and_with_the_intended_instructions(build):
    found = figures(*build)
    assert found.stack_bytes == 0 and found.spill_instructions == 0
    assert build[0].resident * (found.shared_bytes + RESERVED) <= SHARED_MEMORY
    assert build[0].resident * build[0].num_warps * 32 * found.registers <= REGISTERS
    for name in build[0].uses:
        assert getattr(found, name) > 0, name
    if build[0].streams:
        assert 0 < found.issue_share < 0.5, "memory is to bound it, not instructions"


def test_indices_beyond_two_to_the_31_are_formed_in_64_bits(build):
    """Followed through the IR for a call of 4M rows: nothing overflows, and with its 64-bit integers cut to 32 bits
    every kernel is caught."""
    build, compiled = build
    if build.sizes is None:
        pytest.skip("tested on memory of that size in test_paged_attention.py")
    indices = ranges(build, compiled.asm["ttir"])
    assert indices.largest_offset > 2**31
    assert indices.faults == []
    assert ranges(build, compiled.asm["ttir"].replace("i64", "i32")).faults
