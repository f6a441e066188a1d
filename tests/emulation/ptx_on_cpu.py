"""A Hopper GPU on a CPU, for tests: an interpreter of the PTX that Triton compiles for sm_90a.

    with on_hopper(): paged_decode(q, ...)  # CPU tensors, but the path and the kernels of the GPU

Programs run one after the other; the threads of a program run in lockstep. Triton's interpreter runs the source of a
kernel. This emulator runs the compiled code: bf16, fp16 and e4m3, tensor cores, the copy engine (TMA), packed
instructions and the software pipeline. It also specializes a launch as Triton does: it marks integers and addresses
that are multiples of 16, which the compiler makes use of.

It fails where a GPU might fail:
- an address outside every tensor, or not aligned to the size of its access;
- a barrier that some threads miss;
- shared memory that one warp writes and another warp accesses without a barrier between;
- a tile that changes while it is read.
The data of an asynchronous copy arrives only when the program waits for the copy, and its target is NaN until then.

It knows the instructions that Triton generates for this project's kernels; any other instruction is an error.
Approximate instructions are exact here, and a tensor-core sum is rounded once.
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from unittest.mock import patch

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

NUM_SMS = 2
"""Number of SMs: few, so that a persistent program runs its loop several times."""
_SHARED_BASE = 1024
"""Address at which a program's shared memory begins."""
_GUARD_BYTES = 4096
"""Bytes before and after each tensor; no program may access them."""
_NARROW_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
_NAN_BYTE = 0xFF
"""A byte that, repeated, is NaN in every format."""


@contextmanager
def on_hopper():
    """Route CPU tensors to the kernels inside the block, and run every Triton launch in this emulator."""
    properties = type("Properties", (), {"multi_processor_count": NUM_SMS})
    with (
        patch("thinksafe.kernels.dispatch.INTERPRETED", True),  # CPU tensors go to the kernels
        patch("torch.cuda.get_device_properties", lambda device: properties),
        patch.object(JITFunction, "run", _launch_on_cpu),
    ):
        yield


def _launch_on_cpu(kernel: JITFunction, *args, grid, warmup, num_warps=4, num_stages=3, **kwargs) -> None:
    """Compile a kernel for these arguments and run its whole grid on the CPU; the replacement of `JITFunction.run`.

    Args:
        args, kwargs: the kernel's arguments: tensors, tensor descriptors, numbers, None and constexprs.
        grid: number of programs on each of up to three axes.
        warmup: not used.
    """
    arguments_by_name = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, divisible_by_16 = {}, {}, []
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments_by_name[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _triton_type(value)
        if (
            not isinstance(value, float | TensorDescriptor)
            and (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0
        ):
            divisible_by_16.append(index)
    ptx, shared_bytes = compile_ptx(
        kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible_by_16), num_warps, num_stages
    )
    memory = _Memory()
    kernel_arguments = []
    for name, value in arguments_by_name.items():
        if isinstance(value, TensorDescriptor):
            kernel_arguments += [_TileDescriptor(memory.address(value.base), value), *value.shape, *value.strides]
        elif signature[name] != "constexpr":
            kernel_arguments.append(memory.address(value))
    code = _parse_ptx(ptx)
    for program_index in np.ndindex(*grid):
        _Program(code, memory, kernel_arguments, shared_bytes, num_warps, program_index, grid).run()
    memory.write_back()


_TYPES = {
    torch.float8_e4m3fn: "fp8e4nv", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip


def _triton_type(value) -> str:
    """Return the type of an argument in Triton's signature, such as `*bf16` for a tensor or `i32` for a number."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@cache
def compile_ptx(kernel, signature, constants, divisible_by_16, num_warps, num_stages) -> tuple[str, int]:
    """Return the PTX of a kernel for sm_90a, and the bytes of shared memory that one of its programs needs.

    Args:
        signature, constants: pairs (parameter name, Triton type) and (parameter name, constexpr value).
        divisible_by_16: indices of the parameters whose values are multiples of 16.
    """
    attributes = {(index,): [["tt.divisibility", 16]] for index in divisible_by_16}
    source = ASTSource(kernel, dict(signature), dict(constants), attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.asm["ptx"], compiled.metadata.shared


@dataclass(frozen=True)
class _TileDescriptor:
    """A matrix and the tiles that the copy engine moves. Rows of a tile are swizzled lines of 128, 64 or 32 bytes.

    Attributes:
        address: address of the matrix's first element.
        matrix: the matrix and the shape of its tiles, as the kernel got it.
    """

    address: int
    matrix: TensorDescriptor

    def tile_addresses(self, column: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the address of each byte of a tile, and whether it is in the matrix, [rows, bytes of a line] each.

        Args:
            column, row: index of the tile's first element in the matrix. Lines have at most 128 bytes, also if the tile
                is wider.
        """
        itemsize, (height, width), matrix_shape = (
            self.matrix.base.element_size(),
            self.matrix.block_shape,
            self.matrix.shape,
        )
        rows = np.arange(row, row + height)[:, None]
        columns = column * itemsize + np.arange(min(width * itemsize, 128))[None, :]
        return self.address + rows * self.matrix.strides[0] * itemsize + columns, (rows < matrix_shape[0]) & (
            columns < matrix_shape[1] * itemsize
        )


class _Memory:
    """An address space that holds copies of the tensors of a launch, until `write_back`.

    The addresses of storages are multiples of 16 but not of 32.

    Attributes:
        bytes: [size] uint8, the contents.
        valid: [size] bool, whether a byte belongs to a tensor; all others are guard bytes.
    """

    def __init__(self):
        self._allocations: dict[int, tuple[Tensor, int]] = {}
        self.bytes, self.valid = np.zeros(_GUARD_BYTES, np.uint8), np.zeros(_GUARD_BYTES, bool)

    def address(self, value):
        """Return the address of a tensor, which is copied into this memory if it is new; return a number unchanged."""
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self._allocations:
            storage_bytes = torch.empty(0, dtype=torch.uint8).set_(storage)
            start = -(-len(self.bytes) // 32) * 32 + 16
            new_size = start + len(storage_bytes) + _GUARD_BYTES
            self.bytes, self.valid = (np.pad(a, (0, new_size - len(a))) for a in (self.bytes, self.valid))
            self.bytes[start : start + len(storage_bytes)] = storage_bytes.numpy()
            self.valid[start : start + len(storage_bytes)] = True
            self._allocations[storage.data_ptr()] = storage_bytes, start
        return self._allocations[storage.data_ptr()][1] + value.storage_offset() * value.element_size()

    def write_back(self) -> None:
        """Copy the contents of this memory back into the tensors of the launch."""
        for storage_bytes, start in self._allocations.values():
            storage_bytes.copy_(torch.from_numpy(self.bytes[start : start + len(storage_bytes)]))

    def check_addresses(self, addresses: np.ndarray) -> None:
        """Fail unless all addresses belong to a tensor; an empty array passes."""
        assert addresses.size == 0 or (addresses.max() < len(self.valid) and self.valid[addresses].all()), (
            "an address is outside every tensor"
        )


# Parsing


@dataclass(frozen=True)
class _Instruction:
    """One instruction of PTX.

    Attributes:
        text: the instruction without its guard, for error messages.
        opcode: its name, split at the dots: `ld.global.b32` gives ["ld", "global", "b32"].
        operands: as `_parse_operands` returns them; the destination is first.
        guard: predicate register of `@%p1` or `@!%p1`; None for an instruction that always runs.
        guard_value: value of the guard for which the instruction runs.
    """

    text: str
    opcode: list[str]
    operands: list
    guard: str | None
    guard_value: bool


@dataclass
class _Code:
    """A kernel.

    Attributes:
        labels: {label: index of the instruction that follows it}.
    """

    instructions: list[_Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@cache
def _parse_ptx(ptx: str) -> _Code:
    """Return the instructions and labels of the only kernel in a PTX text."""
    body = ptx[ptx.index(".reqntid") :]
    body = re.sub(r"//.*", "", body[body.index("{") + 1 :])
    body = body[: body.index("$L__func_end")] if "$L__func_end" in body else body
    body = re.sub(r"^\s*\.(loc|file|pragma|section|b\d+).*$", "", body, flags=re.M)
    body = re.sub(r"^\s*(\$\w+):", r"label \1;", body, flags=re.M)
    code = _Code()
    for statement in body.split(";"):
        text = re.sub(r"\s+", " ", statement).strip()
        text = re.sub(r"^[{} ]*(\.reg \.pred complete)?", "", text)  # scopes of inline assembly
        if not text or text.startswith("."):
            continue
        if text.startswith("label "):
            code.labels[text[6:]] = len(code.instructions)
            continue
        guard, guard_value = None, True
        text = re.sub(r"^\w+: ", "", text)
        if guard_match := re.match(r"@(!?)([%\w]+) ", text):
            guard, guard_value, text = guard_match[2], not guard_match[1], text[guard_match.end() :]
        name, _, operand_text = text.partition(" ")
        code.instructions.append(_Instruction(text, name.split("."), _parse_operands(operand_text), guard, guard_value))
    return code


def _parse_operands(text: str) -> list:
    """Return the operands of an instruction, split at commas.

    {a, b} becomes a list, [a+8] a tuple (base, offset), [a, {b, c}] a tuple (base, list), and any other operand stays
    text.
    """
    operands = []
    for token in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text):
        if token[0] == "{":
            operands.append([register.strip() for register in token[1:-1].split(",")])
        elif "{" in token:
            base, *coordinates = re.findall(r"[%\w]+", token)
            operands.append((base, coordinates))
        elif token[0] == "[":
            base, _, offset = token[1:-1].replace(" ", "").partition("+")
            operands.append((base, int(offset or 0)))
        else:
            operands.append(token)
    return operands


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@cache
def _numpy_dtype(ptx_type: str) -> np.dtype:
    """Return the dtype of a PTX type: 's32' -> int32, 'b64' -> uint64, 'f32' -> float32, 'f16' -> uint16 (its bits)."""
    itemsize = int(ptx_type.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8
    return np.dtype(f"{'f' if ptx_type == 'f32' else 'i' if ptx_type[0] == 's' else 'u'}{itemsize}")


@cache
def _register_bytes(name: str) -> int | None:
    """Return the bytes of a register, which its prefix gives; None for a register of inline assembly."""
    return {"%p": 1, "%rs": 2, "%r": 4, "%rd": 8}.get(name.rstrip("0123456789"))


@cache
def _immediate(text: str, itemsize: int, num_threads: int) -> np.ndarray:
    """Return the bits of a constant operand, [threads]."""
    number = int(text[2:], 16) if text.startswith("0f") else int(text.rstrip("U"), 0)
    return np.full(num_threads, number & ((1 << 8 * itemsize) - 1), _UNSIGNED[itemsize])


def _widen(bits: np.ndarray, ptx_type: str) -> np.ndarray:
    """Return the fp32 values that bits in a narrower format represent, in the same shape.

    Args:
        bits: uint16 elements, or uint8 for e4m3.
        ptx_type: `f16`, `bf16` or `e4m3`.
    """
    return torch.from_numpy(np.ascontiguousarray(bits)).view(_NARROW_DTYPES[ptx_type]).float().numpy()


def _round_to(values: np.ndarray, ptx_type: str) -> np.ndarray:
    """Return the bits of fp32 values rounded to a narrower format: uint16, or uint8 for e4m3.

    Args:
        ptx_type: `f16`, `bf16` or `e4m3`.
    """
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(_NARROW_DTYPES[ptx_type])
    return (
        rounded.numpy().view(np.uint16)
        if ptx_type == "f16"
        else rounded.view(torch.uint16 if ptx_type == "bf16" else torch.uint8).numpy()
    )


class _Program:
    """One program of the grid. A register is an array [threads] of unsigned bits, or of booleans for a predicate.

    Args:
        arguments: the kernel's arguments: addresses, numbers, and for each tensor descriptor a _TileDescriptor followed
            by its shape and strides.
        index, grid: index of the program, and number of programs, on each axis.
    """

    def __init__(self, code: _Code, memory: _Memory, arguments, shared_bytes: int, num_warps: int, index, grid):
        self.code, self.memory, self.arguments = code, memory, arguments
        self.num_threads, self.num_warps = 32 * num_warps, num_warps
        self.thread_ids, self.every_thread = np.arange(self.num_threads), np.full(self.num_threads, True)
        self.shared_memory = np.full(_SHARED_BASE + shared_bytes, _NAN_BYTE, np.uint8)
        self.barrier_epoch = 0
        # For every byte of shared memory: the barrier epoch of the last access, and its warp, or -1 for several warps.
        self.last_writes, self.last_reads = (np.full((2, len(self.shared_memory)), -1, np.int32) for _ in range(2))
        self.registers: dict[str, np.ndarray] = {}
        self.special_registers = {"%tid.x": self.thread_ids}
        for axis, name in enumerate("xyz"):
            self.special_registers[f"%ctaid.{name}"] = np.int64(index[axis] if axis < len(index) else 0)
            self.special_registers[f"%nctaid.{name}"] = np.int64(grid[axis] if axis < len(grid) else 1)
        self.async_copies: list[list] = [[]]  # copies by group; the last group is open
        self.wgmma_reads, self.tma_store_reads = [[]], [[]]  # tiles read by tensor cores and copy engine, by group
        self.mbarriers: dict[int, list] = {}  # address -> phase, pending arrivals, expected bytes, pending copies

    def run(self) -> None:
        """Run the program to its end; threads at the lowest program counter go first.

        Raises:
            AssertionError: an instruction is unknown or breaks a rule of the GPU, with the text of the instruction; or
                the program ends without waiting for an asynchronous operation.
        """
        instructions, end = self.code.instructions, len(self.code.instructions)
        pc, counters = 0, None  # program counters of the threads, or None while all threads are at `pc`
        with np.errstate(all="ignore"):
            while pc < end:
                instruction = instructions[pc]
                at_pc = self.every_thread if counters is None else counters == pc
                active = (
                    at_pc & (self.registers[instruction.guard] == instruction.guard_value)
                    if instruction.guard
                    else at_pc
                )
                target = None
                if active.any():
                    if instruction.opcode[0] == "bra":
                        target = self.code.labels[instruction.operands[0]]
                    elif instruction.opcode[0] == "ret":
                        target = end
                    else:
                        try:
                            self.execute(instruction, active)
                        except Exception as error:
                            raise AssertionError(f"{instruction.text}: {error}") from error
                if counters is None and (target is None or active.all()):
                    pc = pc + 1 if target is None else target
                    continue
                if counters is None:
                    counters = np.full(self.num_threads, pc)
                counters[at_pc] = pc + 1
                if target is not None:
                    counters[active] = target
                pc = int(counters.min())
                if (counters == pc).all():
                    counters = None
        pending = [
            *self.async_copies,
            *self.wgmma_reads,
            *self.tma_store_reads,
            *(group for *_, group in self.mbarriers.values()),
        ]
        assert not any(pending), "the program never waited for an asynchronous operation"

    # Operands

    def read_operand(self, operand: str, dtype) -> np.ndarray:
        """Return the value of an operand in every thread, [threads]: a register, a constant, or a parameter's index.

        Args:
            dtype: dtype in which the bits are read; booleans stay booleans.
        """
        dtype = np.dtype(dtype)
        if operand in self.special_registers:
            return np.broadcast_to(self.special_registers[operand], self.num_threads).astype(dtype)
        if operand.startswith("global_smem"):
            return np.full(self.num_threads, _SHARED_BASE, dtype)
        if "_param_" in operand:  # the address of a parameter is its index
            return np.full(self.num_threads, int(operand.rsplit("_", 1)[1]), dtype)
        if operand[0] == "%" or operand.isidentifier():
            bits = self.registers.get(operand)
            if bits is None:  # never set: the compiler uses such registers only where the value is irrelevant
                bits = np.full(self.num_threads, (1 << 8 * dtype.itemsize) - 1, _UNSIGNED[dtype.itemsize])
            if bits.dtype == bool or bits.dtype.itemsize == dtype.itemsize:
                return bits.view(dtype) if bits.dtype != bool else bits
            return bits.astype(_UNSIGNED[dtype.itemsize]).view(dtype)
        return _immediate(operand, dtype.itemsize, self.num_threads).view(dtype)

    def write_register(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        """Set a register in the active threads. Several registers may share one array, which is never changed."""
        if np.shape(value) != (self.num_threads,):
            value = np.broadcast_to(value, self.num_threads)
        value = np.ascontiguousarray(value)
        if value.dtype != bool:
            value = value.view(_UNSIGNED[value.dtype.itemsize])
            value = value.astype(_UNSIGNED[_register_bytes(name) or value.dtype.itemsize], copy=False)
        if active is not self.every_thread and not active.all():
            previous = self.registers.get(name)
            if previous is not None:
                value = np.where(active, value, previous)
        self.registers[name] = value

    def predicate(self, operand: str) -> np.ndarray:
        """Return a predicate register or a constant as booleans, [threads]."""
        if operand[0] == "%":
            return self.registers[operand]
        return np.full(self.num_threads, operand not in ("0", "false"))

    # Memory

    def byte_addresses(self, operand, size: int, active: np.ndarray) -> np.ndarray:
        """Return the address of every byte of an access, [active threads, size]; the first must be a multiple of size.

        Args:
            operand: (register of the address, offset in bytes).
            size: bytes that each thread accesses.
        """
        base, offset = operand
        addresses = (
            self.read_operand(base, np.uint64 if base.startswith("%rd") else np.uint32).astype(np.int64)[active]
            + offset
        )
        assert (addresses % size == 0).all(), f"an address is not a multiple of {size}"
        return addresses[:, None] + np.arange(size)

    def access_shared(self, addresses: np.ndarray, warps: np.ndarray, data: np.ndarray | None = None) -> None:
        """Record an access to shared memory and check for races; write `data`, or without it only record a read.

        An access is a race if another warp accessed the byte since the last barrier and one of both wrote. Writing the
        value that a byte already holds is no race.

        Args:
            addresses: [accesses, bytes of an access].
            warps: [accesses], warp of each access.
            data: bytes to write, in the shape of `addresses`; None for a read.
        """
        assert addresses.min() >= _SHARED_BASE and addresses.max() < len(self.shared_memory), (
            "an address is outside shared memory"
        )
        addresses, warps = addresses.reshape(-1), warps.repeat(addresses.shape[1])
        changed = slice(None)
        if data is not None:
            changed = self.shared_memory[addresses] != data.reshape(-1)
            self._check_no_race(self.last_reads, addresses[changed], warps[changed])
        self._check_no_race(self.last_writes, addresses[changed], warps[changed])
        epochs, owners = self.last_reads if data is None else self.last_writes
        by_other_warps = (epochs[addresses] == self.barrier_epoch) & (owners[addresses] != warps)
        epochs[addresses], owners[addresses] = self.barrier_epoch, warps
        owners[addresses[by_other_warps | (owners[addresses] != warps)]] = -1
        if data is not None:
            self.shared_memory[addresses] = data.reshape(-1)
            assert (self.shared_memory[addresses] == data.reshape(-1)).all(), "two threads write to one address"

    def _check_no_race(
        self, last_access: tuple[np.ndarray, np.ndarray], addresses: np.ndarray, warps: np.ndarray
    ) -> None:
        epochs, owners = last_access
        assert not ((epochs[addresses] == self.barrier_epoch) & (owners[addresses] != warps)).any(), (
            "a race between two warps"
        )

    def load(self, space: str, operand, size: int, active: np.ndarray) -> np.ndarray:
        """Return the bytes that each active thread reads, [active threads, size].

        Args:
            space: `shared` or `global`.
        """
        addresses = self.byte_addresses(operand, size, active)
        if space == "shared":
            self.access_shared(addresses, self.thread_ids[active] // 32)
            return self.shared_memory[addresses]
        self.memory.check_addresses(addresses)
        return self.memory.bytes[addresses]

    def store(self, space: str, operand, data: np.ndarray, active: np.ndarray) -> None:
        """Write data [active threads, size] uint8; `space` is `shared` or `global`."""
        addresses = self.byte_addresses(operand, data.shape[1], active)
        if space == "shared":
            self.access_shared(addresses, self.thread_ids[active] // 32, data)
        else:
            self.memory.check_addresses(addresses)
            self.memory.bytes[addresses] = data

    # Instructions

    def execute(self, instruction: _Instruction, active: np.ndarray) -> None:
        """Run an instruction in the active threads: by its method `op_NAME`, else by its entry of `_ELEMENTWISE`."""
        opcode, operands = instruction.opcode, instruction.operands
        handler = getattr(self, f"op_{opcode[0]}", None)
        if handler is not None:
            handler(opcode, operands, active)
            return
        ptx_type = opcode[-1]
        destination, *sources = operands
        if ptx_type == "pred":
            values = [self.predicate(source) for source in sources]
        elif (narrow_type := ptx_type.removesuffix("x2")) in _NARROW_DTYPES:  # one value or a pair, rounded once
            source_bits = [
                np.ascontiguousarray(self.read_operand(source, _UNSIGNED[4 if "x2" in ptx_type else 2]))
                for source in sources
            ]
            values = [_widen(operand_bits[:, None].view(np.uint16), narrow_type) for operand_bits in source_bits]
            result = _round_to(_ELEMENTWISE[opcode[0]](opcode, *values), narrow_type)
            self.write_register(destination, result.view(source_bits[0].dtype)[:, 0], active)
            return
        else:
            values = [self.read_operand(source, _numpy_dtype(ptx_type)) for source in sources]
            if opcode[:2] == ["mad", "wide"]:
                values[2] = self.read_operand(sources[2], np.uint64)
        flush = _flush_subnormals if "ftz" in opcode else lambda x: x
        self.write_register(destination, flush(_ELEMENTWISE[opcode[0]](opcode, *map(flush, values))), active)

    def op_mov(self, opcode, operands, active) -> None:
        destination, source = operands
        if opcode[1] == "pred":
            self.write_register(destination, self.predicate(source), active)
        elif isinstance(source, list):
            part_bytes = int(opcode[1][1:]) // 8 // len(source)
            bits = [self.read_operand(register, _UNSIGNED[part_bytes]) for register in source]
            self.write_register(destination, np.stack(bits, 1).view(_numpy_dtype(opcode[1]))[:, 0], active)
        elif isinstance(destination, list):
            part_bytes = int(opcode[1][1:]) // 8 // len(destination)
            bits = np.ascontiguousarray(self.read_operand(source, _numpy_dtype(opcode[1])))[:, None].view(
                _UNSIGNED[part_bytes]
            )
            for index, register in enumerate(destination):
                self.write_register(register, bits[:, index], active)
        else:
            self.write_register(destination, self.read_operand(source, _numpy_dtype(opcode[1])), active)

    def op_cvt(self, opcode, operands, active) -> None:
        target_type, source_type = opcode[-2:]
        destination, *sources = operands
        if target_type.endswith("x2"):  # the first source is the upper half
            values = np.stack([self.read_operand(source, np.float32) for source in reversed(sources)], 1)
            if source_type == "e4m3x2":
                halves = np.ascontiguousarray(self.read_operand(sources[0], np.uint16))[:, None].view(np.uint8)
                values = _widen(halves, "e4m3")
            if "satfinite" in opcode:
                values = np.clip(values, -448, 448)
            halves = _round_to(values, target_type[:-2])
            self.write_register(destination, halves.view(_UNSIGNED[2 * halves.dtype.itemsize])[:, 0], active)
            return
        value = self.read_operand(sources[0], _numpy_dtype(source_type))
        if source_type in _NARROW_DTYPES:
            value = _widen(value, source_type)
        if target_type in _NARROW_DTYPES:
            value = _round_to(value.astype(np.float32), target_type)
        self.write_register(destination, value.astype(_numpy_dtype(target_type)), active)

    def op_setp(self, opcode, operands, active) -> None:
        destination, left_source, right_source = operands
        a, b = (self.read_operand(operand, _numpy_dtype(opcode[-1])) for operand in (left_source, right_source))
        compare = {
            "lt": np.less,
            "le": np.less_equal,
            "gt": np.greater,
            "ge": np.greater_equal,
            "eq": np.equal,
            "ne": np.not_equal,
        }
        self.write_register(destination, compare[opcode[1]](a, b), active)

    def op_selp(self, opcode, operands, active) -> None:
        destination, source_if_true, source_if_false, selector = operands
        values = (self.read_operand(operand, _numpy_dtype(opcode[1])) for operand in (source_if_true, source_if_false))
        self.write_register(destination, np.where(self.predicate(selector), *values), active)

    def op_bfe(self, opcode, operands, active) -> None:
        destination, source, start, length = operands
        bits = self.read_operand(source, np.uint32)
        start, length = int(start), int(length)
        extracted = (bits >> start) & np.uint32((1 << length) - 1)
        if opcode[1] == "s32":
            extracted = ((extracted << (32 - length)).view(np.int32) >> (32 - length)).view(np.uint32)
        self.write_register(destination, extracted, active)

    def op_prmt(self, opcode, operands, active) -> None:
        destination, low, high, selector = operands
        source_bytes = np.stack([self.read_operand(operand, np.uint32) for operand in (low, high)], 1).view(np.uint8)
        selectors = self.read_operand(selector, np.uint32)
        result = np.empty((self.num_threads, 4), np.uint8)
        for byte in range(4):
            nibble = (selectors >> (4 * byte)) & 0xF
            selected = source_bytes[self.thread_ids, nibble & 7]
            result[:, byte] = np.where(nibble & 8, np.where(selected & 0x80, 0xFF, 0), selected)
        self.write_register(destination, result.view(np.uint32)[:, 0], active)

    def op_shfl(self, opcode, operands, active) -> None:
        assert active.all(), "some lanes miss a shuffle"
        destination, source, lane, *_ = operands
        lane, own_lane = self.read_operand(lane, np.int32), self.thread_ids % 32
        source_lane = {
            "bfly": own_lane ^ lane,
            "idx": lane & 31,
            "up": np.where(own_lane >= lane, own_lane - lane, own_lane),
        }[opcode[2]]
        self.write_register(
            destination, self.read_operand(source, np.uint32)[self.thread_ids // 32 * 32 + source_lane], active
        )

    def op_redux(self, opcode, operands, active) -> None:
        assert active.all(), "some lanes miss a reduction"
        destination, source, _ = operands
        reduce = {"min": np.min, "max": np.max, "add": np.sum}[opcode[2]]
        by_warp = reduce(self.read_operand(source, np.int32).reshape(self.num_warps, 32), axis=1)
        self.write_register(destination, by_warp.astype(np.int32).repeat(32), active)

    def op_ld(self, opcode, operands, active) -> None:
        destination, source = operands
        if opcode[1] == "param":
            argument = self.arguments[int(source[0].rsplit("_", 1)[1])] if source[0] else 0
            dtype = np.float32 if isinstance(argument, float) else np.int64
            bits = np.full(self.num_threads, argument, dtype).view(_UNSIGNED[np.dtype(dtype).itemsize])
            self.write_register(destination, bits.astype(_numpy_dtype(opcode[-1])), active)
            return
        destinations = destination if isinstance(destination, list) else [destination]
        element_bytes = int(opcode[-1][1:]) // 8
        data = self.load(opcode[1].split("::")[0], source, element_bytes * len(destinations), active)
        for index, register in enumerate(destinations):
            register_bits = np.zeros(self.num_threads, _UNSIGNED[element_bytes])
            register_bits[active] = np.ascontiguousarray(
                data[:, index * element_bytes : (index + 1) * element_bytes]
            ).view(_UNSIGNED[element_bytes])[:, 0]
            self.write_register(register, register_bits, active)

    def op_st(self, opcode, operands, active) -> None:
        target, source = operands
        sources = source if isinstance(source, list) else [source]
        element_bytes = int(opcode[-1][1:]) // 8
        data = [
            np.ascontiguousarray(self.read_operand(register, _UNSIGNED[element_bytes])[active])[:, None].view(np.uint8)
            for register in sources
        ]
        self.store(opcode[1].split("::")[0], target, np.concatenate(data, 1), active)

    def op_bar(self, opcode, operands, active) -> None:
        if opcode[1] == "sync":
            assert active.all(), "some threads miss a barrier"
            self.barrier_epoch += 1

    def op_cvta(self, opcode, operands, active) -> None:
        self.write_register(operands[0], self.read_operand(operands[1], np.uint64), active)

    def op_elect(self, opcode, operands, active) -> None:
        lane, is_elected = operands[0].split("|")
        self.write_register(lane, np.zeros(self.num_threads, np.uint32), active)
        self.write_register(is_elected, self.thread_ids % 32 == 0, active)

    def uniform_value(self, operand: str, active: np.ndarray) -> int:
        """Return the value of an operand as one number; fail if it differs between the active threads."""
        values = np.unique(self.read_operand(operand, np.int32)[active])
        assert len(values) == 1, f"{operand} differs between threads"
        return int(values[0])

    def op_mbarrier(self, opcode, operands, active) -> None:
        assert opcode[1] == "try_wait" or active.sum() == 1, "several threads run an instruction for one thread"
        base, offset = operands[1 if opcode[1] in ("arrive", "try_wait") else 0]
        address = self.uniform_value(base, active) + offset
        if opcode[1] == "init":
            self.mbarriers[address] = [0, int(operands[1]), 0, []]
        elif opcode[1] == "inval":
            assert not self.mbarriers.pop(address)[3], "the program never waited for an asynchronous operation"
        elif opcode[1] == "arrive":
            self.mbarriers[address][1] -= 1
            self.mbarriers[address][2] += int(operands[2])
        else:
            phase, arrivals, expected_bytes, copies = self.mbarriers[address]
            if phase == self.uniform_value(operands[2], active):  # the phase ends when all data has arrived
                assert arrivals == 0 and expected_bytes == sum(data.size for _, data in copies), "a wait never ends"
                for addresses, data in copies:
                    self.shared_memory[addresses] = data
                self.mbarriers[address] = [1 - phase, 1, 0, []]
            self.write_register(operands[0], np.full(self.num_threads, True), active)

    def move_tile(self, opcode, operands, active) -> None:
        """Move a tile with the copy engine.

        A load overwrites its shared memory with NaN at once; the data arrives when the program waits for the barrier. A
        store reads its shared memory, which must not change before the program has waited for the store.

        Args:
            active: mask of the one thread that runs the instruction.
        """
        is_store = opcode[5] == "global"
        (shared_base, offset), (source, coordinates) = operands[:2] if not is_store else operands[1::-1]
        tile = self.arguments[self.uniform_value(source, active)]
        matrix_addresses, in_matrix = tile.tile_addresses(
            *(self.uniform_value(coordinate, active) for coordinate in coordinates)
        )
        self.memory.check_addresses(matrix_addresses[in_matrix])
        shared_addresses = (
            self.uniform_value(shared_base, active)
            + offset
            + np.arange(matrix_addresses.size).reshape(matrix_addresses.shape)
        )
        shared_addresses, warps = (
            _swizzle(shared_addresses, matrix_addresses.shape[1]),
            np.repeat(self.thread_ids[active] // 32, len(matrix_addresses)),
        )
        if is_store:
            self.access_shared(shared_addresses, warps)
            self.memory.bytes[matrix_addresses[in_matrix]] = self.shared_memory[shared_addresses[in_matrix]]
            self.tma_store_reads[-1].append((shared_addresses, self.shared_memory[shared_addresses]))
        else:
            data = np.where(in_matrix, self.memory.bytes[np.where(in_matrix, matrix_addresses, 0)], 0).astype(np.uint8)
            self.access_shared(shared_addresses, warps, np.full_like(data, _NAN_BYTE))
            self.last_writes[0, shared_addresses] = -1  # any warp may read it after its barrier
            barrier, offset = operands[2]
            self.mbarriers[self.uniform_value(barrier, active) + offset][3].append((shared_addresses, data))

    def retire_groups(self, groups: list[list], num_pending: int) -> None:
        """Remove all groups except the last `num_pending` and the open one; fail if a tile of theirs has changed.

        Args:
            groups: pairs (addresses, bytes at the time of the read) of shared memory, by group; changed in place.
        """
        num_ready = max(len(groups) - 1 - num_pending, 0)
        for addresses, data in chain.from_iterable(groups[:num_ready]):
            assert (self.shared_memory[addresses] == data).all(), "a tile changed while it was read"
        del groups[:num_ready]

    def op_cp(self, opcode, operands, active) -> None:
        if "tensor" in opcode:
            for thread in self.thread_ids[active]:  # at most one per warp; rows above 128 bytes are several tiles
                self.move_tile(opcode, operands, self.thread_ids == thread)
        elif opcode[2:4] == ["bulk", "commit_group"]:
            self.tma_store_reads.append([])
        elif opcode[2:4] == ["bulk", "wait_group"]:
            self.retire_groups(self.tma_store_reads, int(operands[0]))
        elif opcode[2] == "commit_group":
            self.async_copies.append([])
        elif opcode[2] == "wait_group":
            num_ready = len(self.async_copies) - 1 - int(operands[0])
            for group in self.async_copies[: max(num_ready, 0)]:
                for shared_addresses, data, warps in group:
                    self.access_shared(shared_addresses, warps, data)
            self.async_copies = self.async_copies[max(num_ready, 0) :]
        else:
            target, source, num_bytes, *source_size = operands
            num_bytes = int(num_bytes, 0)
            shared_addresses = self.byte_addresses(target, num_bytes, active)
            is_copied = (
                self.read_operand(source_size[0], np.int32)[active] > 0
                if source_size
                else np.full(len(shared_addresses), True)
            )
            addresses = self.byte_addresses(source, num_bytes, active)
            self.memory.check_addresses(addresses[is_copied])
            data = np.where(
                is_copied[:, None], self.memory.bytes[np.where(is_copied[:, None], addresses, 0)], 0
            ).astype(np.uint8)
            warps = self.thread_ids[active] // 32
            self.access_shared(shared_addresses, warps, np.full_like(data, _NAN_BYTE))
            self.async_copies[-1].append((shared_addresses, data, warps))

    def op_fence(self, opcode, operands, active) -> None:
        """Do nothing: a fence orders two kinds of access to shared memory, which are one kind here."""

    def op_ldmatrix(self, opcode, operands, active) -> None:
        assert active.all(), "some lanes miss a tile"
        destinations, source = operands
        addresses = self.byte_addresses(source, 16, active).reshape(self.num_warps, 32, 16)[:, : 8 * len(destinations)]
        self.access_shared(addresses.reshape(-1, 16), np.repeat(np.arange(self.num_warps), 8 * len(destinations)))
        rows = self.shared_memory[addresses].view(np.uint16).reshape(self.num_warps, len(destinations), 8, 8)
        if "trans" in opcode:
            rows = rows.swapaxes(2, 3)
        for index, register in enumerate(destinations):
            self.write_register(register, np.ascontiguousarray(rows[:, index]).view(np.uint32).reshape(-1), active)

    def op_stmatrix(self, opcode, operands, active) -> None:
        assert active.all(), "some lanes miss a tile"
        target, sources = operands
        addresses = self.byte_addresses(target, 16, active).reshape(self.num_warps, 32, 16)[:, : 8 * len(sources)]
        rows = np.stack([np.ascontiguousarray(self.read_operand(register, np.uint32)) for register in sources], 1)
        rows = rows.reshape(self.num_warps, 8, 4, len(sources)).swapaxes(2, 3).swapaxes(1, 2)  # warp, tile, row, pair
        rows = np.ascontiguousarray(rows).view(np.uint16)
        data = np.ascontiguousarray(rows.swapaxes(2, 3) if "trans" in opcode else rows).view(np.uint8).reshape(-1, 16)
        self.access_shared(addresses.reshape(-1, 16), np.repeat(np.arange(self.num_warps), 8 * len(sources)), data)

    # Tensor cores: lane 4 * g + t holds the pair of columns that starts at 2 * t, of rows g and g + 8

    def register_pairs(self, registers: list[str], ptx_type: str) -> np.ndarray:
        """Return the pairs of 16-bit elements in registers, [warps, g = 8, t = 4, registers, 2] fp64."""
        bits = np.stack([self.read_operand(register, np.uint32) for register in registers], 1)
        values = _widen(bits.view(np.uint16), ptx_type).astype(np.float64)
        return values.reshape(self.num_warps, 8, 4, len(registers), 2)

    def left_operand(self, registers: list[str], ptx_type: str) -> np.ndarray:
        """Return the left operand of a matmul, which four registers hold, [warps, 16, 16] fp64."""
        halves = self.register_pairs(registers, ptx_type).reshape(
            self.num_warps, 8, 4, 2, 2, 2
        )  # g, t, half of columns, half of rows, pair
        return halves.transpose(0, 4, 1, 3, 2, 5).reshape(self.num_warps, 16, 16)

    def accumulator(self, registers: list[str]) -> np.ndarray:
        """Return the accumulator that 4 * blocks registers hold, [warps, 16, 8 * blocks] fp64."""
        values = np.stack([self.read_operand(register, np.float32) for register in registers], 1).astype(np.float64)
        values = values.reshape(self.num_warps, 8, 4, len(registers) // 4, 2, 2)  # g, t, block, half of rows, pair
        return values.transpose(0, 4, 1, 3, 2, 5).reshape(self.num_warps, 16, -1)

    def set_accumulator(self, registers: list[str], accumulator: np.ndarray) -> None:
        """Write an accumulator [warps, 16, 8 * blocks] to its registers, rounded to fp32."""
        values = accumulator.reshape(self.num_warps, 2, 8, len(registers) // 4, 4, 2).transpose(0, 2, 4, 3, 1, 5)
        values = values.reshape(self.num_threads, len(registers)).astype(np.float32)
        for index, register in enumerate(registers):
            self.write_register(register, values[:, index], np.full(self.num_threads, True))

    def op_mma(self, opcode, operands, active) -> None:
        assert active.all(), "some lanes miss a matmul"
        destination, left, right, addend = operands
        columns = self.register_pairs(right, opcode[8]).transpose(0, 3, 2, 4, 1).reshape(self.num_warps, 16, 8)
        self.set_accumulator(destination, self.accumulator(addend) + self.left_operand(left, opcode[7]) @ columns)

    def op_wgmma(self, opcode, operands, active) -> None:
        assert active.all(), "some threads miss a matmul"
        if opcode[1] == "mma_async":
            self.warp_group_mma(opcode, operands)
        elif opcode[1] == "commit_group":
            self.wgmma_reads.append([])
        elif opcode[1] == "wait_group":
            self.retire_groups(self.wgmma_reads, int(operands[0]))

    def warp_group_mma(self, opcode, operands) -> None:
        """Compute a wgmma and write its result at once, before the program waits for it.

        The compiler moves results to other registers before the wait, which ptxas understands.
        """
        destination, left, right, accumulate, *flags = operands
        width, ptx_type = int(re.search(r"n(\d+)k", opcode[4])[1]), opcode[6]
        transposed = [flag == "1" for flag in flags[2:]] or [False]
        if isinstance(left, list):
            rows = self.left_operand(left, ptx_type)
        else:
            rows = self.descriptor_tile(left, 64, ptx_type, transposed[0])
            rows = rows.reshape(self.num_warps, 16, rows.shape[2])
        columns = self.descriptor_tile(right, width, ptx_type, transposed[-1]).repeat(4, axis=0).swapaxes(1, 2)
        addend = self.accumulator(destination) if self.predicate(accumulate)[0] else 0
        self.set_accumulator(destination, addend + rows @ columns)

    def descriptor_tile(self, operand: str, rows: int, ptx_type: str, transposed: bool) -> np.ndarray:
        """Return the tile that a matrix descriptor describes, [warp groups, rows, columns in 32 bytes] fp64.

        Args:
            operand: register of the descriptor, 64 bits.
            transposed: whether shared memory holds the tile column by column.
        """
        tiles = []
        for group in range(self.num_warps // 4):
            bits = int(self.read_operand(operand, np.uint64)[128 * group])
            start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
            swizzle_bytes = {1: 128, 2: 64, 3: 32}[bits >> 62]
            itemsize = _NARROW_DTYPES[ptx_type].itemsize
            row, k = np.arange(rows)[:, None], np.arange(32 // itemsize)[None, :]
            if transposed:
                row_elements = swizzle_bytes // itemsize
                addresses = (
                    start
                    + row // row_elements * leading
                    + row % row_elements * itemsize
                    + k // 8 * stride
                    + k % 8 * swizzle_bytes
                )
            else:
                addresses = start + row // 8 * stride + row % 8 * swizzle_bytes + k * itemsize
            addresses = _swizzle(addresses[..., None] + np.arange(itemsize), swizzle_bytes)
            self.access_shared(addresses.reshape(-1, itemsize), np.full(addresses.size // itemsize, 4 * group))
            self.wgmma_reads[-1].append((addresses, self.shared_memory[addresses]))
            tiles.append(
                _widen(self.shared_memory[addresses].view(_UNSIGNED[itemsize])[..., 0], ptx_type).astype(np.float64)
            )
        return np.stack(tiles)


def _swizzle(addresses: np.ndarray, swizzle_bytes: int) -> np.ndarray:
    """Return addresses ^ (addresses >> 3 & (swizzle_bytes - 1) & 0x70), the swizzle of lines of that many bytes."""
    return addresses ^ (addresses >> 3 & (swizzle_bytes - 1) & 0x70)


def _flush_subnormals(x: np.ndarray) -> np.ndarray:
    """Return x in fp32 with 0 for every subnormal value, as the modifier `ftz` asks."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x).astype(np.float32)


def _wide_product(opcode, a, b):
    """Return the 64-bit product of 32-bit integers: int64 for `s32`, else uint64."""
    return a.astype(np.int64 if opcode[-1] == "s32" else np.uint64) * b


def _multiply(opcode, a, b, c=None):
    """Return a * b + c: all 64 bits for `wide`, the upper 32 bits of a * b alone for `hi`, else the lower bits."""
    if opcode[1] == "wide":
        return _wide_product(opcode, a, b).view(np.uint64) + (0 if c is None else c)
    if opcode[1] == "hi":
        return (_wide_product(opcode, a, b) >> 32).astype(a.dtype)
    return a * b + (0 if c is None else c)


def _divide(opcode, a, b):
    if a.dtype.kind == "f":
        return a / b
    return np.trunc(a.astype(np.float64) / b).astype(a.dtype)  # exact for 32 bits; rounds towards 0


# Instructions that work on each thread separately: {name: function of the opcode and the sources}.
_ELEMENTWISE = {
    "add": lambda opcode, a, b: a + b,
    "sub": lambda opcode, a, b: a - b,
    "mul": _multiply,
    "mad": _multiply,
    "div": _divide,
    "fma": lambda opcode, a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "and": lambda opcode, a, b: a & b,
    "or": lambda opcode, a, b: a | b,
    "xor": lambda opcode, a, b: a ^ b,
    "not": lambda opcode, a: ~a,
    "neg": lambda opcode, a: -a,
    "abs": lambda opcode, a: np.abs(a),
    "min": lambda opcode, a, b: np.fmin(a, b),
    "max": lambda opcode, a, b: np.fmax(a, b),
    "shl": lambda opcode, a, b: a << b,
    "shr": lambda opcode, a, b: a >> b,
    "ex2": lambda opcode, a: np.exp2(a),
    "sqrt": lambda opcode, a: np.sqrt(a),
}
