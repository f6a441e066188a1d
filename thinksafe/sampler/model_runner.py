"""The model's side of a pass: the decoder, the page cache, and the state that stays on the device between passes.

The newest token of every response stays on the device, where the next decode pass reads it. The host sends only slots
and positions, so it can launch a pass before it has seen the tokens of the previous one. Sampling settings and page
tables are uploaded when a request is admitted or gets a page. On a GPU a decode pass is one copy to the device, one
CUDA graph and one copy back.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thinksafe.kernels.batch_invariant_linear import batch_invariant_linear
from thinksafe.kernels.chunked_loss import matmul_fp32
from thinksafe.kernels.cuda_library import load_library
from thinksafe.kernels.kv_write import norm_rope_write_kv
from thinksafe.kernels.linear_logprob import linear_logprob_of
from thinksafe.kernels.paged_decode import list_splits, paged_decode
from thinksafe.kernels.paged_prefill import paged_prefill, prefill_tiles
from thinksafe.kernels.sampling import sample
from thinksafe.model.attention import Rotation
from thinksafe.model.cuda_graphs import capture
from thinksafe.model.decoder import Decoder
from thinksafe.model.transfer import PendingOutput, upload
from thinksafe.sampler.kv_cache import CacheFormat, PageCache
from thinksafe.sampler.scheduler import ScheduledBatch, Scheduler


class DecodeAttention:
    """Attention of a decode pass, a function of the form `Attention` (model/attention.py): one new token per row writes
    its key and value to the cache and attends to the pages of its sequence."""

    def __init__(self, cache: PageCache, page_table: Tensor, positions: Tensor):
        """Compute what all layers share from the pages of each row's sequence, [B, W] int64, and the positions of the
        new tokens, [B] int64: where the tokens are written, and how the contexts are split."""
        page_size = cache.page_size
        pages = page_table.gather(1, (positions // page_size)[:, None])[:, 0]
        self.cache, self.page_table, self.seq_lens = cache, page_table, positions + 1
        self.cache_slots = pages * page_size + positions % page_size
        self.splits = list_splits(self.seq_lens, page_table.shape[1] * page_size)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        cache = self.cache.layer(layer)
        q = norm_rope_write_kv(q, k, v, *rotation, cache, self.cache_slots)
        return paged_decode(q, cache, self.page_table, self.seq_lens, self.splits)


class PrefillAttention:
    """Attention of a prefill pass, a function of the form `Attention` (model/attention.py): chunks of several
    sequences, packed end to end into T tokens, attend to the pages of their sequences.

    All tokens write to the cache before any token attends, so a chunk may read pages that another chunk fills in the
    same pass.

    Attributes:
        slots: [T] int64 on the host, slot of each token's sequence.
        host_positions, positions: [T] int64, position of each token in its sequence, on the host and on the device.
        last_rows: int64 on the device, index among the T tokens of the last token of every completing row.
    """

    def __init__(self, cache: PageCache, batch: ScheduledBatch, page_table: np.ndarray, group: int, itemsize: int):
        """Compute what all layers share. `page_table` [num_slots, W] holds the pages of each slot's sequence, `group`
        query heads share a key-value head, and an element of the queries has `itemsize` bytes."""
        device, page_size = cache.device, cache.page_size
        self.cache = cache
        counts = batch.ends - batch.starts
        cu_seqlens = np.concatenate(([0], np.cumsum(counts)))
        row = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(row)) - cu_seqlens[row] + batch.starts[row]
        self.slots, self.host_positions = batch.slots[row], positions
        pages = page_table[self.slots, positions // page_size]
        self.cache_slots = upload(pages * page_size + positions % page_size, device)
        self.positions = upload(positions, device)
        self.last_rows = upload((cu_seqlens[1:] - 1)[batch.needs_logits], device)
        width = -(-int(batch.ends.max()) // page_size)
        tiles = prefill_tiles(counts, batch.ends, group, itemsize)
        arrays = (page_table[batch.slots, :width], cu_seqlens.astype(np.int32), batch.ends, tiles)
        self.row_arrays = [upload(array, device) for array in arrays]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        cache = self.cache.layer(layer)
        q = norm_rope_write_kv(q, k, v, *rotation, cache, self.cache_slots)
        return paged_prefill(q, cache, *self.row_arrays)


class ModelRunner:
    """A decoder with a page cache, and the newest token and sampling settings of every slot. The engine runs its
    passes.

    Row `num_slots` of every table is for the padding rows of CUDA graphs: a slot that is never occupied, with a page
    that is never allocated.

    Attributes:
        cache: keys and values of all pages.
        linear: matmul of the layers, (x [T, K], weight [N, K], bias [N] or None) -> [T, N] in the dtype of x.
        logits: matmul of the language-model head, (hidden [T, H], head [V, H]) -> [T, V] fp32.
        logprobs_of: (hidden [T, H], head [V, H], token_ids [T, K]) -> [T, K] fp32, log-probabilities of these tokens.
    """

    def __init__(
        self, decoder: Decoder, scheduler: Scheduler, cache_format: CacheFormat, batch_invariant: bool = False
    ):
        """Allocate the cache and the state of all slots, for the slots and pages of the scheduler. `batch_invariant`
        selects matmuls in which the bits of a row do not depend on the other rows."""
        self.decoder, self.scheduler, self.device = decoder, scheduler, decoder.embedding.device
        self.linear = batch_invariant_linear if batch_invariant else F.linear
        # Logits are in fp32: rounding them to bf16 is an error of 0.03 and more, which changes 2% of sampled tokens.
        self.logits = partial(batch_invariant_linear, dtype=torch.float32) if batch_invariant else _logits
        self.logprobs_of = _logprobs_from_logits if batch_invariant else linear_logprob_of
        num_slots, num_pages = scheduler.table.num_slots, len(scheduler.pool.ref_count)
        self.cache = PageCache(decoder.config, cache_format, num_pages + 1, scheduler.page_size, self.device)
        self.padding_slot, self.padding_page = num_slots, num_pages
        width = scheduler.table.page_table.shape[1]
        self.page_table = torch.full((num_slots + 1, width), num_pages, device=self.device)
        self.last_token, self.seed, self.top_k = torch.zeros(3, num_slots + 1, dtype=torch.int64, device=self.device)
        self.temperature, self.top_p = torch.zeros(2, num_slots + 1, dtype=torch.float32, device=self.device)
        self._graphs: dict[int, _DecodeGraph] | None = None
        can_capture = self.device.type == "cuda" and load_library() is not None
        # Either all processes that share the model capture their communication, or none does.
        if decoder.shard.all_reduce_min(int(can_capture), self.device):
            self._graphs = {}
            self.graph_memory_pool = torch.cuda.graph_pool_handle()  # all graphs share it: no two run at a time

    @torch.inference_mode()
    def forward(self, batch: ScheduledBatch) -> PendingOutput:
        """Launch a pass that samples one token after every completing row (`ScheduledBatch.needs_logits`). The output
        is [N] int64 tokens and [N] fp32 log-probabilities; -1 and NaN for a row with a logit that is not finite."""
        if not batch.is_decode:
            self._upload_new_requests(batch)
            ends = upload(batch.ends[batch.needs_logits], self.device)
            slots = upload(batch.slots[batch.needs_logits], self.device)
            return PendingOutput(*self._sample(self._prefill(batch), slots, ends))
        num_rows = len(batch.slots)
        if self._graphs is None:
            return PendingOutput(*self.decode(upload(self.decode_inputs(batch, num_rows), self.device)))
        padded_rows = graph_batch_size(num_rows)
        if padded_rows not in self._graphs:
            self._graphs[padded_rows] = _DecodeGraph(self, padded_rows)
        tokens, logprobs = self._graphs[padded_rows](self.decode_inputs(batch, padded_rows))
        return PendingOutput(tokens[:num_rows], logprobs[:num_rows])

    @torch.inference_mode()
    def score(self, batch: ScheduledBatch, token_ids: Tensor) -> PendingOutput:
        """Launch a prefill pass that scores `token_ids`, [K] int64 on the device, after every completing row. The
        output is their log-probabilities, [N, K] fp32; NaN if the model's output is not finite."""
        self._upload_new_requests(batch)
        hidden = self._prefill(batch)
        # With many tokens one matmul for all logits is faster: dot products would read the head again for every row.
        logprobs_of = _logprobs_from_logits if 2 * len(token_ids) > len(self.decoder.head) else self.logprobs_of
        logprobs = logprobs_of(hidden, self.decoder.head, token_ids.expand(len(hidden), -1))
        return PendingOutput(self.decoder.shard.broadcast(logprobs))

    def padding_inputs(self, num_rows: int) -> np.ndarray:
        """Return the inputs of a decode pass of padding rows only, see `decode_inputs`."""
        inputs = np.zeros((5, num_rows), dtype=np.int64)
        inputs[[0, 2]], inputs[4] = self.padding_slot, self.padding_page
        return inputs

    def decode_inputs(self, batch: ScheduledBatch, num_rows: int) -> np.ndarray:
        """Return the inputs of a decode pass, [5, num_rows] int64, padded to `num_rows` rows.

        The lines are slot and position of every row, then slot, index and page of every new page-table entry, of which
        a decode pass has at most one per row.
        """
        inputs = self.padding_inputs(num_rows)
        inputs[0, : len(batch.slots)] = batch.slots
        inputs[1, : len(batch.slots)] = batch.starts
        inputs[2:, : len(batch.new_pages)] = batch.new_pages.T
        return inputs

    def decode(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Compute a decode pass from `decode_inputs` on the device. Return [num_rows] int64 sampled tokens and their
        [num_rows] fp32 log-probabilities, padding included; -1 and NaN if a logit is not finite.

        A CUDA graph can capture this method, because it does not access host memory.
        """
        slots, positions, *entry, page = inputs
        self.page_table[tuple(entry)] = page
        attention = DecodeAttention(self.cache, self.page_table[slots], positions)
        hidden = self.decoder(self.last_token[slots], positions, attention, self.linear)
        return self._sample(hidden, slots, positions + 1)

    def _prefill(self, batch: ScheduledBatch) -> Tensor:
        """Return the hidden state of the last token of every completing row, [batch.needs_logits.sum(), H]."""
        config, itemsize = self.decoder.config, self.decoder.embedding.element_size()
        group = config.num_heads // config.num_kv_heads
        attention = PrefillAttention(self.cache, batch, self.scheduler.table.page_table, group, itemsize)
        tokens = self.scheduler.table.tokens[attention.slots, attention.host_positions].astype(np.int64)
        hidden = self.decoder(upload(tokens, self.device), attention.positions, attention, self.linear)
        return hidden[attention.last_rows]

    def _sample(self, hidden: Tensor, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return a token for `positions` [N] and its log-probability for each row of hidden states [N, H], and keep the
        token as the newest of its slot."""
        logits = self.logits(hidden, self.decoder.head)
        settings = (column[slots] for column in (self.temperature, self.top_k, self.top_p, self.seed))
        tokens, logprobs = sample(logits, *settings, positions)
        tokens = self.decoder.shard.broadcast(tokens)
        self.last_token[slots] = tokens.clamp(min=0)  # a row with NaN has -1, an invalid index in the next pass
        return tokens, logprobs

    def _upload_new_requests(self, batch: ScheduledBatch) -> None:
        """Upload the sampling settings of newly admitted sequences, and new page-table entries."""
        slots = upload(batch.new_slots, self.device)
        for name in ("temperature", "top_k", "top_p", "seed"):
            getattr(self, name)[slots] = upload(getattr(self.scheduler.table, name)[batch.new_slots], self.device)
        slots, indices, pages = upload(batch.new_pages.T, self.device)
        self.page_table[slots, indices] = pages


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    return matmul_fp32(hidden, head.T)


def _logprobs_from_logits(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-probabilities [N, K] fp32 of `token_ids` [N, K] after hidden states [N, H]; NaN in rows that are
    not finite. It computes full rows of logits, whose bits do not depend on the other rows."""
    logprobs = batch_invariant_linear(hidden, head, dtype=torch.float32).log_softmax(-1).gather(-1, token_ids)
    return logprobs.masked_fill(~hidden.isfinite().all(-1, keepdim=True), torch.nan)


class _DecodeGraph:
    """A decode pass for a fixed number of rows, captured once. A call replays it with the inputs of `decode_inputs`,
    and overwrites the tensors that an earlier call returned.

    If several GPUs share the model, the graph contains their NCCL operations. NCCL requires that all processes capture
    an operation or none does, and that all replay their graphs in the same order. This holds because all processes
    schedule the same batches and run one graph at a time. The warm-up pass sets up what NCCL needs for this number of
    rows. NCCL ends a communicator only after all graphs that use it are gone; these graphs are freed with the last
    reference to the engine.
    """

    def __init__(self, runner: ModelRunner, num_rows: int):
        self.inputs = torch.from_numpy(runner.padding_inputs(num_rows)).to(runner.device)
        self.outputs, self.replay = capture(partial(runner.decode, self.inputs), runner.graph_memory_pool, warm_up=True)

    def __call__(self, inputs: np.ndarray) -> tuple[Tensor, Tensor]:
        self.inputs.copy_(torch.from_numpy(inputs).pin_memory(), non_blocking=True)
        self.replay()
        return self.outputs


def graph_batch_size(num_rows: int) -> int:
    """Return the number of rows of the CUDA graph that computes `num_rows` rows: the next power of two up to 32, above
    that the next multiple of 32."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 32 else -(-num_rows // 32) * 32
