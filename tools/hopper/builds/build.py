"""What is compiled: a kernel, its arguments, and what is asked of the result."""

from dataclasses import dataclass, field
from typing import Any

# A call too large for any GPU of today, so that every product of a row and a width passes 2^31.
T, H, V, HEADS, INTERMEDIATE = 2**22, 8192, 151_936, 64, 25_600
PROCESSORS = 132


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration.

    Attributes:
        arguments: argument -> Triton type, for everything that is not a constant.
        constants: constexpr arguments; pointers in neither are None.
        sizes: integer argument -> its value in the largest call; None where indices come out of a page table, which
            are tested on memory of more than 2^31 elements instead.
        programs: that call's grid.
        loads: pointer argument -> the largest index that is read there.
        resident: programs that must fit a processor at the same time.
        streams: bytes that a turn of its loop reads from memory, where those are to bound it.
        uses: the `Figures` that must not be 0: the instructions it is written for.
    """

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    sizes: dict[str, int] | None = None
    programs: tuple[int, ...] = ()
    loads: dict[str, int] = field(default_factory=dict)
    num_stages: int = 3
    resident: int = 1
    streams: int = 0
    uses: tuple[str, ...] = ("wide_loads",)


def descriptor(rows: int, columns: int, dtype: str = "bf16") -> str:
    """Triton's type of a tile that the copy engine moves."""
    return f"tensordesc<{dtype}[{rows},{columns}]>"
