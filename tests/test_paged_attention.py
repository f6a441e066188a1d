"""Attention against the paged cache, held against a loop in fp64.

The same promises three times: of the plain reference as the file stands, of the Triton kernels' arithmetic in fp32
under TRITON_INTERPRET=1, and of the kernels in bf16 on a GPU.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinksafe.kernels import kv_write
from thinksafe.kernels import paged_decode as decoding
from thinksafe.kernels import paged_prefill as prefilling
from thinksafe.kernels.dispatch import INTERPRETED
from thinksafe.kernels.fp8 import dequantise
from thinksafe.kernels.fp8 import reference as quantise
from thinksafe.kernels.kv_write import norm_rope_write_kv
from thinksafe.kernels.paged_cache import write_kv
from thinksafe.kernels.paged_decode import decode_work, paged_decode
from thinksafe.kernels.paged_prefill import paged_prefill, prefill_tiles
from thinksafe.kernels.rope import qk_norm_rope, rope

kernel_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


class Paged:
    """Random contexts on shuffled pages of a pool that is NaN wherever no token lies.

    Sequences share the first `shared` pages of the longest one, as far as their own full pages go. Page-table entries
    behind a last page name any page. Where keys or values are in e4m3, `cache` is what the stored numbers stand for.
    """

    def __init__(
        self, lengths, page_size, heads, D, *, shared=0, seed=0, device="cpu", dtype=torch.float32, fp8=(False, False)
    ):
        generator = torch.Generator().manual_seed(seed)
        self.lengths, self.page_size, self.D = lengths, page_size, D
        self.num_heads, self.num_kv_heads = heads
        self.generator, self.device, self.dtype = generator, device, dtype
        width = -(-max(lengths) // page_size) + 1
        num_pages = sum(-(-length // page_size) for length in lengths) + 2
        free = torch.randperm(num_pages, generator=generator).tolist()
        self.page_table = torch.randint(num_pages, (len(lengths), width), generator=generator)
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        for row in sorted(range(len(lengths)), key=lambda row: row != longest):
            common = 0 if row == longest else min(shared, lengths[row] // page_size)
            own = -(-lengths[row] // page_size) - common
            self.page_table[row, :common] = self.page_table[longest, :common]
            self.page_table[row, common : common + own] = torch.tensor([free.pop() for _ in range(own)])
        cache = torch.full((2, num_pages, self.num_kv_heads, page_size, D), torch.nan)
        for row, length in enumerate(lengths):
            position = torch.arange(length)
            pages, offsets = self.page_table[row, position // page_size], position % page_size
            cache[:, pages, :, offsets] = torch.randn(length, 2, self.num_kv_heads, D, generator=generator)
        # Heads of very different size, so that an exponent of another token or head would show.
        cache *= 2.0 ** torch.randint(-6, 1, cache.shape[:-1], generator=generator)[..., None] if any(fp8) else 1
        self.cache = cache.to(device, dtype)
        self.stored, self.exponents = list(self.cache), [None, None]
        for kind in (kind for kind in (0, 1) if fp8[kind]):
            self.stored[kind], self.exponents[kind] = quantise(self.cache[kind])
            self.cache[kind] = dequantise(self.stored[kind], self.exponents[kind], dtype)
        self.page_table = self.page_table.to(device)
        self.seq_lens = torch.tensor(lengths, device=device)

    def queries(self, count):
        """[count, num_heads, D], large enough that the softmax is peaked."""
        return (torch.randn(count, self.num_heads, self.D, generator=self.generator) * 2).to(self.device, self.dtype)

    def context(self, row):
        """K and V of a sequence in fp64, [num_heads, length, D] each."""
        position = torch.arange(self.lengths[row], device=self.device)
        pages, offsets = self.page_table[row, position // self.page_size], position % self.page_size
        contexts = self.cache[:, pages, :, offsets].double().permute(1, 2, 0, 3)
        return contexts.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)

    def expected(self, q, row):
        """[T, num_heads, D] fp64: queries of one sequence, the last at its end."""
        if not self.lengths[row]:
            return q.double() * 0
        k, v = self.context(row)
        scores = torch.einsum("thd,hsd->hts", q.double(), k) / self.D**0.5
        first = self.lengths[row] - len(q)
        future = torch.arange(self.lengths[row]) > first + torch.arange(len(q))[:, None]
        scores = scores.masked_fill(future.to(self.device), -torch.inf)
        return torch.einsum("hts,hsd->thd", scores.softmax(-1), v)

    def decode(self, q, **settings):
        return paged_decode(
            q, *self.stored, self.page_table, self.seq_lens, exponents=tuple(self.exponents), **settings
        )

    def prefill(self, q, counts):
        """Of each sequence the last counts[row] tokens."""
        cu_seqlens = torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32).to(self.device)
        group = self.num_heads // self.num_kv_heads
        tiles = prefill_tiles(np.array(counts), np.array(self.lengths), group, self.dtype.itemsize)
        tiles = torch.from_numpy(tiles).to(self.device)
        return paged_prefill(q, *self.stored, self.page_table, cu_seqlens, self.seq_lens, tiles, tuple(self.exponents))


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


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


# Writing


def test_write_kv_writes_its_slots_and_nothing_else():
    cache = torch.zeros(2, 4, 2, 3, 5)
    k, v = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    write_kv(*cache, k, v, torch.tensor([11, 0, 4]))
    for written, new in zip(cache, (k, v), strict=True):
        assert torch.equal(written[3, :, 2], new[0])
        assert torch.equal(written[0, :, 0], new[1])
        assert torch.equal(written[1, :, 1], new[2])
    assert (cache != 0).sum() == 2 * 3 * 2 * 5


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1), (16, 8)])
def test_norm_rotation_and_write_in_one_equal_the_three(fresh_seed, norm, page_size, heads):
    T, D, num_pages = 9, 64, 33
    q, k, v = (torch.randn(T, count, D) for count in (heads[0], heads[1], heads[1]))
    q_weight, k_weight = (torch.randn(D), torch.randn(D)) if norm else (None, None)
    angle = torch.randn(T, D // 2)
    cos, sin = angle.cos(), angle.sin()
    slots = torch.randperm(num_pages * page_size)[:T]
    expected, written = (torch.full((2, num_pages, heads[1], page_size, D), torch.nan) for _ in range(2))
    if norm:
        wanted, rotated = qk_norm_rope(q, k, q_weight, k_weight, 0.1, cos, sin)
    else:
        wanted, rotated = rope(q, cos, sin), rope(k, cos, sin)
    write_kv(*expected, rotated, v, slots)
    out = norm_rope_write_kv(q, k, v, q_weight, k_weight, 0.1, cos, sin, *written, slots)
    torch.testing.assert_close(out, wanted, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(written, expected, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_q_k_and_v_may_be_columns_of_one_product(fresh_seed):
    T, D, (num_heads, num_kv_heads) = 9, 64, (6, 2)
    columns = torch.randn(T, (num_heads + 2 * num_kv_heads) * D).split([num_heads * D, *2 * [num_kv_heads * D]], -1)
    parts = [part.unflatten(-1, (-1, D)) for part in columns]
    angle, slots = torch.randn(T, D // 2), torch.randperm(3 * 16)[:T]
    rest = (torch.randn(D), torch.randn(D), 1e-6, angle.cos(), angle.sin())
    written, expected = (torch.zeros(2, 3, num_kv_heads, 16, D) for _ in range(2))
    out = norm_rope_write_kv(*parts, *rest, *written, slots)
    wanted = norm_rope_write_kv(*(part.contiguous() for part in parts), *rest, *expected, slots)
    assert torch.equal(out, wanted) and out.is_contiguous() and torch.equal(written, expected)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("fp8", [(True, True), (False, True)])
def test_a_cache_in_e4m3_gets_what_one_in_fp32_would_rounded_once(fresh_seed, norm, fp8):
    """To the bit in plain torch. The interpreter cuts numbers off where hardware rounds them, small ones to 0, and
    halves those that would round up to a power of two."""
    T, (num_heads, num_kv_heads), D, num_pages = 9, (6, 2), 64, 7
    q, k, v = (torch.randn(T, count, D) for count in (num_heads, num_kv_heads, num_kv_heads))
    k, v = k * torch.logspace(-3, 3, T)[:, None, None], v * torch.logspace(3, -3, T)[:, None, None]
    v[3, 1] = 0
    q_weight, k_weight = (torch.randn(D), torch.randn(D)) if norm else (None, None)
    angle = torch.randn(T, D // 2)
    rest = (q_weight, k_weight, 1e-6, angle.cos(), angle.sin())
    slots = torch.randperm(num_pages * 16)[:T]
    whole, written = (torch.zeros(2, num_pages, num_kv_heads, 16, D) for _ in range(2))
    wanted = norm_rope_write_kv(q, k, v, *rest, *whole, slots)
    stored, exponents = list(written), [None, None]
    for kind in (kind for kind in (0, 1) if fp8[kind]):
        stored[kind], exponents[kind] = quantise(written[kind])
    out = norm_rope_write_kv(q, k, v, *rest, *stored, slots, tuple(exponents))
    assert torch.equal(out, wanted)
    for kind in (0, 1):
        if not fp8[kind]:
            assert torch.equal(stored[kind], whole[kind])
            continue
        expected = quantise(whole[kind])
        touched = whole[kind].any(-1)
        assert torch.equal(exponents[kind][touched], expected[1][touched])
        found, best = dequantise(stored[kind], exponents[kind], torch.float32), dequantise(*expected, torch.float32)
        if not INTERPRETED:
            assert torch.equal(found, best)
        step = whole[kind].abs() / 8 + 2.0 ** (exponents[kind].float() - 127 - 6)[..., None]
        carried = (best.frexp().mantissa.abs() == 0.5) & (best.abs() > whole[kind].abs())
        assert (~touched[..., None] | carried | ((found - whole[kind]).abs() <= step)).all()


def test_what_is_broken_stays_broken_in_e4m3():
    x = torch.ones(3, 8)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    found = dequantise(*quantise(x), torch.float32)
    assert found[0].isnan().any() and found[1].isnan().any()
    assert torch.equal(found[2], x[2])


@given(st.integers(-140, 120), st.integers(0, 2**31))
def test_a_row_in_e4m3_is_within_a_sixteenth_of_each_number_whatever_its_size(power, seed):
    """Of the largest, where a number is 2^15 times smaller than that."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    values, exponents = quantise(x)
    found = dequantise(values, exponents, torch.float32)
    assert ((found - x).abs() <= x.abs() / 16 + x.abs().amax(-1, keepdim=True) * 2.0**-17 + 2.0**-134).all()
    assert torch.equal(dequantise(*quantise(found), torch.float32), found), "rounding again changes nothing"


def test_writing_shapes_that_do_not_fit_is_refused():
    q, k, cos = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8), torch.zeros(3, 4)
    cache, slots = torch.zeros(2, 5, 2, 4, 8), torch.arange(3)
    for arguments in (
        (q, k[:2], k, cos, slots), (q, k, k[:, :1], cos, slots), (q, k, k, cos[:, :2], slots), (q, k, k, cos, slots[:1])
    ):  # fmt: skip
        *tensors, cos_, slots_ = arguments
        with pytest.raises(ValueError, match="expected"):
            norm_rope_write_kv(*tensors, None, None, 1e-6, cos_, cos_, *cache, slots_)


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
def test_a_cache_in_e4m3_is_written_on_a_gpu_as_on_a_cpu(fresh_seed):
    T, (num_heads, num_kv_heads), D = 300, (28, 4), 128
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = make(T, num_heads, D), make(T, num_kv_heads, D), make(T, num_kv_heads, D)
    v *= torch.logspace(-3, 3, T, device="cuda", dtype=torch.bfloat16)[:, None, None]
    angle = torch.randn(T, D // 2, device="cuda")
    rest = (make(D), make(D), 1e-6, angle.cos(), angle.sin())
    slots = torch.randperm(40 * 64, device="cuda")[:T]
    (expected, wanted), (written, found) = (
        [list(part) for part in zip(*(quantise(make(40, num_kv_heads, 64, D) * 0) for _ in range(2)), strict=True)]
        for _ in range(2)
    )
    kv_write.reference(q, k, v, *rest, *expected, slots, tuple(wanted))
    norm_rope_write_kv(q, k, v, *rest, *written, slots, tuple(found))
    assert torch.equal(found[1], wanted[1]) and torch.equal(written[1].view(torch.uint8), expected[1].view(torch.uint8))
    keys, best = (dequantise(*pair, torch.float32) for pair in ((written[0], found[0]), (expected[0], wanted[0])))
    assert relative(keys, best.double()) < 0.03, "the reference rounds keys to bf16 first, and a sum differs"


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


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [True, False])
def test_norm_rotation_and_write_on_a_gpu_equal_the_three(fresh_seed, norm):
    T, (num_heads, num_kv_heads), D = 300, (28, 4), 128
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = make(T, num_heads, D), make(T, num_kv_heads, D), make(T, num_kv_heads, D)
    q_weight, k_weight = (make(D), make(D)) if norm else (None, None)
    angle = torch.randn(T, D // 2, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    slots = torch.randperm(40 * 64, device="cuda")[:T]
    expected, written = (make(2, 40, num_kv_heads, 64, D) * 0 for _ in range(2))
    wanted = kv_write.reference(q, k, v, q_weight, k_weight, 1e-6, cos, sin, *expected, slots)
    out = norm_rope_write_kv(q, k, v, q_weight, k_weight, 1e-6, cos, sin, *written, slots)
    assert relative(out, wanted.double()) < 5e-3
    assert relative(written[0], expected[0].double()) < 5e-3
    assert torch.equal(written[1], expected[1])
