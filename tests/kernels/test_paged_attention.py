"""Attention against the paged cache, held against a loop in fp64.

The same promises three times: of the plain reference as the file stands, of the Triton kernels' arithmetic in fp32
under TRITON_INTERPRET=1, and of the kernels in bf16 on a GPU. test_paged_hopper.py runs what they are compiled to.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.paged import Paged, relative
from thinksafe.kernels import paged_decode as decoding
from thinksafe.kernels import paged_prefill as prefilling
from thinksafe.kernels.dispatch import INTERPRETED
from thinksafe.kernels.fp8 import dequantise
from thinksafe.kernels.kv_write import norm_rope_write_kv
from thinksafe.kernels.paged_decode import decode_work, paged_decode
from thinksafe.kernels.paged_prefill import prefill_tiles

kernel_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@st.composite
def problems(draw, shortest):
    """Up to three pages and a token a sequence; groups of 1 to 8 query heads, not all of them powers of two."""
    page_size = draw(st.sampled_from([1, 16, 64]))
    lengths = draw(st.lists(st.integers(shortest, 3 * page_size + 1), min_size=1, max_size=4))
    num_kv_heads, group = draw(st.sampled_from([(1, 8), (2, 1), (2, 4), (3, 2), (1, 7), (1, 6)]))
    return Paged(
        [max(lengths[0], 1), *lengths[1:]],
        page_size,
        (num_kv_heads * group, num_kv_heads),
        draw(st.sampled_from([8, 64, 128])),
        shared=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**31)),
        fp8=draw(st.sampled_from([(False, False), (False, True), (True, True)])),
    )


@settings(max_examples=40)
@given(problems(shortest=0))
def test_a_new_token_sees_exactly_its_own_context(problem):
    q = problem.queries(len(problem.lengths))
    out = problem.decode(q)
    for row in range(len(q)):
        torch.testing.assert_close(out[row, None].double(), problem.expected(q[row, None], row), rtol=1e-5, atol=1e-5)


on_both = pytest.mark.parametrize(
    ("device", "dtype", "error"),
    [("cpu", torch.float32, 1e-4), pytest.param("cuda", torch.bfloat16, 5e-3, marks=pytest.mark.gpu)],
)


@pytest.mark.parametrize("powers", [(-90, -60), (-40, 40), (60, 90)])
@on_both
def test_values_in_e4m3_may_be_of_any_size(fresh_seed, monkeypatch, powers, device, dtype, error):
    """In one context, and some of them nothing but zeros, whose scale is the smallest there is: those with the highest
    score, and all of one context."""
    monkeypatch.setattr(decoding, "SPLIT", 64)
    problem = Paged([200, 1, 70, 130], 64, (4, 2), 64, seed=fresh_seed, device=device, dtype=dtype, fp8=(True, True))
    q = problem.queries(4)
    numbers, exponents = problem.stored[1].view(torch.uint8), problem.exponents[1]
    exponents.copy_(torch.randint(*powers, exponents.shape).add(127))
    best = problem.context(0)[0].matmul(q[0].double()[..., None])[..., 0].argmax(-1)[::2]
    for head, token in enumerate(best.tolist()):
        where = problem.page_table[0, token // 64], head, token % 64
        numbers[where], exponents[where] = 0, 1
    numbers[problem.page_table[3, :3]], exponents[problem.page_table[3, :3]] = 0, 1
    problem.cache[1] = dequantise(problem.stored[1], exponents, dtype)
    counts = [8, 1, 6, 4]
    prompts = problem.queries(sum(counts)).split(counts)
    read = problem.prefill(torch.cat(prompts), counts).split(counts)
    for row in range(4):
        for queries, out in ((q[row, None], problem.decode(q)[row, None]), (prompts[row], read[row])):
            expected = problem.expected(queries, row)
            largest = expected.abs().amax(-1, keepdim=True)
            assert ((out.double() - expected).abs() <= error * largest).all()


@on_both
def test_zeros_of_e4m3_take_their_share_of_the_weights(fresh_seed, device, dtype, error):
    """Two pages of them before anything else, all about as likely as the rest."""
    problem = Paged([200], 64, (4, 2), 64, seed=fresh_seed, device=device, dtype=dtype, fp8=(True, True))
    zeros = problem.page_table[0, :2]
    problem.stored[1].view(torch.uint8)[zeros], problem.exponents[1][zeros] = 0, 1
    problem.cache[1][zeros] = 0
    q = problem.queries(3) / 32
    expected = problem.expected(q, 0)
    assert relative(problem.prefill(q, [3]), expected) < error
    assert relative(problem.decode(q[2:]), expected[2:]) < error


@settings(max_examples=40)
@given(problems(shortest=1), st.data())
def test_a_stretch_of_new_tokens_sees_its_context_and_itself_up_to_each_token(problem, data):
    counts = [data.draw(st.integers(1, length)) for length in problem.lengths]
    q = problem.queries(sum(counts))
    parts = zip(q.split(counts), problem.prefill(q, counts).split(counts), strict=True)
    for row, (queries, out) in enumerate(parts):
        torch.testing.assert_close(out.double(), problem.expected(queries, row), rtol=1e-5, atol=1e-5)


def test_how_the_reference_batches_rows_changes_no_result(monkeypatch):
    problem = Paged([50, 1, 7, 0, 64, 8], 16, (4, 2), 8)
    q = problem.queries(6)
    arguments = (q, *problem.cache, problem.page_table, problem.seq_lens)
    whole = decoding.reference_decode(*arguments)
    monkeypatch.setattr(decoding, "_BATCH_TOKENS", 64)
    torch.testing.assert_close(decoding.reference_decode(*arguments), whole)


def test_shapes_that_do_not_fit_are_refused():
    problem = Paged([5], 4, (4, 2), 8)
    keys, values = problem.cache
    for q, cache, table, message in (
        (torch.zeros(1, 4, 16), (keys, values), problem.page_table, "num_kv_heads, page_size, D"),
        (torch.zeros(1, 3, 8), (keys, values), problem.page_table, "a multiple of num_kv_heads"),
        (torch.zeros(1, 4, 8), (keys, values[1:]), problem.page_table, "equal, contiguous"),
        (torch.zeros(1, 4, 8), (keys.bfloat16(), values.bfloat16()), problem.page_table, "must be the same"),
        (torch.zeros(1, 4, 8), (keys, values), problem.page_table.int(), "int64"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_decode(q, *cache, table, problem.seq_lens)
    q, in_e4m3 = torch.zeros(1, 4, 8), Paged([5], 4, (4, 2), 8, fp8=(True, True))
    for exponents, message in (
        ((None, None), "exponents be given"),
        ((in_e4m3.exponents[0][1:], in_e4m3.exponents[1]), "exponents are"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_decode(q, *in_e4m3.stored, in_e4m3.page_table, in_e4m3.seq_lens, exponents=exponents)


@kernel_only
@pytest.mark.parametrize("lengths", [[200, 0, 129, 128, 1, 64, 65, 300], [257]])
def test_one_or_many_splits_agree(monkeypatch, lengths):
    problem = Paged(lengths, 64, (6, 2), 64, seed=3)
    q = problem.queries(len(lengths))
    whole = problem.decode(q)
    for split, max_splits in [(64, 32), (128, 32), (192, 32), (64, 2), (64, 3), (64, 1)]:
        monkeypatch.setattr(decoding, "SPLIT", split)
        monkeypatch.setattr(decoding, "MAX_SPLITS", max_splits)
        torch.testing.assert_close(problem.decode(q), whole, rtol=1e-5, atol=1e-5)


@kernel_only
@pytest.mark.parametrize(("split", "max_splits"), [(64, 32), (64, 3), (512, 32)])
def test_work_lists_every_split_of_every_row_once(monkeypatch, split, max_splits):
    monkeypatch.setattr(decoding, "SPLIT", split)
    monkeypatch.setattr(decoding, "MAX_SPLITS", max_splits)
    lengths = [0, 1, 64, 65, 700, 0, 128, 1000, 5]
    num_items, *items = decode_work(torch.tensor(lengths), 1024).tolist()
    stride = (len(items)) // len(lengths)
    expected = []
    for row, length in enumerate(lengths):
        step = split
        while step * max_splits < length:
            step += split
        expected += [row * stride + index for index in range(-(-length // step))]
    assert stride <= max_splits
    assert items[:num_items] == expected


@kernel_only
def test_a_row_has_the_same_bits_in_every_batch_and_under_a_wider_table(monkeypatch):
    monkeypatch.setattr(decoding, "SPLIT", 64)
    problem = Paged([200, 3, 129, 64], 16, (4, 2), 64, seed=5)
    q = problem.queries(4)
    batch = problem.decode(q)
    wider = torch.nn.functional.pad(problem.page_table, (0, 40))
    for row in range(4):
        alone = paged_decode(q[row, None], *problem.cache, wider[row, None], problem.seq_lens[row, None])
        assert torch.equal(alone[0], batch[row])


@kernel_only
def test_one_list_of_work_serves_all_layers():
    problem = Paged([70, 0, 9], 16, (4, 2), 64)
    work = decode_work(problem.seq_lens, problem.page_table.shape[1] * 16)
    for _ in range(2):
        q = problem.queries(3)
        assert torch.equal(problem.decode(q, work=work), problem.decode(q))


@kernel_only
def test_nothing_to_do_is_no_error():
    problem = Paged([5], 16, (4, 2), 64)
    nothing = torch.zeros(0, 4, 64)
    assert paged_decode(nothing, *problem.cache, problem.page_table[:0], problem.seq_lens[:0]).shape == (0, 4, 64)
    assert not problem.decode(problem.queries(1))[0].isnan().any()
    problem.seq_lens[:] = 0
    assert not problem.decode(problem.queries(1)).any()


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 500)), min_size=1, max_size=6), st.integers(1, 8))
def test_tiles_cover_every_query_once_and_start_with_the_longest(rows, group):
    lengths, before = np.array(rows).T
    tiles = prefill_tiles(lengths, before + lengths, group, itemsize=2)
    size = prefilling.TILES[2].rows
    assert sorted(map(tuple, tiles.tolist())) == [
        (row, tile) for row, length in enumerate(lengths) for tile in range(-(-int(length) * group // size))
    ]
    last_query = np.minimum((tiles[:, 1] + 1) * size // group, lengths[tiles[:, 0]])
    assert (np.diff(before[tiles[:, 0]] + last_query) <= 0).all()


# Beyond 2^31 elements


@pytest.mark.parametrize("page_size", [16, 64])
def test_pages_beyond_two_to_the_31_elements_are_found(tmp_path, page_size):
    """In the last pages of a cache, keys and values at once, whose file is a hole but for them."""
    num_pages = 2**31 // (page_size * 64) + 2
    elements = num_pages * page_size * 64
    cache = torch.from_file(str(tmp_path / "cache"), shared=True, size=elements).view(num_pages, 1, page_size, 64)
    problem = Paged([page_size + 4], page_size, (2, 1), 64)
    problem.cache[1] = problem.cache[0]
    q = problem.queries(3)
    wanted = problem.expected(q, 0)
    pages = torch.tensor([[num_pages - 1, num_pages - 2]])
    cache[pages[0]] = problem.cache[0, problem.page_table[0, :2]]
    problem.stored, problem.page_table = (cache, cache), pages
    torch.testing.assert_close(problem.prefill(q, [3]).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(problem.decode(q[2:]).double(), wanted[2:], rtol=1e-5, atol=1e-5)
    v, slot = torch.randn(1, 1, 64), pages[0, 0] * page_size + 5
    norm_rope_write_kv(v, v, v, None, None, 1e-6, torch.ones(1, 32), torch.zeros(1, 32), cache, cache, slot[None])
    assert torch.equal(cache[-1, 0, 5], v[0, 0])


# On a GPU


SHAPES = [((16, 8), 128, 64), ((32, 8), 128, 64), ((28, 4), 128, 16), ((14, 2), 64, 64), ((4, 2), 8, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "D", "page_size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decoding_on_a_gpu_is_as_precise_as_plain_torch(fresh_seed, heads, D, page_size, dtype):
    lengths = [1, 0, 63, 64, 65, 511, 512, 513, 4000, 17_000 if page_size > 1 else 1000]
    problem = Paged(lengths, page_size, heads, D, shared=4, seed=fresh_seed, device="cuda", dtype=dtype)
    q = problem.queries(len(lengths))
    expected = torch.cat([problem.expected(q[row, None], row) for row in range(len(lengths))])
    plain = decoding.reference_decode(q, *problem.cache, problem.page_table, problem.seq_lens)
    assert relative(problem.decode(q), expected) <= 1.25 * relative(plain, expected) + 1e-6
    assert relative(problem.decode(q), expected) < (5e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "D", "page_size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prefill_on_a_gpu_is_as_precise_as_plain_torch(fresh_seed, heads, D, page_size, dtype):
    lengths, counts = [1, 700, 64, 65, 2000], [1, 300, 64, 2, 1]
    problem = Paged(lengths, page_size, heads, D, shared=4, seed=fresh_seed, device="cuda", dtype=dtype)
    q = problem.queries(sum(counts))
    expected = torch.cat([problem.expected(part, row) for row, part in enumerate(q.split(counts))])
    cu_seqlens = torch.tensor([0, *counts], device="cuda").cumsum(0)
    plain = prefilling.reference_prefill(q, *problem.cache, problem.page_table, cu_seqlens, problem.seq_lens)
    found = problem.prefill(q, counts)
    assert relative(found, expected) <= 1.25 * relative(plain, expected) + 1e-6
    assert relative(found, expected) < (5e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [(True, True), (False, True)])
@pytest.mark.parametrize(("heads", "D", "page_size"), SHAPES[:4])
def test_a_cache_in_e4m3_on_a_gpu_is_read_as_precisely_as_one_in_bf16(fresh_seed, heads, D, page_size, fp8):
    """Against fp64 on what the stored numbers stand for."""
    lengths = [1, 0, 63, 64, 65, 511, 512, 513, 4000]
    settings = {"shared": 4, "seed": fresh_seed, "device": "cuda", "dtype": torch.bfloat16, "fp8": fp8}
    problem = Paged(lengths, page_size, heads, D, **settings)
    q = problem.queries(len(lengths))
    expected = torch.cat([problem.expected(q[row, None], row) for row in range(len(lengths))])
    assert relative(problem.decode(q), expected) < 5e-3
    counts = [min(length, 300) for length in lengths]
    q = problem.queries(sum(counts))
    parts = [problem.expected(part, row) for row, part in enumerate(q.split(counts)) if counts[row]]
    assert relative(problem.prefill(q, counts), torch.cat(parts)) < 5e-3


@pytest.mark.gpu
def test_a_graph_follows_lengths_that_change_under_it(fresh_seed):
    """Recorded once, replayed for other lengths, some of them 0, with nothing asked of the host."""
    problem = Paged([900, 2000, 700, 64], 64, (16, 8), 128, seed=fresh_seed, device="cuda", dtype=torch.bfloat16)
    q = problem.queries(4)
    problem.decode(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = problem.decode(q)
    for lengths in ([900, 2000, 700, 64], [1, 513, 0, 0], [512, 1025, 3, 64]):
        problem.seq_lens.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(recorded, problem.decode(q))
        problem.lengths = lengths
        expected = torch.cat([problem.expected(q[row, None], row) for row in range(4)])
        assert relative(recorded, expected) < 5e-3


@pytest.mark.gpu
def test_a_row_on_a_gpu_has_the_same_bits_in_every_batch(fresh_seed):
    lengths = [int(length) for length in torch.randint(1, 3000, (64,))]
    problem = Paged(lengths, 64, (16, 8), 128, seed=fresh_seed, device="cuda", dtype=torch.bfloat16)
    q = problem.queries(64)
    batch = problem.decode(q)
    for row in range(64):
        only = slice(row, row + 1)
        alone = paged_decode(q[only], *problem.cache, problem.page_table[only], problem.seq_lens[only])
        assert torch.equal(alone[0], batch[row])
