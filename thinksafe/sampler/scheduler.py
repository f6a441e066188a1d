"""Who computes what in the next step. No torch, no model: token counts and page numbers only.

Every running sequence has tokens (`num_tokens`) of which some are in the cache (`num_computed`). A step computes the
rest: one token where a sequence decodes, a chunk where its prompt is still being read, so requests join and leave at
every step and recomputing a preempted one is nothing special. State lies in arrays by slot, so that planning 500
sequences costs a handful of numpy calls.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from thinksafe.sampler.pages import PagePool, prefix_digests
from thinksafe.sampler.request import Completion, FinishReason, Request

_GROWTH_TOKENS = 256
"""Room kept free per running sequence when another is admitted: fewer preemptions than admitting on the prompt
alone, which recomputes 40% of all tokens, and fuller batches than reserving max_tokens."""


@dataclass(frozen=True)
class StepPlan:
    """Tokens to compute: rows in order, the rows with a single token first.

    Attributes:
        slots, starts, ends: [R]; row r computes tokens starts[r] to ends[r] of the sequence in slots[r].
        completes: [R] bool; the row reaches its sequence's last token, so its logits are wanted.
    """

    slots: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    completes: np.ndarray

    @property
    def num_tokens(self) -> int:
        return int((self.ends - self.starts).sum())

    @property
    def num_decodes(self) -> int:
        """Leading rows with exactly one token."""
        return int((self.ends - self.starts == 1).sum())


@dataclass
class _Waiting:
    request: Request
    tokens: list[int]
    digests: list[bytes] = field(default_factory=list)


class Scheduler:
    """Slots, pages and the queue.

    Attributes:
        tokens: [num_slots, max_seq_len] int32, prompt and response of each running sequence.
        num_tokens, num_computed: [num_slots] int64.
        page_table: [num_slots, max pages a sequence] int64.
    """

    def __init__(self, num_slots: int, num_pages: int, page_size: int, max_seq_len: int, max_step_tokens: int):
        self.page_size = page_size
        self.max_seq_len = max_seq_len
        self.max_step_tokens = max_step_tokens
        self.pool = PagePool(num_pages)
        self.capacity_tokens = num_pages * page_size
        self.tokens = np.zeros((num_slots, max_seq_len), dtype=np.int32)
        self.num_tokens = np.zeros(num_slots, dtype=np.int64)
        self.num_computed = np.zeros(num_slots, dtype=np.int64)
        self.num_pages = np.zeros(num_slots, dtype=np.int64)
        self.limit = np.zeros(num_slots, dtype=np.int64)
        self.page_table = np.zeros((num_slots, -(-max_seq_len // page_size)), dtype=np.int64)
        self.seed = np.zeros(num_slots, dtype=np.int64)
        self.temperature = np.zeros(num_slots, dtype=np.float32)
        self.top_k = np.zeros(num_slots, dtype=np.int64)
        self.top_p = np.ones(num_slots, dtype=np.float32)
        self.running: dict[int, _Waiting] = {}  # slot -> sequence, in order of admission
        self.waiting: deque[_Waiting] = deque()
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self.computed_tokens = 0
        self.preemptions = 0

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests: all of them, or none.

        Raises:
            ValueError: one can never run: an empty prompt, or one that leaves no room for a single response token.
        """
        self.waiting.extend([self._sequence(request) for request in requests])

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def plan(self) -> StepPlan:
        """Decide the next step and give its rows the pages they write to. Older sequences go first."""
        budget = self.max_step_tokens
        running = np.fromiter(self.running, dtype=np.int64, count=len(self.running))
        next_token = self.num_computed[running]
        has_page = next_token < self.num_pages[running] * self.page_size
        simple = (self.num_tokens[running] - next_token == 1) & has_page
        decodes = running[simple][:budget]
        budget -= len(decodes)
        rows: list[tuple[int, int, int]] = []
        for slot in running[~simple].tolist():
            if slot in self.running and budget > 0:
                budget -= self._schedule(slot, budget, rows)
        # Before anyone is admitted, perhaps to the slot of a sequence that was just preempted.
        still_running = np.fromiter((slot in self.running for slot in decodes.tolist()), dtype=bool, count=len(decodes))
        decodes = decodes[still_running]
        while self.waiting and self._free_slots and budget > 0 and self._admits(self.waiting[0]):
            budget -= self._schedule(self._admit(self.waiting.popleft()), budget, rows)
        rows.sort(key=lambda row: row[2] - row[1] > 1)
        others = np.array(rows, dtype=np.int64).reshape(-1, 3)
        slots = np.concatenate((decodes, others[:, 0]))
        starts = np.concatenate((self.num_computed[decodes], others[:, 1]))
        ends = np.concatenate((self.num_computed[decodes] + 1, others[:, 2]))
        return StepPlan(slots, starts, ends, ends == self.num_tokens[slots])

    def commit(self, plan: StepPlan, sampled: np.ndarray) -> list[Completion]:
        """Take in a step's results.

        Args:
            sampled: [plan.completes.sum()] int64, a token for every completing row; -1 where the logits broke.

        Returns:
            The sequences that are finished, their slots and pages freed.
        """
        self._mark_computed(plan)
        slots = plan.slots[plan.completes]
        lengths = self.num_tokens[slots]
        self.tokens[slots, lengths] = sampled
        self.num_tokens[slots] = lengths + (sampled >= 0)
        return [
            self._finish(slot, reason)
            for slot, token in zip(slots.tolist(), sampled.tolist(), strict=True)
            if not (token < 0 and self._retry_alone(slot)) and (reason := self._finish_reason(slot, token))
        ]

    def commit_scored(self, plan: StepPlan, broken: np.ndarray) -> list[tuple[int, Request]]:
        """Like `commit` where only the prompt's last logits are wanted, so that every completing row is finished.

        Args:
            broken: [plan.completes.sum()] bool.

        Returns:
            The finished requests, each with its index among the completing rows.
        """
        self._mark_computed(plan)
        slots = plan.slots[plan.completes]
        finished = []
        for index, slot in enumerate(slots.tolist()):
            if not (broken[index] and self._retry_alone(slot)):
                finished.append((index, self.running[slot].request))
                self._free(slot)
        return finished

    def _sequence(self, request: Request) -> _Waiting:
        length = len(request.prompt)
        if length == 0:
            raise ValueError("the prompt is empty")
        room = min(self.max_seq_len, self.capacity_tokens)
        if length >= room:
            raise ValueError(f"the prompt has {length} tokens, the context holds {room} with the response")
        digests = prefix_digests(request.prompt[:-1], self.page_size)  # the last token is always computed: its logits
        return _Waiting(request, list(request.prompt), digests)

    def _mark_computed(self, plan: StepPlan) -> None:
        self.num_computed[plan.slots] = plan.ends
        self.computed_tokens += plan.num_tokens

    def _schedule(self, slot: int, budget: int, rows: list[tuple[int, int, int]]) -> int:
        """Add a row for up to `budget` pending tokens of a sequence; the number of them, 0 if it had to make room."""
        start = int(self.num_computed[slot])
        end = min(int(self.num_tokens[slot]), start + budget)
        if not self._grow(slot, end):
            return 0
        self._register(slot, start, end)
        rows.append((slot, start, end))
        return end - start

    def _finish_reason(self, slot: int, token: int) -> FinishReason | None:
        if token < 0:
            return "nan"
        if token in self.running[slot].request.stop_ids:
            return "stop"
        return "length" if self.num_tokens[slot] >= self.limit[slot] else None

    def _finish(self, slot: int, reason: FinishReason) -> Completion:
        request = self.running[slot].request
        end = int(self.num_tokens[slot]) - (reason == "stop")
        response = self.tokens[slot, len(request.prompt) : end]
        self._free(slot)
        return Completion(request.id, tuple(response.tolist()), reason)

    def _admits(self, candidate: _Waiting) -> bool:
        if not self.running:
            return True  # alone it fits: `submit` made sure
        shared = self.pool.shared_prefix(candidate.digests)
        already_owned = int((self.pool.owners[shared] > 0).sum()) if shared else 0
        length = len(candidate.tokens) + min(candidate.request.sampling.max_tokens, _GROWTH_TOKENS)
        needed = -(-min(length, self.max_seq_len) // self.page_size) - already_owned
        slots = np.fromiter(self.running, dtype=np.int64, count=len(self.running))
        future = np.minimum(self.limit[slots], self.num_tokens[slots] + _GROWTH_TOKENS)
        reserved = int((-(-future // self.page_size) - self.num_pages[slots]).clip(min=0).sum())
        return self.pool.available >= needed + reserved

    def _admit(self, sequence: _Waiting) -> int:
        slot = self._free_slots.pop()
        request, sampling = sequence.request, sequence.request.sampling
        self.running[slot] = sequence
        self.tokens[slot, : len(sequence.tokens)] = sequence.tokens
        self.num_tokens[slot] = len(sequence.tokens)
        room = min(self.max_seq_len, self.capacity_tokens)
        self.limit[slot] = min(len(request.prompt) + sampling.max_tokens, room)
        self.seed[slot] = request.seed
        self.temperature[slot] = sampling.temperature
        self.top_k[slot] = sampling.top_k
        self.top_p[slot] = sampling.top_p
        shared = self.pool.shared_prefix(sequence.digests)
        for index, page in enumerate(shared):
            self.pool.take(page)
            self.page_table[slot, index] = page
        self.num_pages[slot] = len(shared)
        self.num_computed[slot] = len(shared) * self.page_size
        return slot

    def _grow(self, slot: int, end: int) -> bool:
        """Own pages for tokens up to `end`. Preempts the youngest others, or the sequence itself, when none is left."""
        while self.num_pages[slot] * self.page_size < end:
            if self.pool.available == 0:
                youngest = next(reversed(self.running))
                self._preempt(youngest)
                if youngest == slot:
                    return False
                continue
            self.page_table[slot, self.num_pages[slot]] = self.pool.allocate()
            self.num_pages[slot] += 1
        return True

    def _register(self, slot: int, start: int, end: int) -> None:
        """Offer the prompt pages that this step completes. A row admitted into the same step may already read them:
        in every layer all rows write before any row attends."""
        digests = self.running[slot].digests
        for index in range(start // self.page_size, min(end // self.page_size, len(digests))):
            self.pool.register(int(self.page_table[slot, index]), digests[index])

    def _preempt(self, slot: int) -> None:
        self._requeue(slot)
        self.preemptions += 1

    def _retry_alone(self, slot: int) -> bool:
        """Compute a sequence whose last logits broke once more, on pages of its own: a neighbour that broke may have
        written the shared ones, since attention spreads NaN to all tokens of a chunk. False if nothing was shared."""
        sequence = self.running[slot]
        if not sequence.digests:
            return False
        for page in self.page_table[slot, : self.num_pages[slot]].tolist():
            self.pool.forget(page)
        sequence.digests = []
        self._requeue(slot)
        return True

    def _requeue(self, slot: int) -> None:
        sequence = self.running[slot]
        sequence.tokens = self.tokens[slot, : self.num_tokens[slot]].tolist()
        self._free(slot)
        self.waiting.appendleft(sequence)

    def _free(self, slot: int) -> None:
        del self.running[slot]
        for page in self.page_table[slot, : self.num_pages[slot]].tolist():
            self.pool.release(page)
        self.num_pages[slot] = 0
        self._free_slots.append(slot)
