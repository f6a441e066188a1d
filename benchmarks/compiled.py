"""What the compiler makes of every shipped kernel for a Hopper GPU, found out without one.

`python -m benchmarks.compiled` cross-compiles each (kernel, configuration) to sm_90a with the Triton at hand and writes
registers, spills, shared memory and the instructions that matter to benchmarks/results/sm_90a/triton-<version>.json.
tests/test_kernels_compiled.py holds the same figures against their limits.
"""

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
from thinksafe.kernels import exp_gemm, linear_cross_entropy, linear_kl, rms_norm, rope, swiglu


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration.

    Attributes:
        arguments: argument -> Triton type, for everything that is not a constant.
        constants: constexpr arguments.
        tensor_cores: whether it must use wgmma and the tensor memory accelerator.
    """

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    tensor_cores: bool = False


@dataclass(frozen=True)
class Figures:
    """Per thread: registers, bytes of stack (spills). Per program: bytes of shared memory. Counts of instructions."""

    registers: int
    stack_bytes: int
    spill_instructions: int
    shared_bytes: int
    wgmma: int
    tma_loads: int
    wide_loads: int
    offsets_64_bit: bool


def descriptor(rows: int, columns: int, dtype: str = "bf16") -> str:
    return f"tensordesc<{dtype}[{rows},{columns}]>"


def builds() -> list[Build]:
    """Everything that is launched on a GPU for bf16 models."""
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
                tiles.num_stages,
                tensor_cores=True,
            )
        )
    tiles = linear_kl.TILES
    for shared_head in (True, False):
        x, w = descriptor(tiles.block_t, tiles.block_h), descriptor(tiles.block_v, tiles.block_h)
        found.append(
            Build(
                f"linear_kl pair {'one head' if shared_head else 'two heads'}",
                linear_kl._pair_gemm_kernel,
                {
                    "student_desc": x,
                    "reference_desc": x,
                    "weight_desc": w,
                    "weight_reference_desc": w,
                    "e_desc": descriptor(tiles.block_t, tiles.block_v),
                    "d_desc": descriptor(tiles.block_t, tiles.block_v, "fp16"),
                    **dict.fromkeys(
                        ("best_ptr", "sum_ptr", "tilt_ptr", "student_best_ptr", "student_sum_ptr"), "*fp32"
                    ),
                    **dict.fromkeys(("T", "V", "H"), "i32"),
                },
                {
                    "SHARED_HEAD": shared_head,
                    "LOG2E": exp_gemm.LOG2E,
                    "BLOCK_T": tiles.block_t,
                    "BLOCK_V": tiles.block_v,
                    "BLOCK_H": tiles.block_h,
                    "GROUP": tiles.group,
                },
                tiles.num_warps,
                linear_kl.num_stages(shared_head),
                tensor_cores=True,
            )
        )
    for direction in ("forward", "reverse", "jsd"):
        for write in (False, True):
            found.append(
                Build(
                    f"linear_kl {direction} {'gradient' if write else 'value'}",
                    linear_kl._divergence_kernel,
                    {
                        "e_ptr": "*bf16",
                        "d_ptr": "*fp16",
                        **dict.fromkeys(("log_scale_ptr", "delta_ptr", "mean_ptr", "row_weight_ptr"), "*fp32"),
                        **dict.fromkeys(("value_ptr", "mean_out_ptr"), "*fp32"),
                        **dict.fromkeys(("T", "V", "width"), "i32"),
                    },
                    {
                        "DIRECTION": direction,
                        "WRITE": write,
                        "BLOCK_T": linear_kl.ELEMENTWISE_ROWS,
                        "BLOCK_V": tiles.block_v,
                    },
                    num_warps=8,
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
            num_warps=8,
            tensor_cores=True,
        )
    )
    for spread in (False, True):
        found.append(
            Build(
                f"linear_cross_entropy combine{' with smoothing' if spread else ''}",
                linear_cross_entropy._combine_kernel,
                {
                    "product_ptr": "*fp32",
                    "weight_ptr": "*bf16",
                    "target_ptr": "*i64",
                    **dict.fromkeys(("mean_ptr", "scale_ptr", "own_ptr", "spread_ptr"), "*fp32"),
                    "out_ptr": "*bf16",
                    "H": "i32",
                },
                {"SPREAD": spread, "BLOCK_H": 2048},
                num_warps=4,
            )
        )
    for hidden in (1024, 2048, 4096):
        tile, num_warps = rms_norm._tile(hidden)
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
                )
            )
        found.append(
            Build(
                f"rms_norm backward H={hidden}",
                rms_norm._backward_kernel,
                {
                    **dict.fromkeys(("grad_ptr", "x_ptr", "weight_ptr", "grad_sum_ptr", "grad_x_ptr"), "*bf16"),
                    **dict.fromkeys(("rstd_ptr", "grad_weight_ptr"), "*fp32"),
                    **dict.fromkeys(("num_rows", "H", "num_blocks"), "i32"),
                },
                {"HAS_GRAD_SUM": True, "NEEDS_WEIGHT": True, **tile},
                num_warps,
            )
        )
    rotation = {"ROWS": rope.TILE // 64, "HALF": 64}
    angles = dict.fromkeys(("cos_ptr", "sin_ptr", "rstd_ptr"), "*fp32")
    for norm in (False, True):
        name = "qk_norm_rope" if norm else "rope"
        found.append(
            Build(
                name,
                rope._forward_kernel,
                {
                    **dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), "*bf16"),
                    **angles,
                    "num_rows": "i32",
                    "num_heads": "i32",
                    "eps": "fp32",
                },
                {"NORM": norm, **rotation},
                num_warps=4,
            )
        )
        found.append(
            Build(
                f"{name} backward",
                rope._backward_kernel,
                {
                    **dict.fromkeys(("grad_ptr", "x_ptr", "weight_ptr", "grad_x_ptr"), "*bf16"),
                    **angles,
                    "grad_weight_ptr": "*fp32",
                    **dict.fromkeys(("num_rows", "num_heads", "num_blocks"), "i32"),
                },
                {"NORM": norm, "NEEDS_WEIGHT": norm, **rotation},
                num_warps=4,
            )
        )
    tensors = ("gate_ptr", "up_ptr", "y_ptr")
    found.append(
        Build(
            "swiglu",
            swiglu._forward_kernel,
            {**dict.fromkeys(tensors, "*bf16"), "num_elements": "i64"},
            {"BLOCK": swiglu._BLOCK},
            num_warps=8,
        )
    )
    tensors = ("grad_ptr", "gate_ptr", "up_ptr", "grad_gate_ptr", "grad_up_ptr")
    found.append(
        Build(
            "swiglu backward",
            swiglu._backward_kernel,
            {**dict.fromkeys(tensors, "*bf16"), "num_elements": "i64"},
            {"BLOCK": swiglu._BLOCK},
            num_warps=8,
        )
    )
    return found


def compile_for_hopper(build: Build) -> Figures:
    """Compile for sm_90a; no GPU is needed, ptxas and cuobjdump ship with Triton."""
    signature = {name: build.arguments.get(name, "constexpr") for name in build.kernel.arg_names}
    # As at a real launch: pointers and sizes that are multiples of 16 may be read 16 bytes at a time.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(signature.values())
        if kind.startswith("*") or kind in ("i32", "i64")
    }
    source = ASTSource(build.kernel, signature, build.constants, aligned)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()

        def dump(what: str) -> str:
            command = [tools / "cuobjdump", what, cubin.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = dump("-res-usage"), dump("-sass")
    return Figures(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared_bytes=compiled.metadata.shared,
        wgmma=code.count("HGMMA"),
        tma_loads=code.count("UTMALDG"),
        wide_loads=code.count("LDG.E.128"),
        offsets_64_bit=bool(re.search(r"arith\.(muli|extsi).*i64", compiled.asm["ttir"])),
    )


def main() -> None:
    """Compile everything, print the table, write the figures."""
    rows = []
    for build in builds():
        figures = compile_for_hopper(build)
        rows.append({"kernel": build.name, "warps": build.num_warps, **vars(figures)})
    print(table(rows))
    folder = Path(__file__).parent / "results" / "sm_90a"
    folder.mkdir(parents=True, exist_ok=True)
    record = {"command": "python -m benchmarks.compiled", "triton": triton.__version__, "rows": rows}
    (folder / f"triton-{triton.__version__}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
