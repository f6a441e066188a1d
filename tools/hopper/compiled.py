"""Compile every shipped kernel for Hopper without a GPU and report statistics of the compiled code.

`python -m tools.hopper.compiled` compiles each (kernel, configuration) for sm_90a with the installed Triton. It writes
registers, spills, shared memory and counts of important instructions to
benchmarks/results/sm_90a/triton-VERSION.json, and the same as a table to triton-VERSION.md.
tests/kernels/test_compiled.py checks these figures against their limits.
"""

import inspect
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.harness import table
from tools.hopper.builds import builds
from tools.hopper.builds.build import NUM_SMS, Build
from tools.hopper.index_ranges import IndexRanges, index_ranges

BANDWIDTH, CLOCK, SCHEDULERS_PER_SM = 4.8e12, 1.7e9, 4
"""An H200 in the worst case for issue_share: the vendor's bytes per second, and the lowest clock under load in Hz. Each
scheduler of an SM issues one instruction of one warp per cycle."""


@dataclass(frozen=True)
class KernelStats:
    """Figures of one compiled kernel. The columns are:

    - registers, stack_bytes: per thread; a stack means that registers spilled.
    - spill_instructions: loads and stores of the stack.
    - shared_bytes: shared memory per program.
    - wgmma, mma: matmul instructions of a warp group and of a warp.
    - tma_loads, wide_copies, wide_loads: loads of tiles by TMA, copies of 16 bytes to shared memory, loads of 16 bytes.
    - loop_instructions: instructions of the longest innermost loop; 0 without a loop.
    - issue_share: share of all instructions the GPU can issue that this loop needs while memory delivers the bytes it
      reads; above 1, instructions are the limit. Empty if memory need not be the limit.
    - largest_offset: largest offset that the largest call adds to a pointer, in elements.
    - index_faults: operations whose 32-bit result overflows in the largest call, or whose range is unknown. Both are
      empty if indices come from a page table."""

    registers: int
    stack_bytes: int
    spill_instructions: int
    shared_bytes: int
    wgmma: int
    mma: int
    tma_loads: int
    wide_copies: int
    wide_loads: int
    loop_instructions: int
    issue_share: float | None
    largest_offset: int | None
    index_faults: int | None


def compile_for_hopper(build: Build) -> Any:
    """Return Triton's compiled kernel of a build for sm_90a; needs no GPU."""
    signature = {name: build.arguments.get(name, "constexpr") for name in build.kernel.arg_names}
    # As at a real launch, pointers and sizes are multiples of 16, which allows loads of 16 bytes.
    alignment = {
        (index,): [["tt.divisibility", 16]]
        for index, argument_type in enumerate(signature.values())
        if argument_type.startswith("*") or argument_type in ("i32", "i64")
    }
    constants = {
        name: None for name, argument_type in signature.items() if argument_type == "constexpr"
    } | build.constants
    source = ASTSource(build.kernel, signature, constants, alignment)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def integer_ranges(build: Build, ttir: str) -> IndexRanges:
    """Return the overflows and the largest pointer offset of the build's largest call; `build.sizes` must not be None.

    Args:
        ttir: text of the kernel's Triton IR.
    """
    return index_ranges(ttir, build.sizes, build.grid, build.max_loaded_index)


def kernel_stats(build: Build, compiled: Any) -> KernelStats:
    """Return figures of a compiled kernel, read with the cuobjdump that ships with Triton.

    Args:
        compiled: the result of `compile_for_hopper(build)`.
    """
    compiler_tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()

        def dump(option: str) -> str:
            command = [compiler_tools / "cuobjdump", option, cubin.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        resource_usage, sass = dump("-res-usage"), dump("-sass")
    loop_instructions = _loop_instructions(sass)
    ranges = integer_ranges(build, compiled.asm["ttir"]) if build.sizes else None
    return KernelStats(
        registers=int(re.search(r"REG:(\d+)", resource_usage)[1]),
        stack_bytes=int(re.search(r"STACK:(\d+)", resource_usage)[1]),
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared_bytes=compiled.metadata.shared,
        wgmma=len(re.findall(r"\b[HQ]GMMA", sass)),
        mma=len(re.findall(r"\bHMMA", sass)),
        tma_loads=sass.count("UTMALDG"),
        wide_copies=len(re.findall(r"LDGSTS\S*\.128", sass)),
        wide_loads=sass.count("LDG.E.128"),
        loop_instructions=loop_instructions,
        issue_share=_issue_share(build, loop_instructions),
        largest_offset=ranges and ranges.largest_offset,
        index_faults=ranges and len(ranges.faults),
    )


def _loop_instructions(sass: str) -> int:
    """Return the number of instructions (16 bytes each) of the longest innermost loop in SASS; 0 without a loop."""
    jumps = re.findall(r"/\*([0-9a-f]{4,})\*/ .*?\bBRA\S* .*?0x([0-9a-f]+)", sass)
    loops = [
        (int(target_address, 16), int(jump_address, 16))
        for jump_address, target_address in jumps
        if int(target_address, 16) < int(jump_address, 16)
    ]
    innermost_loops = [
        loop
        for loop in loops
        if not any(loop != other_loop and loop[0] <= other_loop[0] <= loop[1] for other_loop in loops)
    ]
    return max(((loop_end - loop_start) // 16 + 1 for loop_start, loop_end in innermost_loops), default=0)


def _issue_share(build: Build, loop_instructions: int) -> float | None:
    if not build.bytes_per_iteration:
        return None
    issued_per_second = loop_instructions * build.num_warps * BANDWIDTH / build.bytes_per_iteration
    return round(issued_per_second / (NUM_SMS * SCHEDULERS_PER_SM * CLOCK), 3)


def main() -> None:
    """Compile every build, print the table, and overwrite the JSON and Markdown files of the installed Triton."""
    rows = []
    for build in builds():
        stats = kernel_stats(build, compile_for_hopper(build))
        rows.append({"kernel": build.name, "warps": build.num_warps, **vars(stats)})
    print(markdown_table := table(rows))
    folder = Path(__file__).parents[2] / "benchmarks/results/sm_90a"
    folder.mkdir(parents=True, exist_ok=True)
    record = {"command": "python -m tools.hopper.compiled", "triton": triton.__version__, "rows": rows}
    file = folder / f"triton-{triton.__version__}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    title = f"# Every kernel as Triton {triton.__version__} compiles it for sm_90a"
    file.with_suffix(".md").write_text(f"{title}\n\n{inspect.getdoc(KernelStats)}\n\n{markdown_table}\n")


if __name__ == "__main__":
    main()
