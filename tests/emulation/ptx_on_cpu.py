"""A Hopper GPU on a CPU, for tests: what Triton compiles for sm_90a is run as it stands in PTX.

    with on_hopper(): paged_decode(q, ...)  # CPU tensors, the GPU's path and its kernels

Programs run one after the other, the threads of one in step. Unlike the interpreter it has bf16, fp16 and e4m3, tensor
cores, the copy engine, packed instructions, the pipeline and the launch as it would be: which integers and addresses
count as multiples of 16. It fails where a GPU might: an address outside every tensor or not aligned to its access, a
barrier that some threads miss, shared memory that one warp writes and another one touches without a barrier between, a
tile that changes while it is read. What an asynchronous copy brings is not there before it is waited for, and what it
overwrites is gone at once.

Instructions are the ones that Triton makes of this project's kernels; any other is an error. Approximate ones are exact
here, and sums of tensor cores are rounded once.
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

PROCESSORS = 2
"""Few, so that every program has several turns of its loop."""
_SHARED = 1024
"""Where a program's shared memory begins."""
_GUARD = 4096
_NARROW = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
_POISON = 0xFF
"""Bytes that are NaN in every format."""


@contextmanager
def on_hopper():
    """Kernels and their launches take the way that CUDA tensors take, and end here."""
    properties = type("Properties", (), {"multi_processor_count": PROCESSORS})
    with (
        patch("thinksafe.kernels.dispatch.INTERPRETED", True),  # CPU tensors go to the kernels
        patch("torch.cuda.get_device_properties", lambda device: properties),
        patch.object(JITFunction, "run", _launch),
    ):
        yield


def _launch(kernel: JITFunction, *args, grid, warmup, num_warps=4, num_stages=3, **kwargs) -> None:
    named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, aligned = {}, {}, []
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, named[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        if (
            not isinstance(value, float | TensorDescriptor)
            and (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0
        ):
            aligned.append(index)
    ptx, shared_bytes = _compiled(
        kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), num_warps, num_stages
    )
    memory = _Memory()
    arguments = []
    for name, value in named.items():
        if isinstance(value, TensorDescriptor):
            arguments += [_Tile(memory.address(value.base), value), *value.shape, *value.strides]
        elif signature[name] != "constexpr":
            arguments.append(memory.address(value))
    code = _parse(ptx)
    for z in np.ndindex(*grid):
        _Program(code, memory, arguments, shared_bytes, num_warps, z, grid).run()
    memory.give_back()


_TYPES = {
    torch.float8_e4m3fn: "fp8e4nv", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip


def _type_of(value) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@cache
def _compiled(kernel, signature, constants, aligned, num_warps, num_stages) -> tuple[str, int]:
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(kernel, dict(signature), dict(constants), attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.asm["ptx"], compiled.metadata.shared


@dataclass(frozen=True)
class _Tile:
    """A matrix and the tiles of it that the copy engine moves, their rows swizzled in lines of 128, 64 or 32 bytes."""

    start: int
    matrix: TensorDescriptor

    def places(self, column: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a tile, [rows, bytes of a line]: where its bytes lie, and which are in the matrix."""
        size, (height, width), shape = self.matrix.base.element_size(), self.matrix.block_shape, self.matrix.shape
        rows = np.arange(row, row + height)[:, None]
        columns = column * size + np.arange(min(width * size, 128))[None, :]
        return self.start + rows * self.matrix.strides[0] * size + columns, (rows < shape[0]) & (
            columns < shape[1] * size
        )


class _Memory:
    """One address space that holds the tensors of a launch, each at a multiple of 16 and no more."""

    def __init__(self):
        self._places: dict[int, tuple[Tensor, int]] = {}
        self.bytes, self.valid = np.zeros(_GUARD, np.uint8), np.zeros(_GUARD, bool)

    def address(self, value):
        """Of a tensor; a number is its own."""
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self._places:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            start = -(-len(self.bytes) // 32) * 32 + 16
            grown = start + len(whole) + _GUARD
            self.bytes, self.valid = (np.pad(a, (0, grown - len(a))) for a in (self.bytes, self.valid))
            self.bytes[start : start + len(whole)] = whole.numpy()
            self.valid[start : start + len(whole)] = True
            self._places[storage.data_ptr()] = whole, start
        return self._places[storage.data_ptr()][1] + value.storage_offset() * value.element_size()

    def give_back(self) -> None:
        for whole, start in self._places.values():
            whole.copy_(torch.from_numpy(self.bytes[start : start + len(whole)]))

    def check(self, at: np.ndarray) -> None:
        assert at.size == 0 or (at.max() < len(self.valid) and self.valid[at].all()), "an address outside every tensor"


# Text


@dataclass(frozen=True)
class _Instruction:
    text: str
    name: list[str]
    operands: list
    guard: str | None
    wanted: bool  # the guard's value


@dataclass
class _Code:
    instructions: list[_Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@cache
def _parse(ptx: str) -> _Code:
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
        guard, wanted = None, True
        text = re.sub(r"^\w+: ", "", text)
        if found := re.match(r"@(!?)([%\w]+) ", text):
            guard, wanted, text = found[2], not found[1], text[found.end() :]
        name, _, rest = text.partition(" ")
        code.instructions.append(_Instruction(text, name.split("."), _operands(rest), guard, wanted))
    return code


def _operands(text: str) -> list:
    """Split at commas; {a, b} is a list, [a+8] a tuple of base and offset, [a, {b, c}] one of base and list."""
    found = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text):
        if part[0] == "{":
            found.append([name.strip() for name in part[1:-1].split(",")])
        elif "{" in part:
            base, *place = re.findall(r"[%\w]+", part)
            found.append((base, place))
        elif part[0] == "[":
            base, _, offset = part[1:-1].replace(" ", "").partition("+")
            found.append((base, int(offset or 0)))
        else:
            found.append(part)
    return found


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _dtype(kind: str) -> np.dtype:
    """'s32' -> int32, 'b64' -> uint64, 'f32' -> float32; of narrower floating-point numbers, their bits."""
    size = int(kind.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8
    return np.dtype(f"{'f' if kind == 'f32' else 'i' if kind[0] == 's' else 'u'}{size}")


def _widened(bits: np.ndarray, kind: str) -> np.ndarray:
    """fp32 from the bits of narrower numbers."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(_NARROW[kind]).float().numpy()


def _rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """The bits of narrower numbers, to the nearest, from fp32."""
    narrow = torch.from_numpy(np.ascontiguousarray(values)).to(_NARROW[kind])
    return (
        narrow.numpy().view(np.uint16)
        if kind == "f16"
        else narrow.view(torch.uint16 if kind == "bf16" else torch.uint8).numpy()
    )


class _Program:
    """One program: registers by name, [threads] each, as unsigned bits."""

    def __init__(self, code: _Code, memory: _Memory, arguments, shared_bytes: int, num_warps: int, index, grid):
        self.code, self.memory, self.arguments = code, memory, arguments
        self.threads, self.warps = 32 * num_warps, num_warps
        self.thread = np.arange(self.threads)
        self.shared = np.full(_SHARED + shared_bytes, _POISON, np.uint8)
        self.epoch = 0
        # Of every byte, after how many barriers it was last touched, and by which warp; -1 for several.
        self.written, self.read = (np.full((2, len(self.shared)), -1, np.int32) for _ in range(2))
        self.registers: dict[str, np.ndarray] = {}
        self.special = {"%tid.x": self.thread}
        for axis, name in enumerate("xyz"):
            self.special[f"%ctaid.{name}"] = np.int64(index[axis] if axis < len(index) else 0)
            self.special[f"%nctaid.{name}"] = np.int64(grid[axis] if axis < len(grid) else 1)
        self.copies: list[list] = [[]]  # asynchronous ones, by group; the last is open
        self.products, self.stores = [[]], [[]]  # what tensor cores and the copy engine read, likewise
        self.barriers: dict[int, list] = {}  # in memory: phase, arrivals and bytes to come, copies on their way

    def run(self) -> None:
        instructions, end = self.code.instructions, len(self.code.instructions)
        places = np.zeros(self.threads, np.int64)
        with np.errstate(all="ignore"):
            while (at := int(places.min())) < end:
                here, instruction = places == at, instructions[at]
                places[here] = at + 1
                active = here
                if instruction.guard:
                    active = here & (self.registers[instruction.guard] == instruction.wanted)
                if not active.any():
                    continue
                if instruction.name[0] == "bra":
                    places[active] = self.code.labels[instruction.operands[0]]
                elif instruction.name[0] == "ret":
                    places[active] = end
                else:
                    try:
                        self.execute(instruction, active)
                    except Exception as error:
                        raise AssertionError(f"{instruction.text}: {error}") from error
        pending = [*self.copies, *self.products, *self.stores, *(copies for *_, copies in self.barriers.values())]
        assert not any(pending), "an asynchronous operation was never waited for"

    # Operands

    def get(self, operand: str, dtype) -> np.ndarray:
        """[threads], or something that becomes it."""
        dtype = np.dtype(dtype)
        if operand in self.special:
            return np.broadcast_to(self.special[operand], self.threads).astype(dtype)
        if operand.startswith("global_smem"):
            return np.full(self.threads, _SHARED, dtype)
        if "_param_" in operand:  # the address of one is its number here
            return np.full(self.threads, int(operand.rsplit("_", 1)[1]), dtype)
        if operand[0] == "%" or operand.isidentifier():
            bits = self.registers.get(operand)
            if bits is None:  # the compiler puts what is never set where it does not matter
                bits = np.full(self.threads, (1 << 8 * dtype.itemsize) - 1, _UNSIGNED[dtype.itemsize])
            if bits.dtype == bool or bits.dtype.itemsize == dtype.itemsize:
                return bits.view(dtype) if bits.dtype != bool else bits
            return bits.astype(_UNSIGNED[dtype.itemsize]).view(dtype)
        number = int(operand[2:], 16) if operand.startswith("0f") else int(operand.rstrip("U"), 0)
        bits = np.full(self.threads, number & ((1 << 8 * dtype.itemsize) - 1), _UNSIGNED[dtype.itemsize])
        return bits.view(dtype)

    def set(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        value = np.ascontiguousarray(np.broadcast_to(value, self.threads))
        if value.dtype != bool:
            value = value.view(_UNSIGNED[value.dtype.itemsize])
            size = {"%p": 1, "%rs": 2, "%r": 4, "%rd": 8}.get(name.rstrip("0123456789"), value.dtype.itemsize)
            value = value.astype(_UNSIGNED[size])
        old = self.registers.get(name)
        if old is not None and not active.all():
            value = np.where(active, value, old)
        self.registers[name] = value

    def predicate(self, operand: str) -> np.ndarray:
        if operand[0] == "%":
            return self.registers[operand]
        return np.full(self.threads, operand not in ("0", "false"))

    # Memory

    def bytes_at(self, operand, size: int, active: np.ndarray) -> np.ndarray:
        """[active threads, size] indices; aligned as the access must be."""
        base, offset = operand
        at = self.get(base, np.uint64 if base.startswith("%rd") else np.uint32).astype(np.int64)[active] + offset
        assert (at % size == 0).all(), f"an address that is no multiple of {size}"
        return at[:, None] + np.arange(size)

    def touch_shared(self, at: np.ndarray, warps: np.ndarray, data: np.ndarray | None = None) -> None:
        """Note who reads, or writes `data`. What another warp did since the last barrier makes it a race, but for
        writing once more what is there."""
        assert at.min() >= _SHARED and at.max() < len(self.shared), "an address outside shared memory"
        at, warps = at.reshape(-1), warps.repeat(at.shape[1])
        changed = slice(None)
        if data is not None:
            changed = self.shared[at] != data.reshape(-1)
            self._others_did(self.read, at[changed], warps[changed])
        self._others_did(self.written, at[changed], warps[changed])
        epochs, who = self.read if data is None else self.written
        several = (epochs[at] == self.epoch) & (who[at] != warps)
        epochs[at], who[at] = self.epoch, warps
        who[at[several | (who[at] != warps)]] = -1
        if data is not None:
            self.shared[at] = data.reshape(-1)
            assert (self.shared[at] == data.reshape(-1)).all(), "two threads write to one place"

    def _others_did(self, noted: tuple[np.ndarray, np.ndarray], at: np.ndarray, warps: np.ndarray) -> None:
        epochs, who = noted
        assert not ((epochs[at] == self.epoch) & (who[at] != warps)).any(), "a race between warps"

    def load(self, space: str, operand, size: int, active: np.ndarray) -> np.ndarray:
        at = self.bytes_at(operand, size, active)
        if space == "shared":
            self.touch_shared(at, self.thread[active] // 32)
            return self.shared[at]
        self.memory.check(at)
        return self.memory.bytes[at]

    def store(self, space: str, operand, data: np.ndarray, active: np.ndarray) -> None:
        at = self.bytes_at(operand, data.shape[1], active)
        if space == "shared":
            self.touch_shared(at, self.thread[active] // 32, data)
        else:
            self.memory.check(at)
            self.memory.bytes[at] = data

    # Instructions

    def execute(self, instruction: _Instruction, active: np.ndarray) -> None:
        name, operands = instruction.name, instruction.operands
        handler = getattr(self, f"op_{name[0]}", None)
        if handler is not None:
            handler(name, operands, active)
            return
        kind = name[-1]
        out, *sources = operands
        if kind == "pred":
            values = [self.predicate(source) for source in sources]
        elif (narrow := kind.removesuffix("x2")) in _NARROW:  # one or two numbers, rounded once
            bits = [np.ascontiguousarray(self.get(source, _UNSIGNED[4 if "x2" in kind else 2])) for source in sources]
            values = [_widened(one[:, None].view(np.uint16), narrow) for one in bits]
            result = _rounded(_SIMPLE[name[0]](name, *values), narrow)
            self.set(out, result.view(bits[0].dtype)[:, 0], active)
            return
        else:
            values = [self.get(source, _dtype(kind)) for source in sources]
            if name[:2] == ["mad", "wide"]:
                values[2] = self.get(sources[2], np.uint64)
        flush = _flushed if "ftz" in name else lambda x: x
        self.set(out, flush(_SIMPLE[name[0]](name, *map(flush, values))), active)

    def op_mov(self, name, operands, active) -> None:
        out, source = operands
        if name[1] == "pred":
            self.set(out, self.predicate(source), active)
        elif isinstance(source, list):
            part = int(name[1][1:]) // 8 // len(source)
            bits = [self.get(one, _UNSIGNED[part]) for one in source]
            self.set(out, np.stack(bits, 1).view(_dtype(name[1]))[:, 0], active)
        elif isinstance(out, list):
            part = int(name[1][1:]) // 8 // len(out)
            bits = np.ascontiguousarray(self.get(source, _dtype(name[1])))[:, None].view(_UNSIGNED[part])
            for index, one in enumerate(out):
                self.set(one, bits[:, index], active)
        else:
            self.set(out, self.get(source, _dtype(name[1])), active)

    def op_cvt(self, name, operands, active) -> None:
        to, of = name[-2:]
        out, *sources = operands
        if to.endswith("x2"):  # the first source is the upper half
            values = np.stack([self.get(source, np.float32) for source in reversed(sources)], 1)
            if of == "e4m3x2":
                halves = np.ascontiguousarray(self.get(sources[0], np.uint16))[:, None].view(np.uint8)
                values = _widened(halves, "e4m3")
            if "satfinite" in name:
                values = np.clip(values, -448, 448)
            halves = _rounded(values, to[:-2])
            self.set(out, halves.view(_UNSIGNED[2 * halves.dtype.itemsize])[:, 0], active)
            return
        value = self.get(sources[0], _dtype(of))
        if of in _NARROW:
            value = _widened(value, of)
        if to in _NARROW:
            value = _rounded(value.astype(np.float32), to)
        self.set(out, value.astype(_dtype(to)), active)

    def op_setp(self, name, operands, active) -> None:
        out, first, second = operands
        a, b = (self.get(one, _dtype(name[-1])) for one in (first, second))
        compare = {
            "lt": np.less,
            "le": np.less_equal,
            "gt": np.greater,
            "ge": np.greater_equal,
            "eq": np.equal,
            "ne": np.not_equal,
        }
        self.set(out, compare[name[1]](a, b), active)

    def op_selp(self, name, operands, active) -> None:
        out, first, second, choice = operands
        values = (self.get(one, _dtype(name[1])) for one in (first, second))
        self.set(out, np.where(self.predicate(choice), *values), active)

    def op_bfe(self, name, operands, active) -> None:
        out, source, start, length = operands
        bits = self.get(source, np.uint32)
        start, length = int(start), int(length)
        found = (bits >> start) & np.uint32((1 << length) - 1)
        if name[1] == "s32":
            found = ((found << (32 - length)).view(np.int32) >> (32 - length)).view(np.uint32)
        self.set(out, found, active)

    def op_prmt(self, name, operands, active) -> None:
        out, low, high, selector = operands
        pool = np.stack([self.get(one, np.uint32) for one in (low, high)], 1).view(np.uint8)
        chosen = self.get(selector, np.uint32)
        result = np.empty((self.threads, 4), np.uint8)
        for byte in range(4):
            nibble = (chosen >> (4 * byte)) & 0xF
            picked = pool[self.thread, nibble & 7]
            result[:, byte] = np.where(nibble & 8, np.where(picked & 0x80, 0xFF, 0), picked)
        self.set(out, result.view(np.uint32)[:, 0], active)

    def op_shfl(self, name, operands, active) -> None:
        assert active.all(), "a shuffle that some lanes miss"
        out, source, lane, *_ = operands
        lane, own = self.get(lane, np.int32), self.thread % 32
        aim = {"bfly": own ^ lane, "idx": lane & 31, "up": np.where(own >= lane, own - lane, own)}[name[2]]
        self.set(out, self.get(source, np.uint32)[self.thread // 32 * 32 + aim], active)

    def op_redux(self, name, operands, active) -> None:
        assert active.all(), "a reduction that some lanes miss"
        out, source, _ = operands
        reduce = {"min": np.min, "max": np.max, "add": np.sum}[name[2]]
        by_warp = reduce(self.get(source, np.int32).reshape(self.warps, 32), axis=1)
        self.set(out, by_warp.astype(np.int32).repeat(32), active)

    def op_ld(self, name, operands, active) -> None:
        out, source = operands
        if name[1] == "param":
            number = self.arguments[int(source[0].rsplit("_", 1)[1])] if source[0] else 0
            dtype = np.float32 if isinstance(number, float) else np.int64
            bits = np.full(self.threads, number, dtype).view(_UNSIGNED[np.dtype(dtype).itemsize])
            self.set(out, bits.astype(_dtype(name[-1])), active)
            return
        outs = out if isinstance(out, list) else [out]
        each = int(name[-1][1:]) // 8
        data = self.load(name[1].split("::")[0], source, each * len(outs), active)
        for index, one in enumerate(outs):
            whole = np.zeros(self.threads, _UNSIGNED[each])
            whole[active] = np.ascontiguousarray(data[:, index * each : (index + 1) * each]).view(_UNSIGNED[each])[:, 0]
            self.set(one, whole, active)

    def op_st(self, name, operands, active) -> None:
        target, source = operands
        sources = source if isinstance(source, list) else [source]
        each = int(name[-1][1:]) // 8
        data = [np.ascontiguousarray(self.get(one, _UNSIGNED[each])[active])[:, None].view(np.uint8) for one in sources]
        self.store(name[1].split("::")[0], target, np.concatenate(data, 1), active)

    def op_bar(self, name, operands, active) -> None:
        if name[1] == "sync":
            assert active.all(), "a barrier that some threads miss"
            self.epoch += 1

    def op_cvta(self, name, operands, active) -> None:
        self.set(operands[0], self.get(operands[1], np.uint64), active)

    def op_elect(self, name, operands, active) -> None:
        lane, chosen = operands[0].split("|")
        self.set(lane, np.zeros(self.threads, np.uint32), active)
        self.set(chosen, self.thread % 32 == 0, active)

    def one(self, operand: str, active: np.ndarray) -> int:
        """What all threads at work agree on."""
        numbers = np.unique(self.get(operand, np.int32)[active])
        assert len(numbers) == 1, f"{operand} is not one number"
        return int(numbers[0])

    def op_mbarrier(self, name, operands, active) -> None:
        assert name[1] == "try_wait" or active.sum() == 1, "more than one thread does what one must"
        base, offset = operands[1 if name[1] in ("arrive", "try_wait") else 0]
        place = self.one(base, active) + offset
        if name[1] == "init":
            self.barriers[place] = [0, int(operands[1]), 0, []]
        elif name[1] == "inval":
            assert not self.barriers.pop(place)[3], "an asynchronous operation was never waited for"
        elif name[1] == "arrive":
            self.barriers[place][1] -= 1
            self.barriers[place][2] += int(operands[2])
        else:
            phase, arrivals, to_come, copies = self.barriers[place]
            if phase == self.one(operands[2], active):  # it is over once everything has come
                assert arrivals == 0 and to_come == sum(data.size for _, data in copies), "a wait without end"
                for to, data in copies:
                    self.shared[to] = data
                self.barriers[place] = [1 - phase, 1, 0, []]
            self.set(operands[0], np.full(self.threads, True), active)

    def move_tile(self, name, operands, active) -> None:
        """By the copy engine. To shared memory, what was there is gone at once, and what comes is there when somebody
        has waited for it; from there, nothing may change before that."""
        outwards = name[5] == "global"
        (to, offset), (source, place) = operands[:2] if not outwards else operands[1::-1]
        tile = self.arguments[self.one(source, active)]
        there, inside = tile.places(*(self.one(number, active) for number in place))
        self.memory.check(there[inside])
        at = self.one(to, active) + offset + np.arange(there.size).reshape(there.shape)
        at, warps = _swizzled(at, there.shape[1]), np.repeat(self.thread[active] // 32, len(there))
        if outwards:
            self.touch_shared(at, warps)
            self.memory.bytes[there[inside]] = self.shared[at[inside]]
            self.stores[-1].append((at, self.shared[at]))
        else:
            data = np.where(inside, self.memory.bytes[np.where(inside, there, 0)], 0).astype(np.uint8)
            self.touch_shared(at, warps, np.full_like(data, _POISON))
            self.written[0, at] = -1  # who waits for its barrier sees it
            barrier, offset = operands[2]
            self.barriers[self.one(barrier, active) + offset][3].append((at, data))

    def unchanged(self, groups: list[list], left: int) -> None:
        """Close all groups but the last ones, whose tiles have been read now."""
        ready = max(len(groups) - 1 - left, 0)
        for at, data in chain.from_iterable(groups[:ready]):
            assert (self.shared[at] == data).all(), "a tile changed while it was read"
        del groups[:ready]

    def op_cp(self, name, operands, active) -> None:
        if "tensor" in name:
            for thread in self.thread[active]:  # one a warp at most; more than 128 bytes a row are several tiles
                self.move_tile(name, operands, self.thread == thread)
        elif name[2:4] == ["bulk", "commit_group"]:
            self.stores.append([])
        elif name[2:4] == ["bulk", "wait_group"]:
            self.unchanged(self.stores, int(operands[0]))
        elif name[2] == "commit_group":
            self.copies.append([])
        elif name[2] == "wait_group":
            ready = len(self.copies) - 1 - int(operands[0])
            for group in self.copies[: max(ready, 0)]:
                for to, data, warps in group:
                    self.touch_shared(to, warps, data)
            self.copies = self.copies[max(ready, 0) :]
        else:
            target, source, size, *given = operands
            size = int(size, 0)
            to = self.bytes_at(target, size, active)
            present = self.get(given[0], np.int32)[active] > 0 if given else np.full(len(to), True)
            at = self.bytes_at(source, size, active)
            self.memory.check(at[present])
            data = np.where(present[:, None], self.memory.bytes[np.where(present[:, None], at, 0)], 0).astype(np.uint8)
            warps = self.thread[active] // 32
            self.touch_shared(to, warps, np.full_like(data, _POISON))
            self.copies[-1].append((to, data, warps))

    def op_fence(self, name, operands, active) -> None:
        """Between the two ways to shared memory; programs here take one."""

    def op_ldmatrix(self, name, operands, active) -> None:
        assert active.all(), "a tile that some lanes miss"
        outs, source = operands
        at = self.bytes_at(source, 16, active).reshape(self.warps, 32, 16)[:, : 8 * len(outs)]
        self.touch_shared(at.reshape(-1, 16), np.repeat(np.arange(self.warps), 8 * len(outs)))
        rows = self.shared[at].view(np.uint16).reshape(self.warps, len(outs), 8, 8)
        if "trans" in name:
            rows = rows.swapaxes(2, 3)
        for index, one in enumerate(outs):
            self.set(one, np.ascontiguousarray(rows[:, index]).view(np.uint32).reshape(-1), active)

    def op_stmatrix(self, name, operands, active) -> None:
        assert active.all(), "a tile that some lanes miss"
        target, sources = operands
        at = self.bytes_at(target, 16, active).reshape(self.warps, 32, 16)[:, : 8 * len(sources)]
        rows = np.stack([np.ascontiguousarray(self.get(one, np.uint32)) for one in sources], 1)
        rows = rows.reshape(self.warps, 8, 4, len(sources)).swapaxes(2, 3).swapaxes(1, 2)  # warp, tile, row, pair
        rows = np.ascontiguousarray(rows).view(np.uint16)
        data = np.ascontiguousarray(rows.swapaxes(2, 3) if "trans" in name else rows).view(np.uint8).reshape(-1, 16)
        self.touch_shared(at.reshape(-1, 16), np.repeat(np.arange(self.warps), 8 * len(sources)), data)

    # Tensor cores: lane 4 g + t holds pairs of columns 2 t of row g, and of row g + 8

    def pairs(self, names: list[str], kind: str) -> np.ndarray:
        """[warps, g, t, registers, 2] fp64."""
        bits = np.stack([self.get(name, np.uint32) for name in names], 1)
        values = _widened(bits.view(np.uint16), kind).astype(np.float64)
        return values.reshape(self.warps, 8, 4, len(names), 2)

    def rows_of(self, names: list[str], kind: str) -> np.ndarray:
        """The left operand, [warps, 16, 16]."""
        found = self.pairs(names, kind).reshape(self.warps, 8, 4, 2, 2, 2)  # g, t, half of columns, half of rows, pair
        return found.transpose(0, 4, 1, 3, 2, 5).reshape(self.warps, 16, 16)

    def sums(self, names: list[str]) -> np.ndarray:
        """The accumulator, [warps, 16, 8 * blocks] fp64."""
        values = np.stack([self.get(name, np.float32) for name in names], 1).astype(np.float64)
        values = values.reshape(self.warps, 8, 4, len(names) // 4, 2, 2)  # g, t, block, half of rows, pair
        return values.transpose(0, 4, 1, 3, 2, 5).reshape(self.warps, 16, -1)

    def set_sums(self, names: list[str], sums: np.ndarray) -> None:
        values = sums.reshape(self.warps, 2, 8, len(names) // 4, 4, 2).transpose(0, 2, 4, 3, 1, 5)
        values = values.reshape(self.threads, len(names)).astype(np.float32)
        for index, name in enumerate(names):
            self.set(name, values[:, index], np.full(self.threads, True))

    def op_mma(self, name, operands, active) -> None:
        assert active.all(), "a product that some lanes miss"
        out, left, right, start = operands
        columns = self.pairs(right, name[8]).transpose(0, 3, 2, 4, 1).reshape(self.warps, 16, 8)
        self.set_sums(out, self.sums(start) + self.rows_of(left, name[7]) @ columns)

    def op_wgmma(self, name, operands, active) -> None:
        assert active.all(), "a product that some threads miss"
        if name[1] == "mma_async":
            self.warp_group_product(name, operands)
        elif name[1] == "commit_group":
            self.products.append([])
        elif name[1] == "wait_group":
            self.unchanged(self.products, int(operands[0]))

    def warp_group_product(self, name, operands) -> None:
        """At once: results move to other registers before somebody waits for them, and ptxas knows what that means."""
        out, left, right, keep, *signs = operands
        width, kind = int(re.search(r"n(\d+)k", name[4])[1]), name[6]
        transposed = [sign == "1" for sign in signs[2:]] or [False]
        if isinstance(left, list):
            rows = self.rows_of(left, kind)
        else:
            rows = self.described(left, 64, kind, transposed[0])
            rows = rows.reshape(self.warps, 16, rows.shape[2])
        columns = self.described(right, width, kind, transposed[-1]).repeat(4, axis=0).swapaxes(1, 2)
        before = self.sums(out) if self.predicate(keep)[0] else 0
        self.set_sums(out, before + rows @ columns)

    def described(self, operand: str, rows: int, kind: str, transposed: bool) -> np.ndarray:
        """What a matrix descriptor points to, [warp groups, rows, 32 bytes] fp64."""
        found = []
        for group in range(self.warps // 4):
            bits = int(self.get(operand, np.uint64)[128 * group])
            start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
            line = {1: 128, 2: 64, 3: 32}[bits >> 62]
            size = _NARROW[kind].itemsize
            row, k = np.arange(rows)[:, None], np.arange(32 // size)[None, :]
            if transposed:
                wide = line // size
                at = start + row // wide * leading + row % wide * size + k // 8 * stride + k % 8 * line
            else:
                at = start + row // 8 * stride + row % 8 * line + k * size
            at = _swizzled(at[..., None] + np.arange(size), line)
            self.touch_shared(at.reshape(-1, size), np.full(at.size // size, 4 * group))
            self.products[-1].append((at, self.shared[at]))
            found.append(_widened(self.shared[at].view(_UNSIGNED[size])[..., 0], kind).astype(np.float64))
        return np.stack(found)


def _swizzled(at: np.ndarray, line: int) -> np.ndarray:
    """Where a byte of a tile lies whose lines are so many bytes."""
    return at ^ (at >> 3 & (line - 1) & 0x70)


def _flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x).astype(np.float32)


def _wide(name, a, b):
    """Products of 32 bits in 64."""
    return a.astype(np.int64 if name[-1] == "s32" else np.uint64) * b


def _multiplied(name, a, b, c=None):
    if name[1] == "wide":
        return _wide(name, a, b).view(np.uint64) + (0 if c is None else c)
    if name[1] == "hi":
        return (_wide(name, a, b) >> 32).astype(a.dtype)
    return a * b + (0 if c is None else c)


def _quotient(name, a, b):
    if a.dtype.kind == "f":
        return a / b
    return np.trunc(a.astype(np.float64) / b).astype(a.dtype)  # exact for 32 bits, and towards 0


_SIMPLE = {
    "add": lambda name, a, b: a + b,
    "sub": lambda name, a, b: a - b,
    "mul": _multiplied,
    "mad": _multiplied,
    "div": _quotient,
    "fma": lambda name, a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "and": lambda name, a, b: a & b,
    "or": lambda name, a, b: a | b,
    "xor": lambda name, a, b: a ^ b,
    "not": lambda name, a: ~a,
    "neg": lambda name, a: -a,
    "abs": lambda name, a: np.abs(a),
    "min": lambda name, a, b: np.fmin(a, b),
    "max": lambda name, a, b: np.fmax(a, b),
    "shl": lambda name, a, b: a << b,
    "shr": lambda name, a, b: a >> b,
    "ex2": lambda name, a: np.exp2(a),
    "sqrt": lambda name, a: np.sqrt(a),
}
