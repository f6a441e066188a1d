"""Builds of the operations on the language-model head: cross-entropy, scoring, divergence."""

import triton

from thinksafe.kernels import exp_gemm, linear_cross_entropy, linear_kl
from tools.hopper.builds.build import NUM_SMS, Build, H, T, V, descriptor, tile_constants


def head_builds() -> list[Build]:
    """Return the builds of cross-entropy and of log-probabilities on the language-model head."""
    builds = []
    types = {"weighted_sums_ptr": "*fp32", "row_max_ptr": "*fp32", "argmax_ptr": "*i32", "active_ptr": "*i32"}
    for label, tile, outputs in (
        ("sums", exp_gemm.LOSS_TILE, ["sums_ptr"]),
        ("sums store", exp_gemm.LOSS_TILE, ["sums_ptr", "e_desc"]),
        ("sums gated", exp_gemm.LOSS_TILE, ["sums_ptr", "active_ptr"]),
        ("sums store gated", exp_gemm.LOSS_TILE, ["sums_ptr", "e_desc", "active_ptr"]),
        (
            "sums entropy best best_id",
            exp_gemm.ENTROPY_TILE,
            ["sums_ptr", "weighted_sums_ptr", "row_max_ptr", "argmax_ptr"],
        ),
        ("sums entropy gated", exp_gemm.ENTROPY_TILE, ["sums_ptr", "weighted_sums_ptr", "active_ptr"]),
        ("best gated", exp_gemm.ENTROPY_TILE, ["row_max_ptr", "active_ptr"]),
    ):
        types |= {"sums_ptr": "*fp32", "e_desc": descriptor(tile.BLOCK_T, tile.BLOCK_N)}
        builds.append(
            Build(
                f"exp_gemm {label}",
                exp_gemm._exp_gemm_kernel,
                {
                    "x_desc": descriptor(tile.BLOCK_T, tile.BLOCK_K),
                    "w_desc": descriptor(tile.BLOCK_N, tile.BLOCK_K),
                    "target_ptr": "*i64",
                    "shift_ptr": "*fp32",
                    **{output: types[output] for output in outputs},
                    **dict.fromkeys(("T", "V", "H"), "i32"),
                },
                tile_constants(tile),
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
    block_t, block_v = exp_gemm.LOSS_TILE.BLOCK_T, exp_gemm.LOSS_TILE.BLOCK_N
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
    for block in (1024, 2048):
        builds.append(
            Build(
                f"linear_cross_entropy combine, {block} at a time",
                linear_cross_entropy._grad_x_kernel,
                {
                    "product_ptr": "*fp32",
                    "weight_ptr": "*bf16",
                    "target_ptr": "*i64",
                    **dict.fromkeys(("scale_ptr", "target_scale_ptr"), "*fp32"),
                    "out_ptr": "*bf16",
                    "H": "i32",
                },
                {"BLOCK_H": block},
                4,
                {"H": H},
                (T,),
                {"target_ptr": V},
            )
        )
    return builds


def divergence_builds() -> list[Build]:
    """Return the builds of both passes of `linear_kl`, for both directions, with a shared and with a separate head."""
    builds = []
    tile = linear_kl.TILE
    for shared_head, reverse in ((True, False), (True, True), (False, False), (False, True)):
        x, w = descriptor(tile.BLOCK_T, tile.BLOCK_K), descriptor(tile.BLOCK_N, tile.BLOCK_K)
        builds.append(
            Build(
                f"linear_kl pair {'one head' if shared_head else 'two heads'}{', reverse' if reverse else ''}",
                linear_kl._pair_gemm_kernel,
                {
                    "student_desc": x,
                    "reference_desc": x,
                    "weight_desc": w,
                    **({} if shared_head else {"weight_reference_desc": w}),
                    "e_desc": descriptor(tile.BLOCK_T, tile.BLOCK_N),
                    "d_desc": descriptor(tile.BLOCK_T, tile.BLOCK_N, "fp16"),
                    **dict.fromkeys(("lse_student_ptr", "lse_reference_ptr", "tile_logmass_diff_ptr"), "*fp32"),
                    **dict.fromkeys(("kl_within_tile_ptr", "rounding_correction_ptr"), "*fp32"),
                    **dict.fromkeys(("T", "V", "H", "H_reference"), "i32"),
                },
                {"REVERSE": reverse, **tile_constants(tile)},
                tile.num_warps,
                {"T": T, "V": V, "H": H, "H_reference": H},
                (NUM_SMS,),
                {},
                tile.num_stages,
                required_instructions=("wgmma", "tma_loads"),
            )
        )
    num_v = triton.cdiv(V, tile.BLOCK_N)
    for reverse in (False, True):
        for write_gradient in (False, True):
            builds.append(
                Build(
                    f"linear_kl {'reverse' if reverse else 'forward'} {'gradient' if write_gradient else 'value'}",
                    linear_kl._divergence_kernel,
                    {
                        "e_ptr": "*bf16",
                        "d_ptr": "*fp16",
                        **dict.fromkeys(("tile_logmass_ptr", "tile_logmass_diff_ptr"), "*fp32"),
                        **({"row_kl_ptr": "*fp32"} if reverse else {}),
                        **dict.fromkeys(("row_weight_ptr", "value_ptr"), "*fp32"),
                        **dict.fromkeys(("T", "V", "width"), "i32"),
                    },
                    {
                        "REVERSE": reverse,
                        "WRITE_GRADIENT": write_gradient,
                        "BLOCK_T": linear_kl.ELEMENTWISE_ROWS,
                        "BLOCK_N": tile.BLOCK_N,
                    },
                    8,
                    {"T": T, "V": V, "width": num_v * tile.BLOCK_N},
                    (num_v, T // linear_kl.ELEMENTWISE_ROWS),
                )
            )
    return builds
