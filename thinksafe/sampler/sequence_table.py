"""The table of running sequences: one slot per sequence, one array per property.

The scheduler decides who gets a slot, a page or a token; this table only remembers it. Arrays indexed by slot make it
possible to schedule 500 sequences with a handful of numpy calls.
"""

from dataclasses import dataclass, field

import numpy as np

from thinksafe.sampler.request import Request

_NO_STOP_ID = -2
"""Padding of the table of stop ids. A token id is at least 0, and -1 is the sampled token if a logit is not finite."""


@dataclass
class SequenceState:
    """A request with its committed response tokens: a preempted sequence keeps them while it waits.

    Attributes:
        tokens: prompt and response tokens at the time of admission; the table holds later ones.
        logprobs: of the response tokens among `tokens`.
        digests: of the prompt's full pages; empty if the sequence must not share pages.
    """

    request: Request
    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)


class SequenceTable:
    """The sequences that occupy slots, and everything about them that a pass needs.

    Attributes:
        running: slot -> sequence, in order of admission.
        tokens: [num_slots, max_seq_len] int32, prompt and committed response.
        logprobs: [num_slots, max_seq_len] fp32, of the committed response tokens.
        num_prompt_tokens: [num_slots] int64.
        num_prefill_tokens: [num_slots] int64, tokens to prefill after admission: the prompt, and the response tokens of
            a sequence that was preempted.
        num_computed_tokens: [num_slots] int64, number of tokens in the cache once all scheduled batches are done.
        max_len: [num_slots] int64, largest length of prompt and response; 0 in a free slot.
        page_table: [num_slots, max pages per sequence] int64, the pages of each sequence, in order; the first
            num_pages[slot] entries are valid.
        epoch: [num_slots] int64, number of sequences that have left each slot.
        stop_ids: [num_slots, K] int64, padded; stop_on_repetition: [num_slots] bool.
        seed, top_k: [num_slots] int64; temperature, top_p: [num_slots] fp32.
    """

    def __init__(self, num_slots: int, max_seq_len: int, page_size: int):
        """Create a table whose slots are all free, for sequences of up to `max_seq_len` tokens."""
        self.max_seq_len = max_seq_len
        # Parts of the large arrays that are never written occupy no memory.
        self.tokens = np.zeros((num_slots, max_seq_len), dtype=np.int32)
        self.logprobs = np.zeros((num_slots, max_seq_len), dtype=np.float32)
        self.page_table = np.zeros((num_slots, -(-max_seq_len // page_size)), dtype=np.int64)
        counts = np.zeros((4, num_slots), dtype=np.int64)
        self.num_prompt_tokens, self.num_prefill_tokens, self.num_computed_tokens, self.max_len = counts
        self.num_pages, self.epoch, self.seed, self.top_k = np.zeros_like(counts)
        self.temperature, self.top_p = np.zeros((2, num_slots), dtype=np.float32)
        self.stop_ids = np.full((num_slots, 1), _NO_STOP_ID, dtype=np.int64)
        self.stop_on_repetition = np.zeros(num_slots, dtype=bool)
        self.running: dict[int, SequenceState] = {}
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._new_slots: list[int] = []
        self._new_pages: list[tuple[int, int, int]] = []

    @property
    def num_slots(self) -> int:
        """Largest number of sequences that run at once."""
        return len(self.epoch)

    @property
    def num_free_slots(self) -> int:
        """Number of slots without a sequence."""
        return len(self._free_slots)

    def occupy(self, sequence: SequenceState) -> int:
        """Put a sequence into a free slot, without pages and computed tokens, and return the slot."""
        slot = self._free_slots.pop()
        request, sampling = sequence.request, sequence.request.sampling
        length, num_prompt_tokens = len(sequence.tokens), len(request.prompt)
        self.running[slot] = sequence
        self.tokens[slot, :length] = sequence.tokens
        self.logprobs[slot, num_prompt_tokens:length] = sequence.logprobs
        self.num_prompt_tokens[slot] = num_prompt_tokens
        self.num_prefill_tokens[slot] = length
        self.num_computed_tokens[slot] = 0
        self.max_len[slot] = min(num_prompt_tokens + sampling.max_tokens, self.max_seq_len)
        extra_columns = len(request.stop_ids) - self.stop_ids.shape[1]
        if extra_columns > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, extra_columns)), constant_values=_NO_STOP_ID)
        self.stop_ids[slot] = _NO_STOP_ID
        self.stop_ids[slot, : len(request.stop_ids)] = request.stop_ids
        self.stop_on_repetition[slot] = sampling.stop_on_repetition
        self.seed[slot] = request.seed
        self.temperature[slot] = sampling.temperature
        self.top_k[slot] = sampling.top_k
        self.top_p[slot] = sampling.top_p
        self._new_slots.append(slot)
        return slot

    def add_page(self, slot: int, page: int) -> None:
        """Append a page to the slot's sequence."""
        index = int(self.num_pages[slot])
        self.page_table[slot, index] = page
        self.num_pages[slot] = index + 1
        self._new_pages.append((slot, index, page))

    def pages(self, slot: int) -> list[int]:
        """Return the pages of the slot's sequence, in order."""
        return self.page_table[slot, : self.num_pages[slot]].tolist()

    def response(self, slot: int, end: int) -> tuple[list[int], list[float]]:
        """Return the committed response tokens before position `end`, and their log-probabilities."""
        committed = slice(int(self.num_prompt_tokens[slot]), end)
        return self.tokens[slot, committed].tolist(), self.logprobs[slot, committed].tolist()

    def vacate(self, slot: int) -> SequenceState:
        """Free a slot and return its sequence. The caller releases the pages first."""
        self.num_pages[slot] = 0
        self.max_len[slot] = 0
        self.epoch[slot] += 1
        self._free_slots.append(slot)
        return self.running.pop(slot)

    def take_updates(self) -> tuple[np.ndarray, np.ndarray]:
        """Return what the device does not know yet, once: `new_slots` and `new_pages` of a `ScheduledBatch`."""
        new_slots = np.array(self._new_slots, dtype=np.int64)
        new_pages = np.array(self._new_pages, dtype=np.int64).reshape(-1, 3)
        self._new_slots.clear()
        self._new_pages.clear()
        return new_slots, new_pages
