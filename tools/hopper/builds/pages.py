"""The page cache: writing to it, and attention against it."""

from typing import Any

import triton

from thinksafe.kernels import kv_write, paged_decode, paged_prefill
from tools.hopper.builds.build import Build, T


def paged_attention_builds() -> list[Build]:
    """The sampler's kernels, for the groups and pages of the families served, and for caches in e4m3."""
    found = [
        Build(
            "paged_decode work",
            paged_decode._work_kernel,
            {"seq_lens_ptr": "*i64", "work_ptr": "*i32", "num_rows": "i32", "max_splits": "i32"},
            {"SPLIT": paged_decode.SPLIT, "BLOCK_B": 512},
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
                    **dict.fromkeys(("q_stride", "k_stride", "v_stride", "num_heads", "num_kv_heads"), "i32"),
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
                {
                    "num_heads": num_heads,
                    "num_kv_heads": num_kv_heads,
                    **dict.fromkeys(("q_stride", "k_stride", "v_stride"), (num_heads + 2 * num_kv_heads) * 128),
                },
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
    itemsize = 1 if "key" in in_e4m3 else 2
    decode, prefill = paged_decode.TILES[itemsize], paged_prefill.TILES[2]
    found = [
        Build(
            f"paged_decode {name}",
            paged_decode._decode_kernel,
            arguments(paged_decode._decode_kernel),
            {
                **sizes,
                "PAGE_SIZE": page_size,
                "SPLIT": paged_decode.SPLIT,
                "BLOCK_G": max(padded, decode.heads),
                "BLOCK_N": decode.tokens,
                "INTERPRETED": False,
            },
            num_warps=1,
            num_stages=decode.num_stages,
            resident=decode.programs,
            streams=decode.tokens * D * sum(1 if name in in_e4m3 else 2 for name in ("key", "value")),
            uses=("mma", "wide_copies"),
        ),
        Build(
            f"paged_prefill {name}",
            paged_prefill._prefill_kernel,
            arguments(paged_prefill._prefill_kernel),
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
                paged_decode._combine_kernel,
                arguments(paged_decode._combine_kernel),
                {
                    **sizes,
                    "SPLIT": paged_decode.SPLIT,
                    "BLOCK_S": paged_decode.MAX_SPLITS,
                    "BLOCK_G": padded,
                },
                num_warps=1,
            )
        )
    return found
