"""Whether a kernel's 32-bit integers can overflow: interval arithmetic over Triton's IR, with no memory and no GPU.

Sizes are single numbers, program ids and loop counters run over intervals, and every integer operation is followed. It
knows the operations that this repository's kernels use, and reports any other that makes an index as not understood.
"""

import re
from dataclasses import dataclass

Interval = tuple[int, int]

_SAME = ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi", "arith.trunci", '"tt.reduce"')
_INT = re.compile(r"(?:^|x)i(?:32|64)>?$")


@dataclass(frozen=True)
class Ranges:
    """What was found.

    Attributes:
        faults: lines with a 32-bit result outside 32 bits, or that were not understood.
        largest_offset: the largest number added to a pointer, in elements.
    """

    faults: list[str]
    largest_offset: int


def index_ranges(ttir: str, sizes: dict[str, int], programs: tuple[int, ...], loads: dict[str, int]) -> Ranges:
    """Follow all integers of a kernel.

    Args:
        ttir: the kernel after Triton's first passes, as text.
        sizes: integer argument -> its value.
        programs: programs along each axis of the grid.
        loads: pointer argument -> the largest number that may be read there; the smallest is 0.
    """
    values: dict[str, Interval | str | None] = {f"%{name}": (value, value) for name, value in sizes.items()}
    values |= {f"%{name}": name for name in loads}  # a pointer is the name of its argument
    faults, largest = [], 0
    for line in ttir.splitlines():
        line = line.split(" loc(")[0].strip()
        if loop := re.search(r"scf\.for (%\w+) = (%\w+) to (%\w+) step", line):
            low, high = values[loop[2]], values[loop[3]]
            values[loop[1]] = (low[0], high[1] - 1)
            continue
        if not (match := re.match(r'(%\w+) = ("?[\w.]+"?)[ (]?(.*)', line)):
            continue
        name, operation, rest = match.groups()
        kind = re.split(r" : | to | -> ", rest)[-1]
        operands = [values.get(operand) for operand in re.findall(r"%\w+", rest)]
        if operation == "tt.addptr":
            values[name] = operands[0]
            if operands[1] is None:
                faults.append(line)
            else:
                largest = max(largest, operands[1][1])
        elif operation in _SAME and "!tt.ptr" in rest:
            values[name] = operands[0]
        elif _INT.search(kind) or operation in ("tt.load", '"tt.reduce"'):
            values[name] = found = _interval(operation, rest, operands, programs, loads)
            arithmetic = operation in ("arith.addi", "arith.subi", "arith.muli")
            if (found is None and arithmetic) or (
                found and "i32" in kind and not -(2**31) <= found[0] <= found[1] < 2**31
            ):
                faults.append(line)
    return Ranges(faults, largest)


def _interval(operation, rest, operands, programs, loads) -> Interval | None:
    """The range of one integer result; None where it is unknown."""
    if operation == "arith.constant":
        value = int(re.search(r"-?\d+", rest)[0])
        return value, value
    if operation == "tt.make_range":
        return int(re.search(r"start = (\d+)", rest)[1]), int(re.search(r"end = (\d+)", rest)[1]) - 1
    if operation in ("tt.get_program_id", "tt.get_num_programs"):
        count = programs["xyz".index(rest[0])]
        return (0, count - 1) if operation == "tt.get_program_id" else (1, count)
    if operation == "tt.load":
        return (0, loads[operands[0]]) if operands[0] in loads else None
    if operation == "tt.bitcast":
        return -(2**31), 2**31 - 1
    if operation == "arith.extui" and re.search(r"\bi1\b|xi1>", rest):
        return 0, 1
    if operation == "arith.select":
        operands = operands[1:]
    if not operands or None in operands:
        return None
    a, b = operands[0], operands[-1]
    if operation in _SAME:
        return a
    if operation == "arith.addi":
        return a[0] + b[0], a[1] + b[1]
    if operation == "arith.subi":
        return a[0] - b[1], a[1] - b[0]
    if operation in ("arith.muli", "arith.divsi"):
        if operation == "arith.divsi" and b[0] < 1:
            return None
        corners = [x * y if operation == "arith.muli" else x // y for x in a for y in b]
        return min(corners), max(corners)
    if operation == "arith.remsi" and a[0] >= 0 and b[0] >= 1:
        return 0, min(a[1], b[1] - 1)
    if operation == "arith.shrsi" and b[0] == b[1]:
        return a[0] >> b[0], a[1] >> b[0]
    if operation == "arith.minsi":
        return min(a[0], b[0]), min(a[1], b[1])
    if operation == "arith.maxsi":
        return max(a[0], b[0]), max(a[1], b[1])
    if operation == "arith.select":
        return min(a[0], b[0]), max(a[1], b[1])
    return None
