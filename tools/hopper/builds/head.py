"""Builds of the operations on the language-model head: cross-entropy, scoring, divergence."""

import triton

from thinksafe.kernels import exp_gemm, linear_cross_entropy, linear_kl
from tools.hopper.builds.build import NUM_SMS, Build, H, T, V, descriptor


def head_builds() -> list[Build]:
    """Return the builds of cross-entropy and of log-probabilities on the language-model head."""
    builds = []
    all_flags = ("SUMS", "STORE", "ENTROPY", "ROW_MAX", "ARGMAX", "GATED")
    for label, tile, flags in (
        ("sums", exp_gemm.LOSS_TILE, ["SUMS"]),
        ("sums store", exp_gemm.LOSS_TILE, ["SUMS", "STORE"]),
        ("sums gated", exp_gemm.LOSS_TILE, ["SUMS", "GATED"]),
        ("sums store gated", exp_gemm.LOSS_TILE, ["SUMS", "STORE", "GATED"]),
        ("sums entropy best best_id", exp_gemm.ENTROPY_TILE, ["SUMS", "ENTROPY", "ROW_MAX", "ARGMAX"]),
        ("sums entropy gated", exp_gemm.ENTROPY_TILE, ["SUMS", "ENTROPY", "GATED"]),
        ("best gated", exp_gemm.ENTROPY_TILE, ["ROW_MAX", "GATED"]),
    ):
        builds.append(
            Build(
                f"exp_gemm {label}",
                exp_gemm._exp_gemm_kernel,
                {
                    "x_desc": descriptor(tile.block_t, tile.block_h),
                    "w_desc": descriptor(tile.block_v, tile.block_h),
                    "e_desc": descriptor(tile.block_t, tile.block_v if "STORE" in flags else tile.block_h),
                    "target_ptr": "*i64",
                    **dict.fromkeys(("shift_ptr", "sums_ptr", "weighted_sums_ptr", "row_max_ptr"), "*fp32"),
                    **dict.fromkeys(("argmax_ptr", "active_ptr"), "*i32"),
                    **dict.fromkeys(("T", "V", "H"), "i32"),
                },
                {
                    **{flag: flag in flags for flag in all_flags},
                    "LOG2E": exp_gemm.LOG2E,
                    "BLOCK_T": tile.block_t,
                    "BLOCK_V": tile.block_v,
                    "BLOCK_H": tile.block_h,
                    "GROUP": tile.group,
                },
                tile.num_warps,
                {"T": T, "V": V, "H": H},
                (NUM_SMS,),
                {"target_ptr": V, "active_ptr": 1},
                tile.num_stages,
                required_instructions=("wgmma", "tma_loads"),
            )
        )
    for block in (1024, 2048):
        builds.append(
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
    block_t, block_v = exp_gemm.LOSS_TILE.block_t, exp_gemm.LOSS_TILE.block_v
    block_k, block_h = linear_cross_entropy.SPARSE_BLOCK_K, linear_cross_entropy.SPARSE_BLOCK_H
    builds.append(
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
            required_instructions=("wgmma", "tma_loads"),
        )
    )
    for smoothing, block in ((False, 1024), (False, 2048), (True, 1024), (True, 2048)):
        builds.append(
            Build(
                f"linear_cross_entropy combine{' with smoothing' if smoothing else ''}, {block} at a time",
                linear_cross_entropy._grad_x_kernel,
                {
                    "product_ptr": "*fp32",
                    "weight_ptr": "*bf16",
                    "target_ptr": "*i64",
                    **dict.fromkeys(("mean_weight_ptr", "scale_ptr", "target_scale_ptr", "mean_scale_ptr"), "*fp32"),
                    "out_ptr": "*bf16",
                    "H": "i32",
                },
                {"SMOOTHING": smoothing, "BLOCK_H": block},
                4,
                {"H": H},
                (T,),
                {"target_ptr": V},
            )
        )
    return builds


def divergence_builds() -> list[Build]:
    """Return the builds of both passes of `linear_kl`, for every direction, with a shared and with a separate head."""
    builds = []
    tile = linear_kl.TILE
    for shared_head, reverse in ((True, False), (True, True), (False, False), (False, True)):
        x, w = descriptor(tile.block_t, tile.block_h), descriptor(tile.block_v, tile.block_h)
        builds.append(
            Build(
                f"linear_kl pair {'one head' if shared_head else 'two heads'}{', reverse' if reverse else ''}",
                linear_kl._pair_gemm_kernel,
                {
                    "student_desc": x,
                    "reference_desc": x,
                    "weight_desc": w,
                    "weight_reference_desc": w,
                    "e_desc": descriptor(tile.block_t, tile.block_v),
                    "d_desc": descriptor(tile.block_t, tile.block_v, "fp16"),
                    **dict.fromkeys(("lse_student_ptr", "lse_reference_ptr", "tile_logmass_diff_ptr"), "*fp32"),
                    **dict.fromkeys(("kl_within_tile_ptr", "rounding_correction_ptr"), "*fp32"),
                    **dict.fromkeys(("T", "V", "H", "H_reference"), "i32"),
                },
                {
                    "SHARED_HEAD": shared_head,
                    "REVERSE": reverse,
                    "LOG2E": exp_gemm.LOG2E,
                    "BLOCK_T": tile.block_t,
                    "BLOCK_V": tile.block_v,
                    "BLOCK_H": tile.block_h,
                    "GROUP": tile.group,
                },
                tile.num_warps,
                {"T": T, "V": V, "H": H, "H_reference": H},
                (NUM_SMS,),
                {},
                tile.num_stages,
                required_instructions=("wgmma", "tma_loads"),
            )
        )
    num_v = triton.cdiv(V, tile.block_v)
    for direction in ("forward", "reverse", "jsd"):
        for write_gradient in (False, True):
            builds.append(
                Build(
                    f"linear_kl {direction} {'gradient' if write_gradient else 'value'}",
                    linear_kl._divergence_kernel,
                    {
                        "e_ptr": "*bf16",
                        "d_ptr": "*fp16",
                        **dict.fromkeys(("tile_logmass_ptr", "tile_logmass_diff_ptr"), "*fp32"),
                        **dict.fromkeys(("mean_score_ptr", "row_weight_ptr"), "*fp32"),
                        **dict.fromkeys(("value_ptr", "mean_score_out_ptr"), "*fp32"),
                        **dict.fromkeys(("T", "V", "width"), "i32"),
                    },
                    {
                        "DIRECTION": direction,
                        "WRITE_GRADIENT": write_gradient,
                        "BLOCK_T": linear_kl.ELEMENTWISE_ROWS,
                        "BLOCK_V": tile.block_v,
                    },
                    8,
                    {"T": T, "V": V, "width": num_v * tile.block_v},
                    (num_v, T // linear_kl.ELEMENTWISE_ROWS),
                )
            )
    return builds
