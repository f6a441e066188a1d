"""Builds of the operations on the page cache: writing to it, and attention that reads it."""

from typing import Any

import triton

from thinksafe.kernels import kv_write, paged_decode, paged_prefill
from tools.hopper.builds.build import Build, T


def paged_attention_builds() -> list[Build]:
    """Return builds of paged decode and prefill, and of the write of keys and values to the cache.

    They cover the KV groups and page sizes of all supported model families, with caches in bf16 and in e4m3.
    """
    builds = [
        Build(
            "paged_decode work",
            paged_decode._list_splits_kernel,
            {"seq_lens_ptr": "*i64", "split_list_ptr": "*i32", "num_rows": "i32", "max_splits": "i32"},
            {"SPLIT": paged_decode.SPLIT, "BLOCK_B": 512},
            num_warps=4,
        )
    ]
    for shape in ((2, 128, 64), (4, 128, 64), (8, 128, 64), (7, 64, 64), (2, 128, 16)):
        builds += _attention_builds(*shape)
    builds += _attention_builds(2, 128, 64, ("key", "value"))
    builds += _attention_builds(4, 128, 64, ("key", "value"))
    builds += _attention_builds(7, 128, 64, ("value",))
    for num_heads, num_kv_heads, has_norm, e4m3_kinds in (
        (16, 8, True, ()), (64, 8, True, ()), (28, 4, False, ()), (64, 8, True, ("key", "value")),
        (28, 4, False, ("value",)),
    ):  # fmt: skip
        suffix = f"{'' if has_norm else ', no norm'}{_e4m3_suffix(e4m3_kinds)}"
        builds.append(
            Build(
                f"norm_rope_write_kv {num_heads}/{num_kv_heads} heads{suffix}",
                kv_write._norm_rope_write_kernel,
                {
                    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16"),
                    **(dict.fromkeys(("q_weight_ptr", "k_weight_ptr"), "*bf16") if has_norm else {}),
                    **_cache_arguments(e4m3_kinds),
                    **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
                    "slots_ptr": "*i64",
                    **dict.fromkeys(("q_stride", "k_stride", "v_stride", "num_heads", "num_kv_heads"), "i32"),
                    "eps": "fp32",
                },
                {
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
    return builds


def _e4m3_suffix(e4m3_kinds: tuple[str, ...]) -> str:
    return f", {' and '.join(f'{name}s' for name in e4m3_kinds)} in e4m3" if e4m3_kinds else ""


def _cache_arguments(e4m3_kinds: tuple[str, ...]) -> dict[str, str]:
    """Return pointer argument -> Triton type for key cache, value cache, and the scales of those in e4m3.

    Args:
        e4m3_kinds: which of `key` and `value` are in e4m3; the others are in bf16 and have no scales.
    """
    pages = {f"{name}_ptr": "*fp8e4nv" if name in e4m3_kinds else "*bf16" for name in ("key", "value")}
    return pages | {f"{name}_scales_ptr": "*u8" for name in e4m3_kinds}


def _attention_builds(group: int, D: int, page_size: int, e4m3_kinds: tuple[str, ...] = ()) -> list[Build]:
    """Return builds of decode and prefill for one kind of cache, and of combine if it is in bf16 with pages of 64.

    Args:
        group: query heads per KV head.
        D: elements of an attention head.
        page_size: tokens per page.
        e4m3_kinds: which of `key` and `value` are in e4m3; the others are in bf16.
    """
    argument_types = {
        **dict.fromkeys(("q_ptr", "out_ptr"), "*bf16"),
        **_cache_arguments(e4m3_kinds),
        **dict.fromkeys(("page_table_ptr", "seq_lens_ptr"), "*i64"),
        **dict.fromkeys(("split_list_ptr", "tiles_ptr", "cu_seqlens_ptr"), "*i32"),
        **dict.fromkeys(("partial_ptr", "lse_ptr"), "*fp32"),
        "scale": "fp32",
        **dict.fromkeys(("width", "num_kv_heads", "max_splits"), "i32"),
    }

    def arguments(kernel: Any) -> dict[str, str]:
        return {name: kind for name, kind in argument_types.items() if name in kernel.arg_names}

    name = f"{group} heads a group, D={D}, pages of {page_size}{_e4m3_suffix(e4m3_kinds)}"
    sizes = {"GROUP": group, "D": D, "BLOCK_D": D}
    padded_group = triton.next_power_of_2(group)
    itemsize = 1 if "key" in e4m3_kinds else 2
    decode_config, prefill_config = paged_decode.CONFIGS[itemsize], paged_prefill.CONFIGS[2]
    builds = [
        Build(
            f"paged_decode {name}",
            paged_decode._decode_kernel,
            arguments(paged_decode._decode_kernel),
            {
                **sizes,
                "PAGE_SIZE": page_size,
                "SPLIT": paged_decode.SPLIT,
                "BLOCK_G": max(padded_group, decode_config.block_g),
                "BLOCK_N": decode_config.block_n,
                "INTERPRETED": False,
            },
            num_warps=1,
            num_stages=decode_config.num_stages,
            programs_per_sm=decode_config.programs_per_sm,
            bytes_per_iteration=decode_config.block_n
            * D
            * sum(1 if name in e4m3_kinds else 2 for name in ("key", "value")),
            required_instructions=("mma", "wide_copies"),
        ),
        Build(
            f"paged_prefill {name}",
            paged_prefill._prefill_kernel,
            arguments(paged_prefill._prefill_kernel),
            {**sizes, "PAGE_SIZE": page_size, "BLOCK_M": prefill_config.BLOCK_M, "BLOCK_N": prefill_config.BLOCK_N},
            prefill_config.num_warps,
            num_stages=prefill_config.num_stages,
            required_instructions=("wgmma", "wide_copies"),
        ),
    ]
    if page_size == 64 and not e4m3_kinds:
        builds.append(
            Build(
                f"paged_decode combine {name}",
                paged_decode._combine_kernel,
                arguments(paged_decode._combine_kernel),
                {
                    **sizes,
                    "SPLIT": paged_decode.SPLIT,
                    "BLOCK_S": paged_decode.MAX_SPLITS,
                    "BLOCK_G": padded_group,
                },
                num_warps=1,
            )
        )
    return builds
