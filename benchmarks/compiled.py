"""What the compiler makes of every shipped kernel for a Hopper GPU, found out without one.

`python -m benchmarks.compiled` cross-compiles each (kernel, configuration) to sm_90a with the Triton at hand and writes
registers, spills, shared memory and the instructions that matter to benchmarks/results/sm_90a/triton-<version>.json.
tests/test_kernels_compiled.py holds the same figures against their limits.
"""

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.harness import table
from benchmarks.index_ranges import Ranges, index_ranges
from thinksafe.kernels import (
    exp_gemm,
    fp8,
    kv_write,
    linear_cross_entropy,
    linear_kl,
    paged_attention,
    rms_norm,
    rope,
    row_linear,
    swiglu,
)

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
    uses: tuple[str, ...] = ("wide_loads",)


@dataclass(frozen=True)
class Figures:
    """Per thread: registers, bytes of stack (spills). Per program: bytes of shared memory. Counts of instructions.

    largest_offset, in elements, is that of the largest call; faults are the 32-bit integers that overflow in it."""

    registers: int
    stack_bytes: int
    spill_instructions: int
    shared_bytes: int
    wgmma: int
    mma: int
    tma_loads: int
    wide_copies: int
    wide_loads: int
    largest_offset: int | None
    index_faults: int | None


def descriptor(rows: int, columns: int, dtype: str = "bf16") -> str:
    return f"tensordesc<{dtype}[{rows},{columns}]>"


def builds() -> list[Build]:
    """Everything that is launched on a GPU for bf16 models."""
    return [
        *head_builds(),
        *divergence_builds(),
        *norm_builds(),
        *rotation_builds(),
        *gate_builds(),
        *row_linear_builds(),
        *paged_attention_builds(),
    ]


def head_builds() -> list[Build]:
    """Cross-entropy and scoring."""
    found = []
    for tiles, flags in (
        (exp_gemm.PLAIN, ["SUMS"]),
        (exp_gemm.PLAIN, ["SUMS", "STORE"]),
        (exp_gemm.PLAIN, ["SUMS", "GATED"]),
        (exp_gemm.PLAIN, ["SUMS", "STORE", "GATED"]),
        (exp_gemm.BY_PRODUCTS, ["SUMS", "ENTROPY", "BEST", "BEST_ID"]),
        (exp_gemm.BY_PRODUCTS, ["SUMS", "ENTROPY", "GATED"]),
        (exp_gemm.BY_PRODUCTS, ["BEST", "GATED"]),
    ):
        all_flags = ("SUMS", "STORE", "ENTROPY", "BEST", "BEST_ID", "GATED")
        found.append(
            Build(
                f"exp_gemm {' '.join(flags).lower()}",
                exp_gemm._exp_gemm_kernel,
                {
                    "x_desc": descriptor(tiles.block_t, tiles.block_h),
                    "w_desc": descriptor(tiles.block_v, tiles.block_h),
                    "e_desc": descriptor(tiles.block_t, tiles.block_v if "STORE" in flags else tiles.block_h),
                    "target_ptr": "*i64",
                    **dict.fromkeys(("shift_ptr", "sums_ptr", "weighted_ptr", "best_ptr"), "*fp32"),
                    **dict.fromkeys(("best_id_ptr", "gate_ptr"), "*i32"),
                    **dict.fromkeys(("T", "V", "H"), "i32"),
                },
                {
                    **{flag: flag in flags for flag in all_flags},
                    "LOG2E": exp_gemm.LOG2E,
                    "BLOCK_T": tiles.block_t,
                    "BLOCK_V": tiles.block_v,
                    "BLOCK_H": tiles.block_h,
                    "GROUP": tiles.group,
                },
                tiles.num_warps,
                {"T": T, "V": V, "H": H},
                (PROCESSORS,),
                {"target_ptr": V, "gate_ptr": 1},
                tiles.num_stages,
                uses=("wgmma", "tma_loads"),
            )
        )
    for block in (1024, 2048):
        found.append(
            Build(
                f"exp_gemm chosen logits, {block} at a time",
                exp_gemm._gather_dot_kernel,
                {
                    **dict.fromkeys(("x_ptr", "weight_ptr"), "*bf16"),
                    "ids_ptr": "*i64",
                    "out_ptr": "*fp32",
                    "K": "i32",
                    "H": "i32",
                },
                {"BLOCK_H": block},
                4,
                {"K": 8, "H": H},
                (8 * T,),
                {"ids_ptr": V},
            )
        )
    block_t, block_v = exp_gemm.PLAIN.block_t, exp_gemm.PLAIN.block_v
    block_k, block_h = linear_cross_entropy.SPARSE_BLOCK_K, linear_cross_entropy.SPARSE_BLOCK_H
    found.append(
        Build(
            "linear_cross_entropy sparse product",
            linear_cross_entropy._sparse_gemm_kernel,
            {
                "e_desc": descriptor(block_t, block_k),
                "w_desc": descriptor(block_k, block_h),
                "out_ptr": "*fp32",
                "blocks_ptr": "*i32",
                "counts_ptr": "*i32",
                **dict.fromkeys(("T", "H", "num_v"), "i32"),
            },
            {"BLOCK_T": block_t, "BLOCK_V": block_v, "BLOCK_K": block_k, "BLOCK_H": block_h},
            8,
            {"T": T, "H": H, "num_v": triton.cdiv(V, block_v)},
            (H // block_h, T // block_t),
            {"blocks_ptr": triton.cdiv(V, block_v), "counts_ptr": triton.cdiv(V, block_v)},
            uses=("wgmma", "tma_loads"),
        )
    )
    for spread, block in ((False, 1024), (False, 2048), (True, 1024), (True, 2048)):
        found.append(
            Build(
                f"linear_cross_entropy combine{' with smoothing' if spread else ''}, {block} at a time",
                linear_cross_entropy._combine_kernel,
                {
                    "product_ptr": "*fp32",
                    "weight_ptr": "*bf16",
                    "target_ptr": "*i64",
                    **dict.fromkeys(("mean_ptr", "scale_ptr", "own_ptr", "spread_ptr"), "*fp32"),
                    "out_ptr": "*bf16",
                    "H": "i32",
                },
                {"SPREAD": spread, "BLOCK_H": block},
                4,
                {"H": H},
                (T,),
                {"target_ptr": V},
            )
        )
    return found


def divergence_builds() -> list[Build]:
    """Both passes of every direction."""
    found = []
    tiles = linear_kl.TILES
    for shared_head, reverse in ((True, False), (True, True), (False, False), (False, True)):
        x, w = descriptor(tiles.block_t, tiles.block_h), descriptor(tiles.block_v, tiles.block_h)
        found.append(
            Build(
                f"linear_kl pair {'one head' if shared_head else 'two heads'}{', reverse' if reverse else ''}",
                linear_kl._pair_gemm_kernel,
                {
                    "student_desc": x,
                    "reference_desc": x,
                    "weight_desc": w,
                    "weight_reference_desc": w,
                    "e_desc": descriptor(tiles.block_t, tiles.block_v),
                    "d_desc": descriptor(tiles.block_t, tiles.block_v, "fp16"),
                    **dict.fromkeys(
                        ("lse_student_ptr", "lse_reference_ptr", "gap_ptr", "within_ptr", "slip_ptr"), "*fp32"
                    ),
                    **dict.fromkeys(("T", "V", "H", "H_reference"), "i32"),
                },
                {
                    "SHARED_HEAD": shared_head,
                    "REVERSE": reverse,
                    "LOG2E": exp_gemm.LOG2E,
                    "BLOCK_T": tiles.block_t,
                    "BLOCK_V": tiles.block_v,
                    "BLOCK_H": tiles.block_h,
                    "GROUP": tiles.group,
                },
                tiles.num_warps,
                {"T": T, "V": V, "H": H, "H_reference": H},
                (PROCESSORS,),
                {},
                tiles.num_stages,
                uses=("wgmma", "tma_loads"),
            )
        )
    width = triton.cdiv(V, tiles.block_v)
    for direction in ("forward", "reverse", "jsd"):
        for write in (False, True):
            found.append(
                Build(
                    f"linear_kl {direction} {'gradient' if write else 'value'}",
                    linear_kl._divergence_kernel,
                    {
                        "e_ptr": "*bf16",
                        "d_ptr": "*fp16",
                        **dict.fromkeys(("log_mass_ptr", "gap_ptr", "mean_ptr", "row_weight_ptr"), "*fp32"),
                        **dict.fromkeys(("value_ptr", "mean_out_ptr"), "*fp32"),
                        **dict.fromkeys(("T", "V", "width"), "i32"),
                    },
                    {
                        "DIRECTION": direction,
                        "WRITE": write,
                        "BLOCK_T": linear_kl.ELEMENTWISE_ROWS,
                        "BLOCK_V": tiles.block_v,
                    },
                    8,
                    {"T": T, "V": V, "width": width * tiles.block_v},
                    (width, T // linear_kl.ELEMENTWISE_ROWS),
                )
            )
    return found


def norm_builds() -> list[Build]:
    """Every tile that a hidden size can take, with and without what training needs."""
    found = []
    for hidden in (1024, 2048, 4096, 5120):
        tile, num_warps = rms_norm._tile(hidden)
        blocks = T // tile["ROWS"]
        for residual in (False, True):
            found.append(
                Build(
                    f"rms_norm{' with residual' if residual else ''} H={hidden}",
                    rms_norm._forward_kernel,
                    {
                        **dict.fromkeys(("x_ptr", "residual_ptr", "sum_ptr", "weight_ptr", "y_ptr"), "*bf16"),
                        "rstd_ptr": "*fp32",
                        "num_rows": "i32",
                        "H": "i32",
                        "eps": "fp32",
                    },
                    {"HAS_RESIDUAL": residual, **tile},
                    num_warps,
                    {"num_rows": T, "H": hidden},
                    (blocks,),
                )
            )
        for grad_sum, needs_weight in ((False, False), (True, False), (True, True)):
            found.append(
                Build(
                    f"rms_norm backward{' with residual' if grad_sum else ''}{' and gain' if needs_weight else ''} "
                    f"H={hidden}",
                    rms_norm._backward_kernel,
                    {
                        **dict.fromkeys(("grad_ptr", "x_ptr", "weight_ptr", "grad_sum_ptr", "grad_x_ptr"), "*bf16"),
                        **dict.fromkeys(("rstd_ptr", "grad_weight_ptr"), "*fp32"),
                        **dict.fromkeys(("num_rows", "H", "num_blocks"), "i32"),
                    },
                    {"HAS_GRAD_SUM": grad_sum, "NEEDS_WEIGHT": needs_weight, **tile},
                    num_warps,
                    {"num_rows": T, "H": hidden, "num_blocks": blocks},
                    (1024,),
                )
            )
    return found


def rotation_builds() -> list[Build]:
    """Heads of 64 and 128 elements."""
    found = []
    angles = dict.fromkeys(("cos_ptr", "sin_ptr", "rstd_ptr"), "*fp32")
    heads = {"num_rows": T * HEADS, "num_heads": HEADS}
    for half in (32, 64):
        tile = {"ROWS": rope.TILE // half, "HALF": half}
        blocks = T * HEADS // tile["ROWS"]
        for norm in (False, True):
            found.append(
                Build(
                    f"{'qk_norm_rope' if norm else 'rope'} D={2 * half}",
                    rope._forward_kernel,
                    {
                        **dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), "*bf16"),
                        **angles,
                        "num_rows": "i32",
                        "num_heads": "i32",
                        "eps": "fp32",
                    },
                    {"NORM": norm, **tile},
                    4,
                    heads,
                    (blocks,),
                )
            )
        for norm, needs_weight in ((False, False), (True, False), (True, True)):
            found.append(
                Build(
                    f"{'qk_norm_rope' if norm else 'rope'} backward{' with gain' if needs_weight else ''} D={2 * half}",
                    rope._backward_kernel,
                    {
                        **dict.fromkeys(("grad_ptr", "x_ptr", "weight_ptr", "grad_x_ptr"), "*bf16"),
                        **angles,
                        "grad_weight_ptr": "*fp32",
                        **dict.fromkeys(("num_rows", "num_heads", "num_blocks"), "i32"),
                    },
                    {"NORM": norm, "NEEDS_WEIGHT": needs_weight, **tile},
                    4,
                    heads | {"num_blocks": blocks},
                    (1024,),
                )
            )
    return found


def gate_builds() -> list[Build]:
    """One shape for all sizes."""
    elements = T * INTERMEDIATE
    found = []
    for name, kernel, tensors in (
        ("swiglu", swiglu._forward_kernel, ("gate_ptr", "up_ptr", "y_ptr")),
        (
            "swiglu backward",
            swiglu._backward_kernel,
            ("grad_ptr", "gate_ptr", "up_ptr", "grad_gate_ptr", "grad_up_ptr"),
        ),
    ):
        found.append(
            Build(
                name,
                kernel,
                {**dict.fromkeys(tensors, "*bf16"), "num_elements": "i64"},
                {"BLOCK": swiglu._BLOCK},
                8,
                {"num_elements": elements},
                (elements // swiglu._BLOCK,),
            )
        )
    return found


def row_linear_builds() -> list[Build]:
    """Every tile of the products whose rows are independent, in bf16 and in e4m3, and the rounding to it."""
    found = []
    for kind, itemsize in (("bf16", 2), ("fp8e4nv", 1)):
        block_k = row_linear.BLOCK_BYTES // itemsize
        for tiles in row_linear.TILES[itemsize]:
            found.append(
                Build(
                    f"row_linear {'bf16' if itemsize == 2 else 'e4m3'} {tiles.rows}x{tiles.columns}",
                    row_linear._row_linear_kernel,
                    {
                        "x_desc": descriptor(tiles.rows, block_k, kind),
                        "w_desc": descriptor(tiles.columns, block_k, kind),
                        **(dict.fromkeys(("x_exponents_ptr", "w_exponents_ptr"), "*u8") if itemsize == 1 else {}),
                        "bias_ptr": "*bf16",
                        "out_ptr": "*bf16",
                        **dict.fromkeys(("T", "N", "K"), "i32"),
                    },
                    {
                        "BLOCK_T": tiles.rows,
                        "BLOCK_N": tiles.columns,
                        "BLOCK_K": block_k,
                        "GROUP": row_linear.GROUP,
                    },
                    tiles.num_warps,
                    {"T": T, "N": V, "K": H},
                    (PROCESSORS,),
                    {},
                    tiles.num_stages,
                    uses=("wgmma", "tma_loads"),
                )
            )
    found.append(
        Build(
            "quantise a row",
            fp8._quantise_kernel,
            {"x_ptr": "*bf16", "values_ptr": "*fp8e4nv", "exponents_ptr": "*u8", "D": "i32"},
            {"BLOCK_D": 16_384},
            8,
            {"D": 2 * H},
            (T,),
        )
    )
    return found


def paged_attention_builds() -> list[Build]:
    """The sampler's kernels, for the groups and pages of the families served, and for caches in e4m3."""
    found = [
        Build(
            "paged_decode work",
            paged_attention._work_kernel,
            {"seq_lens_ptr": "*i64", "work_ptr": "*i32", "num_rows": "i32", "max_splits": "i32"},
            {"SPLIT": paged_attention.SPLIT, "BLOCK_B": 512},
            num_warps=4,
        )
    ]
    for shape in ((2, 128, 64), (4, 128, 64), (8, 128, 64), (7, 64, 64), (2, 128, 16)):
        found += _attention_builds(*shape)
    found += _attention_builds(2, 128, 64, ("key", "value"))
    found += _attention_builds(4, 128, 64, ("key", "value"))
    found += _attention_builds(7, 128, 64, ("value",))
    for num_heads, num_kv_heads, norm, in_e4m3 in (
        (16, 8, True, ()), (64, 8, True, ()), (28, 4, False, ()), (64, 8, True, ("key", "value")),
        (28, 4, False, ("value",)),
    ):  # fmt: skip
        found.append(
            Build(
                f"norm_rope_write_kv {num_heads}/{num_kv_heads} heads{'' if norm else ', no norm'}{_named(in_e4m3)}",
                kv_write._norm_rope_write_kernel,
                {
                    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_weight_ptr", "k_weight_ptr", "out_ptr"), "*bf16"),
                    **_cache_arguments(in_e4m3),
                    **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
                    "slots_ptr": "*i64",
                    "num_heads": "i32",
                    "num_kv_heads": "i32",
                    "eps": "fp32",
                },
                {
                    "NORM": norm,
                    "PAGE_SIZE": 64,
                    "BLOCK_Q": triton.next_power_of_2(num_heads),
                    "BLOCK_KV": triton.next_power_of_2(num_kv_heads),
                    "HALF": 64,
                },
                4,
                {"num_heads": num_heads, "num_kv_heads": num_kv_heads},
                (T,),
                {"slots_ptr": 2**31},
            )
        )
    return found


def _named(in_e4m3: tuple[str, ...]) -> str:
    return f", {' and '.join(f'{name}s' for name in in_e4m3)} in e4m3" if in_e4m3 else ""


def _cache_arguments(in_e4m3: tuple[str, ...]) -> dict[str, str]:
    """Types of the cache's pointers where these of keys and values are in e4m3."""
    pages = {f"{name}_ptr": "*fp8e4nv" if name in in_e4m3 else "*bf16" for name in ("key", "value")}
    return pages | {f"{name}_exponents_ptr": "*u8" for name in in_e4m3}


def _attention_builds(group: int, D: int, page_size: int, in_e4m3: tuple[str, ...] = ()) -> list[Build]:
    """Decoding and reading of prompts at one shape, and combining for the caches in bf16."""
    known = {
        **dict.fromkeys(("q_ptr", "out_ptr"), "*bf16"),
        **_cache_arguments(in_e4m3),
        **dict.fromkeys(("page_table_ptr", "seq_lens_ptr"), "*i64"),
        **dict.fromkeys(("work_ptr", "tiles_ptr", "cu_seqlens_ptr"), "*i32"),
        **dict.fromkeys(("partial_ptr", "lse_ptr"), "*fp32"),
        "scale": "fp32",
        **dict.fromkeys(("width", "num_kv_heads", "max_splits"), "i32"),
    }

    def arguments(kernel: Any) -> dict[str, str]:
        return {name: kind for name, kind in known.items() if name in kernel.arg_names}

    name = f"{group} heads a group, D={D}, pages of {page_size}{_named(in_e4m3)}"
    sizes = {"GROUP": group, "D": D, "BLOCK_D": D}
    padded = triton.next_power_of_2(group)
    decode, prefill = paged_attention.DECODE[2], paged_attention.PREFILL[2]
    found = [
        Build(
            f"paged_decode {name}",
            paged_attention._decode_kernel,
            arguments(paged_attention._decode_kernel),
            {
                **sizes,
                "PAGE_SIZE": page_size,
                "SPLIT": paged_attention.SPLIT,
                "BLOCK_G": max(padded, decode.rows),
                "BLOCK_N": decode.tokens,
            },
            decode.num_warps,
            num_stages=decode.num_stages,
            resident=paged_attention.PROGRAMS_PER_PROCESSOR[bool(in_e4m3)],
            uses=("mma", "wide_copies"),
        ),
        Build(
            f"paged_prefill {name}",
            paged_attention._prefill_kernel,
            arguments(paged_attention._prefill_kernel),
            {**sizes, "PAGE_SIZE": page_size, "BLOCK_M": prefill.rows, "BLOCK_N": prefill.tokens},
            prefill.num_warps,
            num_stages=prefill.num_stages,
            uses=("wgmma", "wide_copies"),
        ),
    ]
    if page_size == 64 and not in_e4m3:
        found.append(
            Build(
                f"paged_decode combine {name}",
                paged_attention._combine_kernel,
                arguments(paged_attention._combine_kernel),
                {
                    **sizes,
                    "SPLIT": paged_attention.SPLIT,
                    "BLOCK_S": paged_attention.MAX_SPLITS,
                    "BLOCK_G": padded,
                },
                num_warps=1,
            )
        )
    return found


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
        largest_offset=indices and indices.largest_offset,
        index_faults=indices and len(indices.faults),
    )


def main() -> None:
    """Compile everything, print the table, write the figures."""
    rows = []
    for build in builds():
        row = figures(build, compile_for_hopper(build))
        rows.append({"kernel": build.name, "warps": build.num_warps, **vars(row)})
    print(table(rows))
    folder = Path(__file__).parent / "results" / "sm_90a"
    folder.mkdir(parents=True, exist_ok=True)
    record = {"command": "python -m benchmarks.compiled", "triton": triton.__version__, "rows": rows}
    (folder / f"triton-{triton.__version__}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
