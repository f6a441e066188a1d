"""What a layer computes outside of attention: norms, rotation, gate, products."""

from thinksafe.kernels import fp8, rms_norm, rope, row_linear, swiglu
from tools.hopper.builds.build import HEADS, INTERMEDIATE, PROCESSORS, Build, H, T, V, descriptor


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
    backward = ("grad_ptr", "gate_ptr", "up_ptr", "grad_gate_ptr", "grad_up_ptr")
    return [
        Build(
            "swiglu",
            swiglu._forward_kernel,
            {
                **dict.fromkeys(("gate_ptr", "up_ptr", "y_ptr"), "*bf16"),
                **dict.fromkeys(("gate_stride", "up_stride", "num_columns"), "i32"),
            },
            {"BLOCK": swiglu._COLUMNS},
            4,
            {"gate_stride": 2 * INTERMEDIATE, "up_stride": 2 * INTERMEDIATE, "num_columns": INTERMEDIATE},
            (T, INTERMEDIATE // swiglu._COLUMNS),
        ),
        Build(
            "swiglu backward",
            swiglu._backward_kernel,
            {**dict.fromkeys(backward, "*bf16"), "num_elements": "i64"},
            {"BLOCK": swiglu._BLOCK},
            8,
            {"num_elements": elements},
            (elements // swiglu._BLOCK,),
        ),
    ]


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
    for scaled in (False, True):
        columns = {"columns_ptr": "*u8"} if scaled else {}
        found.append(
            Build(
                f"quantise a row{' of scaled columns' if scaled else ''}",
                fp8._quantise_kernel,
                {"x_ptr": "*bf16", **columns, "values_ptr": "*fp8e4nv", "exponents_ptr": "*u8", "D": "i32"},
                {"BLOCK_D": 16_384},
                8,
                {"D": 2 * H},
                (T,),
            )
        )
    return found
