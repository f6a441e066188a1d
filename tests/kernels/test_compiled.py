"""Every shipped kernel and configuration compiles for Hopper within its limits; the oracle is the compiled code.

No GPU is needed. The file also runs under the oldest supported Triton, which is then first on PYTHONPATH.
"""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from thinksafe.kernels.dispatch import INTERPRETED
from tools.hopper.compiled import builds, compile_for_hopper, integer_ranges, kernel_stats

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

pytestmark = pytest.mark.slow  # each test compiles kernels

SHARED_MEMORY, RESERVED_PER_PROGRAM = 233_472, 1024
"""Bytes of an SM of sm_90, and bytes that CUDA reserves for each program. So one program may use 232,448 bytes.
The compiler accepts more, but the launch then fails."""
REGISTERS = 65_536
"""Registers of an SM."""
TABLES = Path(__file__).resolve().parents[2] / "benchmarks/results/sm_90a"


def build_parameters() -> list:
    """Return all builds. `make test` compiles one of each kernel in bf16 and in e4m3: the one with the most registers.

    The registers are those of the committed table. A build that the table lacks is always compiled."""
    rows = json.loads((TABLES / "triton-3.9.0.json").read_text())["rows"]
    registers, largest = {row["kernel"]: row["registers"] for row in rows}, {}
    for build in (build for build in builds() if build.name in registers):
        key = build.kernel, any("fp8" in kind for kind in build.arguments.values())
        largest[key] = max(largest.get(key, build), build, key=lambda build: registers[build.name])
    repeated = registers.keys() - {build.name for build in largest.values()}
    return [
        pytest.param(build, id=build.name, marks=pytest.mark.exhaustive if build.name in repeated else ())
        for build in builds()
    ]


@pytest.fixture(params=build_parameters(), scope="module")
def build(request):
    """A build and its compiled kernel."""
    return request.param, compile_for_hopper(request.param)


def test_compiled_kernel_fits_resources_and_uses_required_instructions(build):
    stats = kernel_stats(*build)
    assert stats.stack_bytes == 0 and stats.spill_instructions == 0
    assert build[0].programs_per_sm * (stats.shared_bytes + RESERVED_PER_PROGRAM) <= SHARED_MEMORY
    assert build[0].programs_per_sm * build[0].num_warps * 32 * stats.registers <= REGISTERS
    for name in build[0].required_instructions:
        assert getattr(stats, name) > 0, name
    if build[0].bytes_per_iteration:
        assert 0 < stats.issue_share < 0.5, "instructions limit the loop; memory must be its limit"


def test_indices_beyond_32_bits_are_computed_in_64_bits(build):
    """Ranges of the IR's integers in a call of 4M rows: no fault, and faults if 64-bit integers are cut to 32 bits."""
    build, compiled = build
    if build.sizes is None:
        pytest.skip("test_paged_attention.py tests this kernel on memory of more than 2^31 elements")
    indices = integer_ranges(build, compiled.asm["ttir"])
    assert indices.largest_offset > 2**31
    assert indices.faults == []
    assert integer_ranges(build, compiled.asm["ttir"].replace("i64", "i32")).faults
