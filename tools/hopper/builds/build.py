"""The description of one compilation: a kernel, its arguments, and requirements on the compiled code."""

from dataclasses import dataclass, field
from typing import Any

from thinksafe.kernels.matmul_tile import MatmulTile

# A call too large for any GPU of today, so that every row index times a width exceeds 2^31.
T, H, V, HEADS, INTERMEDIATE = 2**22, 8192, 151_936, 64, 25_600
NUM_SMS = 132


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration in which a model launches it, and what the compiled code must fulfill.

    tools/hopper/compiled.py compiles it, and tests/kernels/test_compiled.py checks the requirements.

    Attributes:
        name: key of the build's row in benchmarks/results/sm_90a; it stays the same if the kernel is renamed.
        kernel: the `triton.jit` function.
        arguments: argument -> Triton type, for every argument that is not a constant.
        constants: constexpr argument -> value. An argument in neither dictionary is a pointer that is None.
        num_warps: warps per program.
        sizes: integer argument -> its value in the largest call. None if indices come from a page table; such kernels
            are tested on memory of more than 2^31 elements instead.
        grid: programs of the largest call along each axis.
        max_loaded_index: pointer argument -> the largest index that the kernel reads from it.
        num_stages: stages of the software pipeline.
        programs_per_sm: programs that must fit on an SM at the same time.
        bytes_per_iteration: bytes that one iteration of a program's innermost loop reads, if memory must be the loop's
            limit; 0 if it need not.
        required_instructions: fields of `KernelStats` that must not be 0: the instructions that the kernel needs.
    """

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    sizes: dict[str, int] | None = None
    grid: tuple[int, ...] = ()
    max_loaded_index: dict[str, int] = field(default_factory=dict)
    num_stages: int = 3
    programs_per_sm: int = 1
    bytes_per_iteration: int = 0
    required_instructions: tuple[str, ...] = ("wide_loads",)


def tile_constants(tile: MatmulTile) -> dict[str, int]:
    """Return the sizes of a tile, the constexpr arguments of its kernel."""
    return {name: value for name, value in tile._asdict().items() if name.isupper()}


def descriptor(rows: int, columns: int, dtype: str = "bf16") -> str:
    """Return Triton's type of a tensor descriptor whose tiles of rows x columns elements TMA copies.

    Args:
        dtype: Triton's name of the elements' dtype.
    """
    return f"tensordesc<{dtype}[{rows},{columns}]>"
