"""The scheduler: which tokens the next pass computes. It knows no model, only token counts and page numbers.

A batch either reads prompts, packed up to a budget of tokens, or extends every running response by one token.
`schedule` assumes that all earlier batches have finished, so the next one can be scheduled while the GPU is busy.
Sequence lengths are known in advance; only the sampled ids are not, and scheduling does not need them. `commit`
receives the ids in order, some batches later. Until then a response that has ended may be computed one token too far.
When that token is committed, the slot has another epoch, so the token is dropped.

The scheduler holds the policy; sequence_table.py holds the state of the running sequences, page_pool.py the pages.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from thinksafe.sampler.page_pool import PagePool, prefix_digests
from thinksafe.sampler.repetition import CHECK_INTERVAL, ends_in_repetition
from thinksafe.sampler.request import Completion, FinishReason, Request
from thinksafe.sampler.sequence_table import SequenceState, SequenceTable

_GROWTH_TOKENS = 256
"""Number of tokens kept free for each running sequence when another one is admitted. Keeping none free recomputes 40%
of all tokens after preemptions; keeping max_tokens free makes smaller batches."""
_ADMISSION_BATCH = 16
"""Number of requests that are admitted together while responses run, or fewer if fewer wait or there are fewer than 64
slots. A pass for a single prompt would read all weights and delay every running response."""


@dataclass(frozen=True)
class ScheduledBatch:
    """One forward pass.

    Attributes:
        is_decode: whether every row is the newest token of a response, whose id may be known on the device only;
            otherwise rows are ranges of known tokens.
        slots, starts, ends: [R] int64; row r computes tokens starts[r] to ends[r] - 1 of the sequence in slots[r].
        needs_logits: [R] bool, whether the row is completing: its last token needs logits, to sample the next token.
        epochs: [R] int64, epoch of the row's slot: the number of sequences that have left the slot before this one.
        new_slots: [J] int64, slots with a new sequence since the last batch.
        new_pages: [N, 3] int64, page-table entries added since the last batch: slot, index of the page in its sequence,
            number of the page.
    """

    is_decode: bool
    slots: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    needs_logits: np.ndarray
    epochs: np.ndarray
    new_slots: np.ndarray
    new_pages: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the pass computes."""
        return int((self.ends - self.starts).sum())


class Scheduler:
    """The policy: which requests run, and which tokens each pass computes. The engine calls `submit`, `schedule` and
    `commit` in turn.

    Attributes:
        table: the running sequences.
        pool: the pages of the cache.
        waiting: sequences that wait for a slot, the next one first.
        max_seq_len: largest number of tokens of a sequence: the model's, or fewer if all pages hold fewer.
        num_in_flight: number of batches that are scheduled and not yet committed.
        computed_tokens, shared_tokens: total number of tokens that batches computed, and that admitted sequences found
            in the cache.
        preemptions: number of times that a response was preempted because the pages ran out.
    """

    def __init__(
        self,
        num_slots: int,
        num_pages: int,
        page_size: int,
        max_seq_len: int,
        max_prefill_tokens: int,
        *,
        replay: bool = False,
    ):
        """Create a scheduler whose slots and pages are all free.

        Args:
            num_slots: largest number of sequences that run at once.
            page_size: tokens per page.
            max_seq_len: largest number of tokens that the model can read.
            max_prefill_tokens: largest number of tokens in a prefill batch.
            replay: sample a preempted response again from its first token, token by token. Otherwise its tokens are
                prefilled with the prompt, which gives its cache other rounding errors.
        """
        self.page_size, self.max_prefill_tokens, self.replay = page_size, max_prefill_tokens, replay
        self.pool = PagePool(num_pages)
        self.max_seq_len = min(max_seq_len, num_pages * page_size)
        self.table = SequenceTable(num_slots, self.max_seq_len, page_size)
        self.waiting: deque[SequenceState] = deque()
        self.num_in_flight = self.computed_tokens = self.shared_tokens = self.preemptions = 0
        self._prefilling: list[int] = []  # slots whose prefill is not fully scheduled

    def submit(self, requests: Iterable[Request]) -> None:
        """Append these requests to the queue: all of them or, if one is invalid, none.

        Raises:
            ValueError: the prompt is empty or leaves no room for a response token, or the seed is out of range.
        """
        self.waiting.extend([self._make_sequence(request) for request in requests])

    def abort_all(self) -> None:
        """Drop every request and every batch in flight, without completions. The prompt pages of running requests are
        no longer shared, because the pass that fills a page may never have been launched."""
        for slot in list(self.table.running):
            for page in self.table.pages(slot):
                self.pool.unregister(page)
            self._release(slot)
        self.waiting.clear()
        self._prefilling.clear()
        self.table.take_updates()
        self.num_in_flight = 0

    @property
    def has_work(self) -> bool:
        """Whether a request is running or waiting."""
        return bool(self.table.running or self.waiting)

    def schedule(self) -> ScheduledBatch | None:
        """Return the next batch, with its pages allocated; None if the oldest batch in flight must be committed first,
        or if no request is left."""
        if self._prefilling or self._should_admit():
            return self._schedule_prefill()
        return self._schedule_decode()

    def commit(self, batch: ScheduledBatch, sampled: np.ndarray, logprobs: np.ndarray) -> list[Completion]:
        """Store the results of the oldest batch in flight, and return the completions of the finished sequences, whose
        slots and pages are free again.

        A sequence with a logit that is not finite is first recomputed once on pages that it does not share, if it could
        have shared some; otherwise it is finished with the reason `nan`.

        Args:
            sampled, logprobs: [batch.needs_logits.sum()] int64 and fp32, a token for every completing row, -1 if a
                logit is not finite, and its log-probability.
        """
        table = self.table
        rows, slots, ends = self._live_rows(batch)
        sampled = sampled[rows]
        table.tokens[slots, ends] = sampled
        table.logprobs[slots, ends] = logprobs[rows]
        stopped = (table.stop_ids[slots] == sampled[:, None]).any(-1)
        is_done = stopped | (sampled < 0) | (ends + 1 >= table.max_len[slots])
        response_lengths = ends + 1 - table.num_prompt_tokens[slots]
        check_repetition = table.stop_on_repetition[slots] & (response_lengths % CHECK_INTERVAL == 0)
        completions = []
        for row in np.flatnonzero(is_done | check_repetition).tolist():
            slot, end = int(slots[row]), int(ends[row])
            if sampled[row] < 0:
                if not self._recompute_unshared(slot, end):
                    completions.append(self._finish(slot, end, "nan"))
            elif stopped[row]:
                completions.append(self._finish(slot, end, "stop"))
            elif check_repetition[row] and ends_in_repetition(
                table.tokens[slot, table.num_prompt_tokens[slot] : end + 1]
            ):
                completions.append(self._finish(slot, end + 1, "repetition"))
            elif is_done[row]:
                completions.append(self._finish(slot, end + 1, "length"))
        return completions

    def commit_scored(self, batch: ScheduledBatch, has_nan: np.ndarray) -> list[tuple[int, Request]]:
        """Commit the oldest batch in flight when prompts are only scored. Return (index among the completing rows,
        request) of each finished request.

        Every completing row is finished, except that a row with NaN is first recomputed once on pages that it does not
        share, if it could have shared some.

        Args:
            has_nan: [batch.needs_logits.sum()] bool, whether a score of the completing row is NaN.
        """
        finished = []
        for row, slot, end in zip(*(array.tolist() for array in self._live_rows(batch)), strict=True):
            if not (has_nan[row] and self._recompute_unshared(slot, end)):
                finished.append((row, self._release(slot).request))
        return finished

    def _make_sequence(self, request: Request) -> SequenceState:
        """Return the sequence of a new request; raise a ValueError if it can never run, see `submit`."""
        length = len(request.prompt)
        if length == 0:
            raise ValueError(f"request {request.id}: the prompt is empty")
        if length >= self.max_seq_len:
            raise ValueError(
                f"request {request.id}: the prompt has {length} tokens, "
                f"but prompt and response together can have at most {self.max_seq_len}"
            )
        if not 0 <= request.seed < 1 << 63:
            raise ValueError(f"request {request.id}: the seed must be in [0, 2^63), found {request.seed}")
        digests = prefix_digests(request.prompt[:-1], self.page_size)  # the last one is always computed, for its logits
        return SequenceState(request, list(request.prompt), digests=digests)

    def _should_admit(self) -> bool:
        """Return whether to admit requests now: none is running, or slots and pages suffice for `_ADMISSION_BATCH` of
        them (or for all that wait)."""
        if not self.waiting or not self.table.num_free_slots:
            return False
        if not self.table.running:
            return True  # `submit` made sure that a request fits if no other runs
        num_candidates = min(_ADMISSION_BATCH, len(self.waiting), -(-self.table.num_slots // 4))
        if self.table.num_free_slots < num_candidates:
            return False
        candidates = islice(self.waiting, num_candidates)
        return self.pool.num_available >= self._reserved_pages() + sum(map(self._pages_needed, candidates))

    def _pages_needed(self, candidate: SequenceState) -> int:
        """Return the number of pages that a waiting sequence needs for its tokens and for up to `_GROWTH_TOKENS` more,
        without pages that it would share with a running sequence."""
        shared_pages = self.pool.match_prefix(candidate.digests)
        num_owned = int((self.pool.ref_count[shared_pages] > 0).sum()) if shared_pages else 0
        length = len(candidate.tokens) + min(candidate.request.sampling.max_tokens, _GROWTH_TOKENS)
        return -(-min(length, self.max_seq_len) // self.page_size) - num_owned

    def _reserved_pages(self) -> int:
        """Return the number of pages that all running sequences need, in addition to the pages that they have, to grow
        by up to `_GROWTH_TOKENS` tokens each."""
        table, occupied = self.table, self.table.max_len > 0
        length = np.maximum(table.num_prefill_tokens, table.num_computed_tokens + 1)[occupied]
        future_length = np.minimum(table.max_len[occupied], length + _GROWTH_TOKENS)
        return int((-(-future_length // self.page_size) - table.num_pages[occupied]).clip(min=0).sum())

    def _schedule_prefill(self) -> ScheduledBatch:
        """Return a batch of prompt tokens up to the budget: first of prompts begun earlier, then of newly admitted
        requests."""
        table, budget, rows = self.table, self.max_prefill_tokens, []
        slots = deque(self._prefilling)
        while budget:
            if not slots:
                if not (self.waiting and table.num_free_slots):
                    break
                num_needed = self._reserved_pages() + self._pages_needed(self.waiting[0])
                if table.running and self.pool.num_available < num_needed:
                    break
                slots.append(self._admit(self.waiting.popleft()))
            slot = slots.popleft()
            start = int(table.num_computed_tokens[slot])
            end = min(int(table.num_prefill_tokens[slot]), start + budget)
            self._register_prefix_pages(slot, start, end)
            table.num_computed_tokens[slot] = end
            if end == table.num_prefill_tokens[slot]:
                self._prefilling.remove(slot)
            rows.append((slot, start, end))
            budget -= end - start
        slots, starts, ends = np.array(rows, dtype=np.int64).T
        return self._make_batch(False, slots, starts, ends, ends == table.num_prefill_tokens[slots])

    def _schedule_decode(self) -> ScheduledBatch | None:
        """Return a batch of one token for every response that has not reached its largest length; if the pages run out,
        preempt the youngest sequences. Return None if that must wait for a commit, or if no response can be
        extended."""
        table = self.table
        while True:
            is_prefilled = table.num_computed_tokens >= table.num_prefill_tokens
            slots = np.flatnonzero(is_prefilled & (table.num_computed_tokens + 1 < table.max_len))
            starts = table.num_computed_tokens[slots]
            slots_to_grow = slots[starts == table.num_pages[slots] * self.page_size]
            if len(slots_to_grow) <= self.pool.num_available:
                break
            if self.num_in_flight:
                return None  # only a sequence whose tokens are all committed can be preempted
            youngest = next(reversed(table.running))
            self._preempt(youngest, int(table.num_computed_tokens[youngest]) + 1)
            self.preemptions += 1
        if not len(slots):
            return None
        for slot in slots_to_grow.tolist():
            table.add_page(slot, self.pool.allocate())
        table.num_computed_tokens[slots] += 1
        return self._make_batch(True, slots, starts, starts + 1, np.ones(len(slots), dtype=bool))

    def _make_batch(self, is_decode: bool, slots, starts, ends, needs_logits) -> ScheduledBatch:
        """Return a batch with all slots and page-table entries that are new since the last one, and count it."""
        self.num_in_flight += 1
        self.computed_tokens += int((ends - starts).sum())
        epochs, updates = self.table.epoch[slots], self.table.take_updates()
        return ScheduledBatch(is_decode, slots, starts, ends, needs_logits, epochs, *updates)

    def _live_rows(self, batch: ScheduledBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count the batch as committed. Return index among the completing rows, slot and end (position of the sampled
        token) of each completing row whose sequence still runs, [N] int64 each."""
        self.num_in_flight -= 1
        slots = batch.slots[batch.needs_logits]
        rows = np.flatnonzero(self.table.epoch[slots] == batch.epochs[batch.needs_logits])
        return rows, slots[rows], batch.ends[batch.needs_logits][rows]

    def _finish(self, slot: int, end: int, reason: FinishReason) -> Completion:
        """Free the slot and return the completion with the response tokens before position `end`."""
        tokens, logprobs = self.table.response(slot, end)
        request = self._release(slot).request
        return Completion(request.id, tuple(tokens), reason, tuple(logprobs))

    def _admit(self, sequence: SequenceState) -> int:
        """Put a sequence into a free slot, with shared pages for its prefix and new pages for its other tokens, and
        return the slot."""
        slot = self.table.occupy(sequence)
        shared_pages = self.pool.match_prefix(sequence.digests)
        for page in shared_pages:
            self.pool.acquire(page)
            self.table.add_page(slot, page)
        for _ in range(len(shared_pages), -(-len(sequence.tokens) // self.page_size)):
            self.table.add_page(slot, self.pool.allocate())
        self.table.num_computed_tokens[slot] = len(shared_pages) * self.page_size
        self.shared_tokens += len(shared_pages) * self.page_size
        self._prefilling.append(slot)
        return slot

    def _register_prefix_pages(self, slot: int, start: int, end: int) -> None:
        """Register the prompt pages that this batch fills with tokens `start` to `end` - 1, so that other prompts share
        them. A row admitted into the same batch may already read them: in every layer, all rows write before any row
        attends."""
        digests = self.table.running[slot].digests
        for index in range(start // self.page_size, min(end // self.page_size, len(digests))):
            self.pool.register(int(self.table.page_table[slot, index]), digests[index])

    def _recompute_unshared(self, slot: int, end: int) -> bool:
        """Requeue a sequence with `end` committed tokens, whose logits are not finite, to recompute it once on pages
        that it does not share; return False if it has no pages to share or was recomputed before.

        Another sequence may have written NaN to the shared pages, because attention spreads a NaN to all tokens of a
        chunk.
        """
        sequence = self.table.running[slot]
        if not sequence.digests:
            return False
        for page in self.table.pages(slot):
            self.pool.unregister(page)
        sequence.digests = []
        self._preempt(slot, end)
        return True

    def _preempt(self, slot: int, length: int) -> None:
        """Free the slot, release its pages, and move its sequence to the front of the queue. The sequence keeps its
        first `length` tokens, prompt included; `commit` must have received the response's ids among them. In `replay`
        mode it keeps only its prompt."""
        prompt = self.table.running[slot].request.prompt
        tokens, logprobs = self.table.response(slot, len(prompt) if self.replay else length)
        sequence = self._release(slot)
        sequence.tokens, sequence.logprobs = [*prompt, *tokens], logprobs
        self.waiting.appendleft(sequence)

    def _release(self, slot: int) -> SequenceState:
        """Free the slot, remove its sequence as an owner of its pages, and return the sequence."""
        for page in self.table.pages(slot):
            self.pool.release(page)
        return self.table.vacate(slot)
