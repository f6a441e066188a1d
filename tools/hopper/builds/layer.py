"""Builds of a layer's operations other than attention: norms, rotation, gate, matmuls."""

from thinksafe.kernels import batch_invariant_linear, fp8, rms_norm, rope, swiglu
from tools.hopper.builds.build import HEADS, INTERMEDIATE, NUM_SMS, Build, H, T, V, descriptor, tile_constants


def norm_builds() -> list[Build]:
    """Return builds of RMSNorm, forward and backward, for every tile that a model's hidden size can have."""
    builds = []
    for hidden in (1024, 2048, 4096, 5120):
        tile = rms_norm.launch_config(hidden)
        num_warps = tile.pop("num_warps")
        num_blocks = T // tile["ROWS"]
        for has_residual in (False, True):
            builds.append(
                Build(
                    f"rms_norm{' with residual' if has_residual else ''} H={hidden}",
                    rms_norm._forward_kernel,
                    {
                        **dict.fromkeys(("x_ptr", "residual_out_ptr", "weight_ptr", "y_ptr"), "*bf16"),
                        **({"residual_ptr": "*bf16"} if has_residual else {}),
                        "rstd_ptr": "*fp32",
                        "num_rows": "i32",
                        "H": "i32",
                        "eps": "fp32",
                    },
                    tile,
                    num_warps,
                    {"num_rows": T, "H": hidden},
                    (num_blocks,),
                )
            )
        for has_grad_residual, needs_weight in ((False, False), (True, False), (True, True)):
            gradients = f"{' with residual' if has_grad_residual else ''}{' and gain' if needs_weight else ''}"
            builds.append(
                Build(
                    f"rms_norm backward{gradients} H={hidden}",
                    rms_norm._backward_kernel,
                    {
                        **dict.fromkeys(("grad_y_ptr", "x_ptr", "weight_ptr"), "*bf16"),
                        "grad_x_ptr": "*bf16",
                        **({"grad_residual_out_ptr": "*bf16"} if has_grad_residual else {}),
                        **dict.fromkeys(("rstd_ptr", "grad_weight_ptr") if needs_weight else ("rstd_ptr",), "*fp32"),
                        **dict.fromkeys(("num_rows", "H", "num_blocks"), "i32"),
                    },
                    tile,
                    num_warps,
                    {"num_rows": T, "H": hidden, "num_blocks": num_blocks},
                    (1024,),
                )
            )
    return builds


def rotation_builds() -> list[Build]:
    """Return builds of RoPE, forward and backward, with and without norm, for attention heads of 64 and 128
    elements."""
    builds = []
    angle_types = dict.fromkeys(("cos_ptr", "sin_ptr", "rstd_ptr"), "*fp32")
    head_sizes = {"num_rows": T * HEADS, "num_heads": HEADS}
    for half in (32, 64):
        tile = {"ROWS": rope.PAIRS_PER_PROGRAM // half, "HALF": half}
        num_blocks = T * HEADS // tile["ROWS"]
        for name, has_norm, inverse in (
            ("rope", False, False), ("rope backward", False, True), ("qk_norm_rope", True, False)
        ):  # fmt: skip
            builds.append(
                Build(
                    f"{name} D={2 * half}",
                    rope._forward_kernel,
                    {
                        **dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr") if has_norm else ("x_ptr", "y_ptr"), "*bf16"),
                        **angle_types,
                        "num_rows": "i32",
                        "num_heads": "i32",
                        "eps": "fp32",
                    },
                    {"INVERSE": inverse, **tile},
                    4,
                    head_sizes,
                    (num_blocks,),
                )
            )
        for needs_weight in (False, True):
            builds.append(
                Build(
                    f"qk_norm_rope backward{' with gain' if needs_weight else ''} D={2 * half}",
                    rope._backward_kernel,
                    {
                        **dict.fromkeys(("grad_y_ptr", "x_ptr", "weight_ptr", "grad_x_ptr"), "*bf16"),
                        **angle_types,
                        **({"grad_weight_ptr": "*fp32"} if needs_weight else {}),
                        **dict.fromkeys(("num_rows", "num_heads", "num_blocks"), "i32"),
                    },
                    tile,
                    4,
                    head_sizes | {"num_blocks": num_blocks},
                    (1024,),
                )
            )
    return builds


def gate_builds() -> list[Build]:
    """Return the builds of SwiGLU, forward and backward; each has one configuration for all sizes."""
    num_elements = T * INTERMEDIATE
    backward_tensors = ("grad_y_ptr", "gate_ptr", "up_ptr", "grad_gate_ptr", "grad_up_ptr")
    return [
        Build(
            "swiglu",
            swiglu._forward_kernel,
            {
                **dict.fromkeys(("gate_ptr", "up_ptr", "y_ptr"), "*bf16"),
                **dict.fromkeys(("gate_stride", "up_stride", "num_columns"), "i32"),
            },
            {"BLOCK": swiglu.FORWARD_BLOCK},
            4,
            {"gate_stride": 2 * INTERMEDIATE, "up_stride": 2 * INTERMEDIATE, "num_columns": INTERMEDIATE},
            (T, INTERMEDIATE // swiglu.FORWARD_BLOCK),
        ),
        Build(
            "swiglu backward",
            swiglu._backward_kernel,
            {**dict.fromkeys(backward_tensors, "*bf16"), "num_elements": "i64"},
            {"BLOCK": swiglu.BACKWARD_BLOCK},
            8,
            {"num_elements": num_elements},
            (num_elements // swiglu.BACKWARD_BLOCK,),
        ),
    ]


def linear_builds() -> list[Build]:
    """Return builds of the batch-invariant matmul for every tile in bf16 and e4m3, and of the quantization to e4m3."""
    builds = []
    for dtype, itemsize in (("bf16", 2), ("fp8e4nv", 1)):
        for tile in batch_invariant_linear.TILES[itemsize]:
            builds.append(
                Build(
                    f"row_linear {'bf16' if itemsize == 2 else 'e4m3'} {tile.BLOCK_T}x{tile.BLOCK_N}",
                    batch_invariant_linear._batch_invariant_linear_kernel,
                    {
                        "x_desc": descriptor(tile.BLOCK_T, tile.BLOCK_K, dtype),
                        "w_desc": descriptor(tile.BLOCK_N, tile.BLOCK_K, dtype),
                        **(dict.fromkeys(("x_scales_ptr", "w_scales_ptr"), "*u8") if itemsize == 1 else {}),
                        "bias_ptr": "*bf16",
                        "out_ptr": "*bf16",
                        **dict.fromkeys(("T", "N", "K"), "i32"),
                    },
                    tile_constants(tile),
                    tile.num_warps,
                    {"T": T, "N": V, "K": H},
                    (NUM_SMS,),
                    {},
                    tile.num_stages,
                    required_instructions=("wgmma", "tma_loads"),
                )
            )
    for has_column_scales in (False, True):
        column_arguments = {"column_scales_ptr": "*u8"} if has_column_scales else {}
        builds.append(
            Build(
                f"quantise a row{' of scaled columns' if has_column_scales else ''}",
                fp8._quantize_kernel,
                {"x_ptr": "*bf16", **column_arguments, "values_ptr": "*fp8e4nv", "scales_ptr": "*u8", "D": "i32"},
                {"BLOCK_D": 16_384},
                8,
                {"D": 2 * H},
                (T,),
            )
        )
    return builds
