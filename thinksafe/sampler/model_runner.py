"""The model's side of a pass: the page cache, and what the device must remember between passes.

The newest token of every response stays on the device, and a decode pass reads it there: the host only says which
slots and positions, so it need not have seen the tokens of the pass before. Settings and page tables are sent when a
request joins or gets a page. On a GPU a decode pass is one copy to the device, one CUDA graph and one copy back.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thinksafe.kernels.chunked_loss import matmul_fp32
from thinksafe.kernels.kv_write import norm_rope_write_kv
from thinksafe.kernels.linear_logprob import linear_logprob_of
from thinksafe.kernels.native import library
from thinksafe.kernels.paged_decode import decode_work, paged_decode
from thinksafe.kernels.paged_prefill import paged_prefill, prefill_tiles
from thinksafe.kernels.row_linear import row_linear
from thinksafe.kernels.sampling import sample
from thinksafe.model.attention import Rotation
from thinksafe.model.decoder import Decoder
from thinksafe.sampler.kv_cache import CacheFormat, PageCache
from thinksafe.sampler.scheduler import Scheduler, StepPlan


class DecodeAttention:
    """One new token a row against the row's pages, as the decoder calls it."""

    def __init__(self, cache: PageCache, page_table: Tensor, positions: Tensor):
        """page_table: [B, W] int64; positions: [B] int64, of the new tokens."""
        page_size = cache.page_size
        pages = page_table.gather(1, (positions // page_size)[:, None])[:, 0]
        self.cache, self.page_table, self.seq_lens = cache, page_table, positions + 1
        self.cache_slots = pages * page_size + positions % page_size
        self.work = decode_work(self.seq_lens, page_table.shape[1] * page_size)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        keys, values, exponents = self.cache.layer(layer)
        q = norm_rope_write_kv(q, k, v, *rotation, keys, values, self.cache_slots, exponents)
        return paged_decode(q, keys, values, self.page_table, self.seq_lens, self.work, exponents)


class PrefillAttention:
    """Stretches of several sequences, end to end, each against its own pages. All rows write before any row attends,
    so a row may read pages that another one fills in the same pass."""

    def __init__(self, cache: PageCache, plan: StepPlan, page_table: np.ndarray, group: int, itemsize: int):
        """group: query heads a key-value head; itemsize: bytes an element of the queries."""
        device, page_size = cache.device, cache.page_size
        self.cache = cache
        counts = plan.ends - plan.starts
        cu_seqlens = np.concatenate(([0], np.cumsum(counts)))
        row = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(row)) - cu_seqlens[row] + plan.starts[row]
        self.slots, self.host_positions = plan.slots[row], positions
        pages = page_table[self.slots, positions // page_size]
        self.cache_slots = upload(pages * page_size + positions % page_size, device)
        self.positions = upload(positions, device)
        self.last_rows = upload((cu_seqlens[1:] - 1)[plan.completes], device)
        width = -(-int(plan.ends.max()) // page_size)
        tiles = prefill_tiles(counts, plan.ends, group, itemsize)
        arrays = (page_table[plan.slots, :width], cu_seqlens.astype(np.int32), plan.ends, tiles)
        self.rows = [upload(array, device) for array in arrays]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        keys, values, exponents = self.cache.layer(layer)
        q = norm_rope_write_kv(q, k, v, *rotation, keys, values, self.cache_slots, exponents)
        return paged_prefill(q, keys, values, *self.rows, exponents)


class Results:
    """Tensors on their way to the host."""

    def __init__(self, *tensors: Tensor):
        self._done = None
        self._tensors = tensors
        if tensors[0].is_cuda:
            self._tensors = [torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors]
            for host, tensor in zip(self._tensors, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def fetch(self) -> list[np.ndarray]:
        """The values, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


class Runner:
    """A decoder with a page cache and the newest token and settings of every slot.

    Row `num_slots` of every table is the padding of CUDA graphs: a slot that is never occupied, on a page that is never
    given out.

    Attributes:
        cache: keys and values.
    """

    def __init__(
        self, decoder: Decoder, scheduler: Scheduler, cache_format: CacheFormat, batch_invariant: bool = False
    ):
        """batch_invariant: compute products so that a row's bits do not depend on the other rows."""
        self.decoder, self.scheduler, self.device = decoder, scheduler, decoder.embedding.device
        self.linear = row_linear if batch_invariant else F.linear
        # In fp32: rounded to bf16, logits are off by 0.03 and more, which changes two draws in a hundred.
        self.logits = partial(row_linear, dtype=torch.float32) if batch_invariant else _logits
        self.logprobs_of = _logprobs_of_all if batch_invariant else linear_logprob_of
        num_slots, num_pages = len(scheduler.epoch), len(scheduler.pool.owners)
        self.cache = PageCache(decoder.config, cache_format, num_pages + 1, scheduler.page_size, self.device)
        self.spare_slot, self.spare_page = num_slots, num_pages

        def column(dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_slots + 1, dtype=dtype, device=self.device)

        width = scheduler.page_table.shape[1]
        self.page_table = torch.full((num_slots + 1, width), num_pages, device=self.device)
        self.last_token, self.seed, self.top_k = (column(torch.int64) for _ in range(3))
        self.temperature, self.top_p = (column(torch.float32) for _ in range(2))
        self._graphs: dict[int, _DecodeGraph] | None = None
        can_record = self.device.type == "cuda" and library() is not None
        # All processes of a model record what they send one another, or none does.
        if decoder.shard.least(int(can_record), self.device):
            self._graphs = {}
            self.graph_memory = torch.cuda.graph_pool_handle()  # one for all: no two graphs run at a time

    @torch.inference_mode()
    def draw(self, plan: StepPlan) -> Results:
        """Compute a pass and draw a token behind every completing row: [N] int64 tokens, [N] fp32 log-probabilities."""
        if not plan.is_decode:
            self._join(plan)
            ends = upload(plan.ends[plan.completes], self.device)
            return Results(*self._draw(self._read(plan), upload(plan.slots[plan.completes], self.device), ends))
        num_rows = len(plan.slots)
        if self._graphs is None:
            return Results(*self.decode(upload(self.decode_inputs(plan, num_rows), self.device)))
        padded = bucket(num_rows)
        if padded not in self._graphs:
            self._graphs[padded] = _DecodeGraph(self, padded)
        tokens, logprobs = self._graphs[padded](self.decode_inputs(plan, padded))
        return Results(tokens[:num_rows], logprobs[:num_rows])

    @torch.inference_mode()
    def score(self, plan: StepPlan, token_ids: Tensor) -> Results:
        """Compute a pass over prompts: [N, K] fp32, log-probabilities of `token_ids` behind every completing row."""
        self._join(plan)
        hidden = self._read(plan)
        # Of many tokens, whole rows of logits are one product, where dot products read the head again for every row.
        logprobs_of = _logprobs_of_all if 2 * len(token_ids) > len(self.decoder.head) else self.logprobs_of
        logprobs = logprobs_of(hidden, self.decoder.head, token_ids.expand(len(hidden), -1))
        return Results(self.decoder.shard.agree(logprobs))

    def decode_inputs(self, plan: StepPlan, num_rows: int) -> np.ndarray:
        """[5, num_rows] int64: slot and position of every row, and slot, index and page of every new page-table entry,
        of which a decode pass has at most one a row. What is left over names the spare slot and page."""
        inputs = np.zeros((5, num_rows), dtype=np.int64)
        inputs[[0, 2]], inputs[4] = self.spare_slot, self.spare_page
        inputs[0, : len(plan.slots)] = plan.slots
        inputs[1, : len(plan.slots)] = plan.starts
        inputs[2:, : len(plan.new_pages)] = plan.new_pages.T
        return inputs

    def decode(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """One token for every row of `decode_inputs`. Reads and writes nothing on the host, so a graph can hold it."""
        slots, positions, *entry, page = inputs
        self.page_table[tuple(entry)] = page
        attention = DecodeAttention(self.cache, self.page_table[slots], positions)
        hidden = self.decoder(self.last_token[slots], positions, attention, self.linear)
        return self._draw(hidden, slots, positions + 1)

    def _read(self, plan: StepPlan) -> Tensor:
        """Hidden state of the last token of every completing row, [plan.completes.sum(), H]."""
        config, itemsize = self.decoder.config, self.decoder.embedding.element_size()
        group = config.num_heads // config.num_kv_heads
        attention = PrefillAttention(self.cache, plan, self.scheduler.page_table, group, itemsize)
        tokens = self.scheduler.tokens[attention.slots, attention.host_positions].astype(np.int64)
        hidden = self.decoder(upload(tokens, self.device), attention.positions, attention, self.linear)
        return hidden[attention.last_rows]

    def _draw(self, hidden: Tensor, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(hidden, self.decoder.head)
        settings = (column[slots] for column in (self.temperature, self.top_k, self.top_p, self.seed))
        tokens, logprobs = sample(logits, *settings, positions)
        tokens = self.decoder.shard.agree(tokens)
        self.last_token[slots] = tokens.clamp(min=0)  # -1, of a broken row, would be no index in a pass run ahead
        return tokens, logprobs

    def _join(self, plan: StepPlan) -> None:
        """Send what the device must know of new occupants and their pages."""
        slots = upload(plan.joined, self.device)
        for name in ("temperature", "top_k", "top_p", "seed"):
            getattr(self, name)[slots] = upload(getattr(self.scheduler, name)[plan.joined], self.device)
        slots, indices, pages = upload(plan.new_pages.T, self.device)
        self.page_table[slots, indices] = pages


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    return matmul_fp32(hidden, head.T)


def _logprobs_of_all(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    """`linear_logprob_of` from whole rows of logits, whose bits depend on no other row."""
    logprobs = row_linear(hidden, head, dtype=torch.float32).log_softmax(-1).gather(-1, token_ids)
    return logprobs.masked_fill(~hidden.isfinite().all(-1, keepdim=True), torch.nan)


class _DecodeGraph:
    """A decode pass for a fixed number of rows, recorded once and replayed.

    Where several GPUs hold the model, their NCCL operations are a part of it. NCCL wants each operation recorded by all
    processes or by none, and graphs replayed in one order: all processes plan alike, so theirs are the same, one at a
    time. The communicator is older than any graph, and the pass before the recording sets up what this number of rows
    needs of it. torch launches the operations on the stream that is recorded, and nothing waits on the host. NCCL ends
    a communicator only when all graphs that use it are gone: these go with the engine, at its last reference.
    """

    def __init__(self, runner: Runner, num_rows: int):
        nobody = np.zeros((5, num_rows), dtype=np.int64)
        nobody[[0, 2]], nobody[4] = runner.spare_slot, runner.spare_page
        self.inputs = torch.from_numpy(nobody).to(runner.device)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles kernels and makes tables, which cannot be recorded
            runner.decode(self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads go on: torch's watches over what NCCL has been given before.
        with torch.cuda.graph(self.graph, pool=runner.graph_memory, capture_error_mode="thread_local"):
            self.outputs = runner.decode(self.inputs)

    def __call__(self, inputs: np.ndarray) -> tuple[Tensor, Tensor]:
        self.inputs.copy_(torch.from_numpy(inputs).pin_memory(), non_blocking=True)
        self.graph.replay()
        return self.outputs


def bucket(num_rows: int) -> int:
    """Rows of the graph that serves so many: powers of two up to 32, then multiples of 32."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 32 else -(-num_rows // 32) * 32


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """To the device, without waiting for it: torch would take a view with gaps there through memory that is not
    pinned."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
