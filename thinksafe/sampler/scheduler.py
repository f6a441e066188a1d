"""Who computes what in the next pass. No torch, no model: token counts and page numbers only.

A pass either reads prompts, packed up to a budget, or continues every running response by one token. A plan states
what will have been computed as if it were done, so the next one can be made while the device still works: how long
each sequence is then is certain, which token it ends with is not, and no plan asks. `commit` learns the tokens, in
order, some passes later. A response that turned out to have ended before is computed once too often; its slot has
another epoch by then, so the result is dropped.

State lies in arrays by slot: planning 500 sequences is a handful of numpy calls.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from thinksafe.sampler.page_pool import PagePool, prefix_digests
from thinksafe.sampler.repetition import CHECK_EVERY, ends_in_a_loop
from thinksafe.sampler.request import Completion, FinishReason, Request

_GROWTH_TOKENS = 256
"""Room kept free per running sequence when another is admitted: fewer preemptions than admitting on the prompt
alone, which recomputes 40% of all tokens, and fuller batches than reserving max_tokens."""
_ADMIT_TOGETHER = 16
"""Requests to wait for before prompts are read: a pass over the weights for one prompt delays all running responses."""
_NO_TOKEN = -2


@dataclass(frozen=True)
class StepPlan:
    """One pass over the model.

    Attributes:
        is_decode: every row is the newest token of a response, whose id may be known to the device alone; else rows
            are stretches of known tokens.
        slots, starts, ends: [R] int64; row r computes tokens starts[r] to ends[r] of the sequence in slots[r].
        completes: [R] bool; a token is to be drawn behind the row's last.
        epochs: [R] int64, which occupant of the slot is meant.
        joined: [J] int64, slots with a new occupant since the last plan.
        new_pages: [N, 3] int64, page-table entries made since the last plan: slot, index, page.
    """

    is_decode: bool
    slots: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    completes: np.ndarray
    epochs: np.ndarray
    joined: np.ndarray
    new_pages: np.ndarray

    @property
    def num_tokens(self) -> int:
        return int((self.ends - self.starts).sum())


@dataclass
class _Sequence:
    """A request and what is known of its response: a preempted one comes back with the tokens it had."""

    request: Request
    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)


class Scheduler:
    """Slots, pages and the queue.

    Attributes:
        tokens: [num_slots, max_seq_len] int32, prompt and committed response of each running sequence.
        num_computed: [num_slots] int64, tokens in the cache once all plans are done.
        page_table: [num_slots, max pages a sequence] int64.
        num_in_flight: plans that are not committed.
        computed_tokens, shared_tokens: so far, those that passes were planned for, and those that whoever was admitted
            found in the cache.
        preemptions: how often a response had to wait because pages ran out.
    """

    def __init__(
        self,
        num_slots: int,
        num_pages: int,
        page_size: int,
        max_seq_len: int,
        max_step_tokens: int,
        *,
        replay: bool = False,
    ):
        """replay: write a preempted response anew from its first token, as it was written, where reading it as a part
        of the prompt would give its cache other last bits."""
        self.replay = replay
        self.page_size = page_size
        self.max_step_tokens = max_step_tokens
        self.pool = PagePool(num_pages)
        self.max_seq_len = min(max_seq_len, num_pages * page_size)
        # Untouched parts of the large arrays take no memory.
        self.tokens = np.zeros((num_slots, self.max_seq_len), dtype=np.int32)
        self.logprobs = np.zeros((num_slots, self.max_seq_len), dtype=np.float32)
        self.num_prompt = np.zeros(num_slots, dtype=np.int64)
        self.num_known = np.zeros(num_slots, dtype=np.int64)  # tokens at admission, read as a prompt
        self.num_computed = np.zeros(num_slots, dtype=np.int64)
        self.limit = np.zeros(num_slots, dtype=np.int64)  # length at which a response is cut; 0 in a free slot
        self.num_pages = np.zeros(num_slots, dtype=np.int64)
        self.page_table = np.zeros((num_slots, -(-self.max_seq_len // page_size)), dtype=np.int64)
        self.epoch = np.zeros(num_slots, dtype=np.int64)
        self.stop_ids = np.full((num_slots, 1), _NO_TOKEN, dtype=np.int64)
        self.stop_loops = np.zeros(num_slots, dtype=bool)
        self.seed = np.zeros(num_slots, dtype=np.int64)
        self.temperature = np.zeros(num_slots, dtype=np.float32)
        self.top_k = np.zeros(num_slots, dtype=np.int64)
        self.top_p = np.ones(num_slots, dtype=np.float32)
        self.running: dict[int, _Sequence] = {}  # slot -> sequence, in order of admission
        self.waiting: deque[_Sequence] = deque()
        self.num_in_flight = 0
        self.computed_tokens = 0
        self.shared_tokens = 0
        self.preemptions = 0
        self._reading: list[int] = []  # slots whose prompt is not wholly computed
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._joined: list[int] = []
        self._new_pages: list[tuple[int, int, int]] = []

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests: all of them, or none.

        Raises:
            ValueError: one can never run: an empty prompt, or one that leaves no room for a single response token, or a
                seed that is none.
        """
        self.waiting.extend([self._sequence(request) for request in requests])

    def abandon(self) -> None:
        """Drop every request and every plan in flight. Their prompts' pages are offered no longer: the pass that was to
        fill them may never have been launched."""
        for slot in list(self.running):
            for page in self.page_table[slot, : self.num_pages[slot]].tolist():
                self.pool.forget(page)
            self._free(slot)
        for unsent in (self.waiting, self._reading, self._joined, self._new_pages):
            unsent.clear()
        self.num_in_flight = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def plan(self) -> StepPlan | None:
        """The next pass, its pages given out; None where nothing can be planned before something is committed."""
        if self._reading or self._should_admit():
            return self._read_prompts()
        return self._continue_responses()

    def commit(self, plan: StepPlan, sampled: np.ndarray, logprobs: np.ndarray) -> list[Completion]:
        """Take in the results of the oldest plan that is in flight.

        Args:
            sampled: [plan.completes.sum()] int64, a token for every completing row; -1 where the logits broke.
            logprobs: [plan.completes.sum()] fp32, of those tokens.

        Returns:
            The sequences that are finished, their slots and pages freed.
        """
        index, slots, ends = self._land(plan)
        sampled = sampled[index]
        self.tokens[slots, ends] = sampled
        self.logprobs[slots, ends] = logprobs[index]
        stopped = (self.stop_ids[slots] == sampled[:, None]).any(-1)
        over = stopped | (sampled < 0) | (ends + 1 >= self.limit[slots])
        look = self.stop_loops[slots] & ((ends + 1 - self.num_prompt[slots]) % CHECK_EVERY == 0)
        completions = []
        for row in np.flatnonzero(over | look).tolist():
            slot, end = int(slots[row]), int(ends[row])
            if sampled[row] < 0:
                if not self._retry_alone(slot, end):
                    completions.append(self._finish(slot, end, "nan"))
            elif stopped[row]:
                completions.append(self._finish(slot, end, "stop"))
            elif look[row] and ends_in_a_loop(self.tokens[slot, self.num_prompt[slot] : end + 1]):
                completions.append(self._finish(slot, end + 1, "loop"))
            elif over[row]:
                completions.append(self._finish(slot, end + 1, "length"))
        return completions

    def commit_scored(self, plan: StepPlan, broken: np.ndarray) -> list[tuple[int, Request]]:
        """Like `commit` where only the prompt's last logits are wanted, so that every completing row is finished.

        Args:
            broken: [plan.completes.sum()] bool.

        Returns:
            The finished requests, each with its index among the completing rows.
        """
        finished = []
        for row, slot, end in zip(*(part.tolist() for part in self._land(plan)), strict=True):
            if not (broken[row] and self._retry_alone(slot, end)):
                finished.append((row, self.running[slot].request))
                self._free(slot)
        return finished

    def _sequence(self, request: Request) -> _Sequence:
        length = len(request.prompt)
        if length == 0:
            raise ValueError(f"request {request.id}: the prompt is empty")
        if length >= self.max_seq_len:
            raise ValueError(
                f"request {request.id}: the prompt has {length} tokens, "
                f"the context holds {self.max_seq_len} with the response"
            )
        if not 0 <= request.seed < 1 << 63:
            raise ValueError(f"request {request.id}: the seed {request.seed} has more than 63 bits or is negative")
        digests = prefix_digests(request.prompt[:-1], self.page_size)  # the last token is always computed: its logits
        return _Sequence(request, list(request.prompt), digests=digests)

    def _should_admit(self) -> bool:
        """Whether enough requests can join for a pass of their own."""
        if not self.waiting or not self._free_slots:
            return False
        if not self.running:
            return True  # alone the first fits: `submit` made sure
        wanted = min(_ADMIT_TOGETHER, len(self.waiting), -(-len(self.epoch) // 4))
        if len(self._free_slots) < wanted:
            return False
        candidates = [self.waiting[index] for index in range(wanted)]
        return self.pool.available >= self._reserved() + sum(map(self._pages_to_admit, candidates))

    def _pages_to_admit(self, candidate: _Sequence) -> int:
        """Pages for its tokens and some growth, less those it shares with someone who runs."""
        shared = self.pool.shared_prefix(candidate.digests)
        already_owned = int((self.pool.owners[shared] > 0).sum()) if shared else 0
        length = len(candidate.tokens) + min(candidate.request.sampling.max_tokens, _GROWTH_TOKENS)
        return -(-min(length, self.max_seq_len) // self.page_size) - already_owned

    def _reserved(self) -> int:
        """Pages that running sequences will still take for some growth each."""
        occupied = self.limit > 0
        length = np.maximum(self.num_known, self.num_computed + 1)[occupied]
        future = np.minimum(self.limit[occupied], length + _GROWTH_TOKENS)
        return int((-(-future // self.page_size) - self.num_pages[occupied]).clip(min=0).sum())

    def _read_prompts(self) -> StepPlan:
        """Stretches of prompts up to the budget: those begun before, then those of requests that are admitted now."""
        budget, rows = self.max_step_tokens, []
        slots = deque(self._reading)
        while budget:
            if not slots:
                if not (self.waiting and self._free_slots):
                    break
                if self.running and self.pool.available < self._reserved() + self._pages_to_admit(self.waiting[0]):
                    break
                slots.append(self._admit(self.waiting.popleft()))
            slot = slots.popleft()
            start = int(self.num_computed[slot])
            end = min(int(self.num_known[slot]), start + budget)
            self._register(slot, start, end)
            self.num_computed[slot] = end
            if end == self.num_known[slot]:
                self._reading.remove(slot)
            rows.append((slot, start, end))
            budget -= end - start
        slots, starts, ends = np.array(rows, dtype=np.int64).T
        return self._planned(False, slots, starts, ends, ends == self.num_known[slots])

    def _continue_responses(self) -> StepPlan | None:
        """One token for every response that is not cut off by its length yet."""
        while True:
            ready = (self.num_computed >= self.num_known) & (self.num_computed + 1 < self.limit)
            slots = np.flatnonzero(ready)
            starts = self.num_computed[slots]
            growing = slots[starts == self.num_pages[slots] * self.page_size]
            if len(growing) <= self.pool.available:
                break
            if self.num_in_flight:
                return None  # whoever makes room must not have tokens that nobody knows yet
            youngest = next(reversed(self.running))
            self._requeue(youngest, int(self.num_computed[youngest]) + 1)
            self.preemptions += 1
        if not len(slots):
            return None
        for slot in growing.tolist():
            self._add_page(slot, self.pool.allocate())
        self.num_computed[slots] += 1
        return self._planned(True, slots, starts, starts + 1, np.ones(len(slots), dtype=bool))

    def _planned(self, is_decode: bool, slots, starts, ends, completes) -> StepPlan:
        self.num_in_flight += 1
        self.computed_tokens += int((ends - starts).sum())
        joined = np.array(self._joined, dtype=np.int64)
        new_pages = np.array(self._new_pages, dtype=np.int64).reshape(-1, 3)
        self._joined.clear()
        self._new_pages.clear()
        return StepPlan(is_decode, slots, starts, ends, completes, self.epoch[slots], joined, new_pages)

    def _land(self, plan: StepPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the completing rows whose sequence still runs: index among all completing rows, slot, end."""
        self.num_in_flight -= 1
        slots = plan.slots[plan.completes]
        index = np.flatnonzero(self.epoch[slots] == plan.epochs[plan.completes])
        return index, slots[index], plan.ends[plan.completes][index]

    def _finish(self, slot: int, end: int, reason: FinishReason) -> Completion:
        request = self.running[slot].request
        response = slice(len(request.prompt), end)
        tokens, logprobs = self.tokens[slot, response].tolist(), self.logprobs[slot, response].tolist()
        self._free(slot)
        return Completion(request.id, tuple(tokens), reason, tuple(logprobs))

    def _admit(self, sequence: _Sequence) -> int:
        slot = self._free_slots.pop()
        request, sampling = sequence.request, sequence.request.sampling
        length, num_prompt = len(sequence.tokens), len(request.prompt)
        self.running[slot] = sequence
        self.tokens[slot, :length] = sequence.tokens
        self.logprobs[slot, num_prompt:length] = sequence.logprobs
        self.num_prompt[slot] = num_prompt
        self.num_known[slot] = length
        self.limit[slot] = min(num_prompt + sampling.max_tokens, self.max_seq_len)
        missing = len(request.stop_ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, missing)), constant_values=_NO_TOKEN)
        self.stop_ids[slot] = _NO_TOKEN
        self.stop_ids[slot, : len(request.stop_ids)] = request.stop_ids
        self.stop_loops[slot] = sampling.stop_loops
        self.seed[slot] = request.seed
        self.temperature[slot] = sampling.temperature
        self.top_k[slot] = sampling.top_k
        self.top_p[slot] = sampling.top_p
        shared = self.pool.shared_prefix(sequence.digests)
        for page in shared:
            self.pool.take(page)
            self._add_page(slot, page)
        for _ in range(len(shared), -(-length // self.page_size)):
            self._add_page(slot, self.pool.allocate())
        self.num_computed[slot] = len(shared) * self.page_size
        self.shared_tokens += len(shared) * self.page_size
        self._joined.append(slot)
        self._reading.append(slot)
        return slot

    def _add_page(self, slot: int, page: int) -> None:
        index = int(self.num_pages[slot])
        self.page_table[slot, index] = page
        self.num_pages[slot] = index + 1
        self._new_pages.append((slot, index, page))

    def _register(self, slot: int, start: int, end: int) -> None:
        """Offer the prompt pages that this pass completes. A row admitted into the same pass may already read them:
        in every layer all rows write before any row attends."""
        digests = self.running[slot].digests
        for index in range(start // self.page_size, min(end // self.page_size, len(digests))):
            self.pool.register(int(self.page_table[slot, index]), digests[index])

    def _retry_alone(self, slot: int, end: int) -> bool:
        """Compute a sequence whose last logits broke once more, on pages of its own: a neighbour that broke may have
        written the shared ones, since attention spreads NaN to all tokens of a chunk. False if nothing was shared."""
        sequence = self.running[slot]
        if not sequence.digests:
            return False
        for page in self.page_table[slot, : self.num_pages[slot]].tolist():
            self.pool.forget(page)
        sequence.digests = []
        self._requeue(slot, end)
        return True

    def _requeue(self, slot: int, length: int) -> None:
        """Put a sequence back to the front of the queue with its first `length` tokens, all of them committed; with its
        prompt alone where responses are replayed."""
        sequence = self.running[slot]
        if self.replay:
            length = len(sequence.request.prompt)
        sequence.tokens = self.tokens[slot, :length].tolist()
        sequence.logprobs = self.logprobs[slot, len(sequence.request.prompt) : length].tolist()
        self._free(slot)
        self.waiting.appendleft(sequence)

    def _free(self, slot: int) -> None:
        del self.running[slot]
        for page in self.page_table[slot, : self.num_pages[slot]].tolist():
            self.pool.release(page)
        self.num_pages[slot] = 0
        self.limit[slot] = 0
        self.epoch[slot] += 1
        self._free_slots.append(slot)
