"""Decode and prefill attention over the paged KV cache match a loop in fp64.

The file makes the same promises for three implementations: plain torch, the Triton kernels in fp32 under
TRITON_INTERPRET=1, and the kernels in bf16 on a GPU. test_paged_hopper.py runs the compiled kernels without a GPU.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.paged import (
    PagedContexts,
    outputs_after_zero_e4m3_values,
    outputs_of_scaled_e4m3_values,
    relative_error,
)
from thinksafe.kernels import paged_decode as decoding
from thinksafe.kernels import paged_prefill as prefilling
from thinksafe.kernels.dispatch import INTERPRETED
from thinksafe.kernels.kv_write import norm_rope_write_kv
from thinksafe.kernels.paged_cache import KvCache
from thinksafe.kernels.paged_decode import list_splits, paged_decode
from thinksafe.kernels.paged_prefill import prefill_tiles

EXAMPLES = 12 if INTERPRETED else 40
kernel_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@st.composite
def problems(draw, min_length):
    """Draw contexts of up to three pages and one token, with 1 to 8 query heads per KV head, also 6 and 7."""
    page_size = draw(st.sampled_from([1, 16, 64]))
    lengths = draw(st.lists(st.integers(min_length, 3 * page_size + 1), min_size=1, max_size=4))
    num_kv_heads, group_size = draw(st.sampled_from([(1, 8), (2, 1), (2, 4), (3, 2), (1, 7), (1, 6)]))
    return PagedContexts(
        [max(lengths[0], 1), *lengths[1:]],
        page_size,
        (num_kv_heads * group_size, num_kv_heads),
        draw(st.sampled_from([8, 64, 128])),
        num_shared_pages=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**31)),
        fp8=draw(st.sampled_from([(False, False), (False, True), (True, True)])),
    )


@settings(max_examples=EXAMPLES)
@given(problems(min_length=0))
def test_decode_matches_fp64_over_the_own_context(problem):
    q = problem.queries(len(problem.lengths))
    out = problem.decode(q)
    for row in range(len(q)):
        torch.testing.assert_close(out[row, None].double(), problem.expected(q[row, None], row), rtol=1e-5, atol=1e-5)


on_cpu_and_gpu = pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [("cpu", torch.float32, 1e-4), pytest.param("cuda", torch.bfloat16, 5e-3, marks=pytest.mark.gpu)],
)


@pytest.mark.parametrize("exponent_range", [(-90, -60), (-40, 40), (60, 90)])
@on_cpu_and_gpu
def test_attention_is_accurate_for_any_e4m3_scale(fresh_seed, monkeypatch, exponent_range, device, dtype, tolerance):
    monkeypatch.setattr(decoding, "SPLIT", 64)
    for out, expected in outputs_of_scaled_e4m3_values(fresh_seed, exponent_range, device, dtype):
        assert ((out.double() - expected).abs() <= tolerance * expected.abs().amax(-1, keepdim=True)).all()


@on_cpu_and_gpu
def test_zero_e4m3_values_keep_their_softmax_weight(fresh_seed, device, dtype, tolerance):
    for out, expected in outputs_after_zero_e4m3_values(fresh_seed, device, dtype):
        assert relative_error(out, expected) < tolerance


@settings(max_examples=EXAMPLES)
@given(problems(min_length=1), st.data())
def test_prefill_matches_fp64_causal_attention(problem, data):
    query_lens = [data.draw(st.integers(1, length)) for length in problem.lengths]
    q = problem.queries(sum(query_lens))
    parts = zip(q.split(query_lens), problem.prefill(q, query_lens).split(query_lens), strict=True)
    for row, (queries, out) in enumerate(parts):
        torch.testing.assert_close(out.double(), problem.expected(queries, row), rtol=1e-5, atol=1e-5)


def test_reference_decode_does_not_depend_on_batching(monkeypatch):
    problem = PagedContexts([50, 1, 7, 0, 64, 8], 16, (4, 2), 8)
    q = problem.queries(6)
    arguments = (q, KvCache(*problem.dequantized_cache), problem.page_table, problem.seq_lens)
    expected = decoding.reference(*arguments)
    monkeypatch.setattr(decoding, "REFERENCE_BATCH_TOKENS", 64)
    torch.testing.assert_close(decoding.reference(*arguments), expected)


def test_invalid_cache_arguments_raise_value_error():
    problem = PagedContexts([5], 4, (4, 2), 8)
    keys, values = problem.dequantized_cache
    for q, cache, page_table, message in (
        (torch.zeros(1, 4, 16), (keys, values), problem.page_table, "num_kv_heads, page_size, D"),
        (torch.zeros(1, 3, 8), (keys, values), problem.page_table, "a multiple of num_kv_heads"),
        (torch.zeros(1, 4, 8), (keys, values[1:]), problem.page_table, "equal shapes and be contiguous"),
        (torch.zeros(1, 4, 8), (keys.bfloat16(), values.bfloat16()), problem.page_table, "must have the dtype of q"),
        (torch.zeros(1, 4, 8), (keys, values), problem.page_table.int(), "page_table must be torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_decode(q, KvCache(*cache), page_table, problem.seq_lens)
    q, e4m3_problem = torch.zeros(1, 4, 8), PagedContexts([5], 4, (4, 2), 8, fp8=(True, True))
    for scales_e8m0, message in (
        ((None, None), "e4m3 and scales"),
        ((e4m3_problem.scales_e8m0[0][1:], e4m3_problem.scales_e8m0[1]), "scales must be uint8"),
    ):
        cache = KvCache(*e4m3_problem.kv_cache, *scales_e8m0)
        with pytest.raises(ValueError, match=message):
            paged_decode(q, cache, e4m3_problem.page_table, e4m3_problem.seq_lens)


@kernel_only
@pytest.mark.parametrize(
    "lengths",
    [[257], [200, 0, 64], pytest.param([200, 0, 129, 128, 1, 64, 65, 300], marks=pytest.mark.exhaustive)],
)
def test_decode_does_not_depend_on_the_number_of_splits(monkeypatch, lengths):
    problem = PagedContexts(lengths, 64, (6, 2), 64, seed=3)
    q = problem.queries(len(lengths))
    expected = problem.decode(q)
    for split, max_splits in [(64, 32), (128, 32), (192, 32), (64, 2), (64, 3), (64, 1)]:
        monkeypatch.setattr(decoding, "SPLIT", split)
        monkeypatch.setattr(decoding, "MAX_SPLITS", max_splits)
        torch.testing.assert_close(problem.decode(q), expected, rtol=1e-5, atol=1e-5)


@kernel_only
@pytest.mark.parametrize(("split", "max_splits"), [(64, 32), (64, 3), (512, 32)])
def test_split_list_holds_every_split_once(monkeypatch, split, max_splits):
    monkeypatch.setattr(decoding, "SPLIT", split)
    monkeypatch.setattr(decoding, "MAX_SPLITS", max_splits)
    lengths = [0, 1, 64, 65, 700, 0, 128, 1000, 5]
    num_items, *items = list_splits(torch.tensor(lengths), 1024).tolist()
    stride = (len(items)) // len(lengths)
    expected = []
    for row, length in enumerate(lengths):
        split_len = split
        while split_len * max_splits < length:
            split_len += split
        expected += [row * stride + index for index in range(-(-length // split_len))]
    assert stride <= max_splits
    assert items[:num_items] == expected


@kernel_only
def test_decode_row_has_equal_bits_in_any_batch_and_table(monkeypatch):
    monkeypatch.setattr(decoding, "SPLIT", 64)
    problem = PagedContexts([200, 3, 129, 64], 16, (4, 2), 64, seed=5)
    q = problem.queries(4)
    batch = problem.decode(q)
    wider_table = torch.nn.functional.pad(problem.page_table, (0, 40))
    for row in range(4):
        cache, seq_len = KvCache(*problem.dequantized_cache), problem.seq_lens[row, None]
        alone = paged_decode(q[row, None], cache, wider_table[row, None], seq_len)
        assert torch.equal(alone[0], batch[row])


@kernel_only
def test_one_split_list_serves_all_layers():
    problem = PagedContexts([70, 0, 9], 16, (4, 2), 64)
    split_list = list_splits(problem.seq_lens, problem.page_table.shape[1] * 16)
    for _ in range(2):
        q = problem.queries(3)
        assert torch.equal(problem.decode(q, split_list=split_list), problem.decode(q))


@kernel_only
def test_empty_batch_and_empty_contexts_are_no_error():
    problem = PagedContexts([5], 16, (4, 2), 64)
    empty_q, cache = torch.zeros(0, 4, 64), KvCache(*problem.dequantized_cache)
    assert paged_decode(empty_q, cache, problem.page_table[:0], problem.seq_lens[:0]).shape == (0, 4, 64)
    assert not problem.decode(problem.queries(1))[0].isnan().any()
    problem.seq_lens[:] = 0
    assert not problem.decode(problem.queries(1)).any()


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 500)), min_size=1, max_size=6), st.integers(1, 8))
def test_prefill_tiles_cover_queries_once_longest_first(sequences, group_size):
    query_lens, num_cached = np.array(sequences).T
    tiles = prefill_tiles(query_lens, num_cached + query_lens, group_size, itemsize=2)
    block_m = prefilling.CONFIGS[2].BLOCK_M
    assert sorted(map(tuple, tiles.tolist())) == [
        (row, tile) for row, length in enumerate(query_lens) for tile in range(-(-int(length) * group_size // block_m))
    ]
    num_new = np.minimum((tiles[:, 1] + 1) * block_m // group_size, query_lens[tiles[:, 0]])
    assert (np.diff(num_cached[tiles[:, 0]] + num_new) <= 0).all()


# Beyond 2^31 elements


@pytest.mark.parametrize("page_size", [16, 64])
def test_cache_indices_beyond_two_to_the_31_are_right(tmp_path, page_size):
    """The context is in the last pages of one large cache, for keys and for values. The rest of its file is sparse."""
    num_pages = 2**31 // (page_size * 64) + 2
    num_elements = num_pages * page_size * 64
    cache = torch.from_file(str(tmp_path / "cache"), shared=True, size=num_elements).view(num_pages, 1, page_size, 64)
    problem = PagedContexts([page_size + 4], page_size, (2, 1), 64)
    problem.dequantized_cache[1] = problem.dequantized_cache[0]
    q = problem.queries(3)
    expected = problem.expected(q, 0)
    pages = torch.tensor([[num_pages - 1, num_pages - 2]])
    cache[pages[0]] = problem.dequantized_cache[0, problem.page_table[0, :2]]
    problem.kv_cache, problem.page_table = (cache, cache), pages
    torch.testing.assert_close(problem.prefill(q, [3]).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(problem.decode(q[2:]).double(), expected[2:], rtol=1e-5, atol=1e-5)
    v, slot = torch.randn(1, 1, 64), pages[0, 0] * page_size + 5
    cos, sin = torch.ones(1, 32), torch.zeros(1, 32)
    norm_rope_write_kv(v, v, v, None, None, 1e-6, cos, sin, KvCache(cache, cache), slot[None])
    assert torch.equal(cache[-1, 0, 5], v[0, 0])


# On a GPU


SHAPES = [((16, 8), 128, 64), ((32, 8), 128, 64), ((28, 4), 128, 16), ((14, 2), 64, 64), ((4, 2), 8, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "D", "page_size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decode_on_gpu_is_as_precise_as_plain_torch(fresh_seed, heads, D, page_size, dtype):
    lengths = [1, 0, 63, 64, 65, 511, 512, 513, 4000, 17_000 if page_size > 1 else 1000]
    problem = PagedContexts(
        lengths, page_size, heads, D, num_shared_pages=4, seed=fresh_seed, device="cuda", dtype=dtype
    )
    q = problem.queries(len(lengths))
    expected = torch.cat([problem.expected(q[row, None], row) for row in range(len(lengths))])
    cache = KvCache(*problem.dequantized_cache)
    reference = decoding.reference(q, cache, problem.page_table, problem.seq_lens)
    assert relative_error(problem.decode(q), expected) <= 1.25 * relative_error(reference, expected) + 1e-6
    assert relative_error(problem.decode(q), expected) < (5e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "D", "page_size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prefill_on_gpu_is_as_precise_as_plain_torch(fresh_seed, heads, D, page_size, dtype):
    lengths, query_lens = [1, 700, 64, 65, 2000], [1, 300, 64, 2, 1]
    problem = PagedContexts(
        lengths, page_size, heads, D, num_shared_pages=4, seed=fresh_seed, device="cuda", dtype=dtype
    )
    q = problem.queries(sum(query_lens))
    expected = torch.cat([problem.expected(part, row) for row, part in enumerate(q.split(query_lens))])
    cu_seqlens = torch.tensor([0, *query_lens], device="cuda").cumsum(0)
    cache = KvCache(*problem.dequantized_cache)
    reference = prefilling.reference(q, cache, problem.page_table, cu_seqlens, problem.seq_lens)
    actual = problem.prefill(q, query_lens)
    assert relative_error(actual, expected) <= 1.25 * relative_error(reference, expected) + 1e-6
    assert relative_error(actual, expected) < (5e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [(True, True), (False, True)])
@pytest.mark.parametrize(("heads", "D", "page_size"), SHAPES[:4])
def test_e4m3_cache_on_gpu_is_read_as_precisely_as_bf16(fresh_seed, heads, D, page_size, fp8):
    """The oracle is fp64 attention over the dequantized cache."""
    lengths = [1, 0, 63, 64, 65, 511, 512, 513, 4000]
    settings = {"num_shared_pages": 4, "seed": fresh_seed, "device": "cuda", "dtype": torch.bfloat16, "fp8": fp8}
    problem = PagedContexts(lengths, page_size, heads, D, **settings)
    q = problem.queries(len(lengths))
    expected = torch.cat([problem.expected(q[row, None], row) for row in range(len(lengths))])
    assert relative_error(problem.decode(q), expected) < 5e-3
    query_lens = [min(length, 300) for length in lengths]
    q = problem.queries(sum(query_lens))
    parts = [problem.expected(part, row) for row, part in enumerate(q.split(query_lens)) if query_lens[row]]
    assert relative_error(problem.prefill(q, query_lens), torch.cat(parts)) < 5e-3


@pytest.mark.gpu
def test_cuda_graph_follows_changed_lengths(fresh_seed):
    """The graph is captured once and replayed for other lengths, some of them 0, without a host sync."""
    problem = PagedContexts(
        [900, 2000, 700, 64], 64, (16, 8), 128, seed=fresh_seed, device="cuda", dtype=torch.bfloat16
    )
    q = problem.queries(4)
    problem.decode(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph_out = problem.decode(q)
    for lengths in ([900, 2000, 700, 64], [1, 513, 0, 0], [512, 1025, 3, 64]):
        problem.seq_lens.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(graph_out, problem.decode(q))
        problem.lengths = lengths
        expected = torch.cat([problem.expected(q[row, None], row) for row in range(4)])
        assert relative_error(graph_out, expected) < 5e-3


@pytest.mark.gpu
def test_decode_row_on_gpu_has_equal_bits_in_any_batch(fresh_seed):
    lengths = [int(length) for length in torch.randint(1, 3000, (64,))]
    problem = PagedContexts(lengths, 64, (16, 8), 128, seed=fresh_seed, device="cuda", dtype=torch.bfloat16)
    q = problem.queries(64)
    batch = problem.decode(q)
    for row in range(64):
        row_slice = slice(row, row + 1)
        cache = KvCache(*problem.dequantized_cache)
        alone = paged_decode(q[row_slice], cache, problem.page_table[row_slice], problem.seq_lens[row_slice])
        assert torch.equal(alone[0], batch[row])
