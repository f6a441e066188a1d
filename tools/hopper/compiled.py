"""Cross-compile every shipped kernel for Hopper, without a GPU, and report what the compiler made of it.

`python -m tools.hopper.compiled` compiles each (kernel, configuration) for sm_90a with the installed Triton. It writes
registers, spills, shared memory and the instructions that matter to benchmarks/results/sm_90a/triton-VERSION.json, and
the same as a table to triton-VERSION.md. tests/kernels/test_compiled.py checks these figures against their limits.
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
from tools.hopper.builds.build import PROCESSORS, Build
from tools.hopper.index_ranges import Ranges, index_ranges

BANDWIDTH, CLOCK, SCHEDULERS = 4.8e12, 1.7e9, 4
"""An H200 at its least favourable: bytes a second as its maker states them, and the lowest clock, in Hz, that it holds
under load; each of a processor's schedulers issues one instruction a cycle, of one warp."""


@dataclass(frozen=True)
class Figures:
    """Per thread: registers, bytes of stack (spills). Per program: bytes of shared memory. Counts of instructions.

    The loop is the longest one without another in it, and issue_share the part of all that processors can issue that it
    takes while memory brings what it reads: above 1, instructions are the limit. largest_offset, in elements, is that
    of the largest call; faults are the 32-bit integers that overflow in it."""

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
    """Triton's compiled kernel for sm_90a; no GPU is needed."""
    signature = {name: build.arguments.get(name, "constexpr") for name in build.kernel.arg_names}
    # As at a real launch: pointers and sizes that are multiples of 16 may be read 16 bytes at a time.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(signature.values())
        if kind.startswith("*") or kind in ("i32", "i64")
    }
    constants = {name: None for name, kind in signature.items() if kind == "constexpr"} | build.constants
    source = ASTSource(build.kernel, signature, constants, aligned)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def ranges(build: Build, ttir: str) -> Ranges:
    """The kernel's integers in the largest call."""
    return index_ranges(ttir, build.sizes, build.programs, build.loads)


def figures(build: Build, compiled: Any) -> Figures:
    """What the compiler made of it; ptxas and cuobjdump ship with Triton."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()

        def dump(what: str) -> str:
            command = [tools / "cuobjdump", what, cubin.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = dump("-res-usage"), dump("-sass")
    loop = _loop_instructions(code)
    indices = ranges(build, compiled.asm["ttir"]) if build.sizes else None
    return Figures(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared_bytes=compiled.metadata.shared,
        wgmma=len(re.findall(r"\b[HQ]GMMA", code)),
        mma=len(re.findall(r"\bHMMA", code)),
        tma_loads=code.count("UTMALDG"),
        wide_copies=len(re.findall(r"LDGSTS\S*\.128", code)),
        wide_loads=code.count("LDG.E.128"),
        loop_instructions=loop,
        issue_share=_issue_share(build, loop),
        largest_offset=indices and indices.largest_offset,
        index_faults=indices and len(indices.faults),
    )


def _loop_instructions(code: str) -> int:
    """Of the longest innermost loop in SASS, 16 bytes each; 0 without a loop."""
    jumps = re.findall(r"/\*([0-9a-f]{4,})\*/ .*?\bBRA\S* .*?0x([0-9a-f]+)", code)
    loops = [(int(to, 16), int(at, 16)) for at, to in jumps if int(to, 16) < int(at, 16)]
    inner = [loop for loop in loops if not any(loop != other and loop[0] <= other[0] <= loop[1] for other in loops)]
    return max(((last - first) // 16 + 1 for first, last in inner), default=0)


def _issue_share(build: Build, loop_instructions: int) -> float | None:
    if not build.streams:
        return None
    issued_per_second = loop_instructions * build.num_warps * BANDWIDTH / build.streams
    return round(issued_per_second / (PROCESSORS * SCHEDULERS * CLOCK), 3)


def main() -> None:
    """Compile everything, print the table, write the figures."""
    rows = []
    for build in builds():
        row = figures(build, compile_for_hopper(build))
        rows.append({"kernel": build.name, "warps": build.num_warps, **vars(row)})
    print(page := table(rows))
    folder = Path(__file__).parents[2] / "benchmarks/results/sm_90a"
    folder.mkdir(parents=True, exist_ok=True)
    record = {"command": "python -m tools.hopper.compiled", "triton": triton.__version__, "rows": rows}
    file = folder / f"triton-{triton.__version__}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    title = f"# What Triton {triton.__version__} makes of every kernel for sm_90a"
    file.with_suffix(".md").write_text(f"{title}\n\n{inspect.getdoc(Figures)}\n\n{page}\n")


if __name__ == "__main__":
    main()
