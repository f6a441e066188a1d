"""Operations on the head: cross-entropy, scoring, divergence."""

import triton

from thinksafe.kernels import exp_gemm, linear_cross_entropy, linear_kl
from tools.hopper.builds.build import PROCESSORS, Build, H, T, V, descriptor


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
