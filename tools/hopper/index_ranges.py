"""Check for 32-bit integer overflow in a kernel: interval arithmetic over Triton's IR, without memory or a GPU.

Sizes are single numbers; program ids and loop counters are intervals. The check follows every integer operation. It
supports the operations that this repository's kernels use, and reports an index from any other operation as a fault.
"""

import re
from dataclasses import dataclass

Interval = tuple[int, int]

_RANGE_PRESERVING = ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi", "arith.trunci", '"tt.reduce"')
_INTEGER_TYPE = re.compile(r"(?:^|x)i(?:32|64)>?$")


@dataclass(frozen=True)
class IndexRanges:
    """Result of `index_ranges`.

    Attributes:
        faults: lines of the IR whose 32-bit result can overflow, or whose result or index has an unknown range, because
            an operation is not supported. Empty means that no index of the call overflows.
        largest_offset: the largest known offset that is added to a pointer, in elements; 0 if there is none.
    """

    faults: list[str]
    largest_offset: int


def index_ranges(
    ttir: str, sizes: dict[str, int], grid: tuple[int, ...], max_loaded_index: dict[str, int]
) -> IndexRanges:
    """Return the overflows and the largest pointer offset of one call, from the range of every integer of a kernel.

    Args:
        ttir: text of the kernel's Triton IR (TTIR), after Triton's first passes.
        sizes: integer argument -> its value in the call.
        grid: programs along each axis of the grid.
        max_loaded_index: pointer argument -> the largest integer that the kernel may read from it; the smallest is 0.
    """
    values: dict[str, Interval | str | None] = {f"%{name}": (value, value) for name, value in sizes.items()}
    values |= {f"%{name}": name for name in max_loaded_index}  # a pointer's value is the name of its argument
    faults, largest_offset = [], 0
    for line in ttir.splitlines():
        line = line.split(" loc(")[0].strip()
        if loop_match := re.search(r"scf\.for (%\w+) = (%\w+) to (%\w+) step", line):
            low, high = values[loop_match[2]], values[loop_match[3]]
            values[loop_match[1]] = (low[0], high[1] - 1)
            continue
        if not (match := re.match(r'(%\w+) = ("?[\w.]+"?)[ (]?(.*)', line)):
            continue
        name, operation, operand_text = match.groups()
        result_type = re.split(r" : | to | -> ", operand_text)[-1]
        operands = [values.get(operand) for operand in re.findall(r"%\w+", operand_text)]
        if operation == "tt.addptr":
            values[name] = operands[0]
            if operands[1] is None:
                faults.append(line)
            else:
                largest_offset = max(largest_offset, operands[1][1])
        elif operation in _RANGE_PRESERVING and "!tt.ptr" in operand_text:
            values[name] = operands[0]
        elif _INTEGER_TYPE.search(result_type) or operation in ("tt.load", '"tt.reduce"'):
            values[name] = interval = _result_interval(operation, operand_text, operands, grid, max_loaded_index)
            arithmetic = operation in ("arith.addi", "arith.subi", "arith.muli")
            if (interval is None and arithmetic) or (
                interval and "i32" in result_type and not -(2**31) <= interval[0] <= interval[1] < 2**31
            ):
                faults.append(line)
    return IndexRanges(faults, largest_offset)


def _result_interval(operation, operand_text, operands, grid, max_loaded_index) -> Interval | None:
    """Return (smallest, largest) value of one integer result; None if it is unknown.

    Args:
        operation: name of the IR operation.
        operand_text: text of the line after the operation.
        operands: for each operand its range, the name of a pointer argument, or None if it is unknown.
        grid, max_loaded_index: as for `index_ranges`.
    """
    if operation == "arith.constant":
        value = int(re.search(r"-?\d+", operand_text)[0])
        return value, value
    if operation == "tt.make_range":
        return int(re.search(r"start = (\d+)", operand_text)[1]), int(re.search(r"end = (\d+)", operand_text)[1]) - 1
    if operation in ("tt.get_program_id", "tt.get_num_programs"):
        num_programs = grid["xyz".index(operand_text[0])]
        return (0, num_programs - 1) if operation == "tt.get_program_id" else (1, num_programs)
    if operation == "tt.load":
        return (0, max_loaded_index[operands[0]]) if operands[0] in max_loaded_index else None
    if operation == "tt.bitcast":
        return -(2**31), 2**31 - 1
    if operation == "arith.extui" and re.search(r"\bi1\b|xi1>", operand_text):
        return 0, 1
    if operation == "arith.select":
        operands = operands[1:]
    if not operands or None in operands:
        return None
    left, right = operands[0], operands[-1]
    if operation in _RANGE_PRESERVING:
        return left
    if operation == "arith.addi":
        return left[0] + right[0], left[1] + right[1]
    if operation == "arith.subi":
        return left[0] - right[1], left[1] - right[0]
    if operation in ("arith.muli", "arith.divsi"):
        if operation == "arith.divsi" and right[0] < 1:
            return None
        corners = [x * y if operation == "arith.muli" else x // y for x in left for y in right]
        return min(corners), max(corners)
    if operation == "arith.remsi" and left[0] >= 0 and right[0] >= 1:
        return 0, min(left[1], right[1] - 1)
    if operation == "arith.shrsi" and right[0] == right[1]:
        return left[0] >> right[0], left[1] >> right[0]
    if operation == "arith.minsi":
        return min(left[0], right[0]), min(left[1], right[1])
    if operation == "arith.maxsi":
        return max(left[0], right[0]), max(left[1], right[1])
    if operation == "arith.select":
        return min(left[0], right[0]), max(left[1], right[1])
    return None
