"""Pages and scheduler, without a model: nothing lost, nothing overwritten, everyone served, and nobody else's tokens.

The model is a pure function of the tokens so far. It is played on a cache that remembers which context each entry was
written for, so a row that reads a wrong, stale or missing entry is found out at once.
"""

import random
import time
from collections import Counter, deque
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from thinksafe.kernels import paged_decode
from thinksafe.sampler import scheduler as scheduler_module
from thinksafe.sampler.page_pool import PagePool, prefix_digests
from thinksafe.sampler.request import Completion, Request, SamplingConfig
from thinksafe.sampler.scheduler import Scheduler, StepPlan

VOCAB_SIZE = 50
POISON = 99
"""A token that breaks the model: what is computed together with it, or reads that, is NaN."""

STALE, NAN = -2, -1


def extend(state: int, token: int) -> int:
    """Stands for the whole context after one more token."""
    return (state * 1_000_003 + token + 1) % (2**61 - 1)


def next_token(state: int) -> int:
    return -1 if state == NAN else (state >> 7) % VOCAB_SIZE


def rollout(request: Request, room: int) -> Completion:
    """What a request must get, token by token and alone. `room` is the longest possible context."""
    if POISON in request.prompt:
        return Completion(request.id, (), "nan")
    state = 0
    for token in request.prompt:
        state = extend(state, token)
    response: list[int] = []
    logprobs: list[float] = []
    while (token := next_token(state)) not in request.stop_ids:
        response.append(token)
        logprobs.append(float(logprob_of(np.array(state))))
        if len(response) == request.sampling.max_tokens or len(request.prompt) + len(response) == room:
            return Completion(request.id, tuple(response), "length", tuple(logprobs))
        state = extend(state, token)
    return Completion(request.id, tuple(response), "stop", tuple(logprobs))


class FakeRunner:
    """A device: it has page table and newest tokens from the plans alone, and checks what it is asked to do."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.cache = np.full(len(scheduler.pool.owners) * scheduler.page_size, STALE, dtype=np.int64)
        self.page_table = np.full_like(scheduler.page_table, -1)
        self.last_token = np.full(len(scheduler.epoch), -1)
        self.states: dict[str, list[int]] = {}  # of every context of a request, once it was computed
        self.requests: dict[tuple[int, int], str] = {}  # (slot, epoch) -> request

    def forward(self, plan: StepPlan) -> tuple[np.ndarray, np.ndarray]:
        """The next token of every completing row, and a log-probability that is a function of it and its context."""
        scheduler = self.scheduler
        assert 0 < len(plan.slots) == len(set(plan.slots.tolist()))
        assert plan.is_decode or plan.num_tokens <= scheduler.max_step_tokens
        for slot in plan.joined.tolist():
            self.requests[slot, int(scheduler.epoch[slot])] = scheduler.running[slot].request.id
        for slot, index, page in plan.new_pages.tolist():
            self.page_table[slot, index] = page
        counts = plan.ends - plan.starts
        assert (counts >= 1).all() and (not plan.is_decode or (counts == 1).all())
        rows = list(zip(plan.slots.tolist(), plan.starts.tolist(), plan.ends.tolist(), strict=True))
        self._check_written_pages(rows)

        entries, expected = {}, {}
        for (slot, start, end), epoch in zip(rows, plan.epochs.tolist(), strict=True):
            positions = np.arange(end)
            pages = self.page_table[slot, positions // scheduler.page_size]
            entries[slot] = pages * scheduler.page_size + positions % scheduler.page_size
            tokens = self.last_token[slot : slot + 1] if plan.is_decode else scheduler.tokens[slot, start:end]
            states = self.states.setdefault(self.requests[slot, epoch], [])
            del states[start:]
            shared = scheduler.tokens[slot, len(states) : start]  # computed by another request
            for token in (*shared.tolist(), *tokens.tolist()):
                states.append(extend(states[-1] if states else 0, token))
            expected[slot] = np.array(states)
            broken = POISON in tokens or -1 in tokens
            self.cache[entries[slot][start:]] = NAN if broken else expected[slot][start:]
        spreading = True
        while spreading:
            spreading = False
            for slot, start, _ in rows:
                seen = self.cache[entries[slot]]
                assert ((seen == expected[slot]) | (seen == NAN)).all(), "a row reads another context's entry"
                if (seen == NAN).any() and not (seen[start:] == NAN).all():
                    self.cache[entries[slot][start:]] = NAN
                    spreading = True
        completing = plan.slots[plan.completes]
        states = np.array([int(self.cache[entries[slot][-1]]) for slot in completing.tolist()], dtype=np.int64)
        tokens = np.array([next_token(state) for state in states.tolist()], dtype=np.int64)
        self.last_token[completing] = tokens
        return tokens, logprob_of(states)

    def _check_written_pages(self, rows: list[tuple[int, int, int]]) -> None:
        """A page is written by one row, and whoever else owns it has it behind itself, read-only."""
        size, written, scheduler = self.scheduler.page_size, {}, self.scheduler
        for slot, start, end in rows:
            for page in self.page_table[slot, start // size : -(-end // size)].tolist():
                assert page not in written, "two rows write the same page"
                written[page] = slot
        for slot in scheduler.running:
            for index, page in enumerate(scheduler.page_table[slot, : scheduler.num_pages[slot]].tolist()):
                assert written.get(page, slot) == slot or scheduler.num_computed[slot] >= (index + 1) * size


def logprob_of(states: np.ndarray) -> np.ndarray:
    return (-(states % 1000) / 8).astype(np.float32)


def check_conservation(scheduler: Scheduler) -> None:
    """Every page is blank, idle or owned, and owned as often as it stands in a running sequence's table."""
    pool = scheduler.pool
    owned = Counter()
    for slot in scheduler.running:
        pages = scheduler.page_table[slot, : scheduler.num_pages[slot]].tolist()
        assert len(set(pages)) == len(pages)
        owned.update(pages)
    assert {page: count for page, count in enumerate(pool.owners.tolist()) if count} == owned
    assert pool.available == len(pool.owners) - len(owned)
    assert sorted([*owned, *pool._blank, *pool._idle]) == list(range(len(pool.owners)))


def drive(
    scheduler: Scheduler, arrivals: Iterable[tuple[int, Request]], max_steps: int, lag: int = 1
) -> dict[str, Completion]:
    """Answer requests that arrive at given steps; every one once, all pages free in the end.

    Args:
        lag: passes that run ahead of what is committed.
    """
    fake = FakeRunner(scheduler)
    in_flight: deque = deque()
    to_come = deque(sorted(arrivals, key=lambda arrival: arrival[0]))
    completions: list[Completion] = []
    step = 0
    while scheduler.has_work or to_come or in_flight:
        while to_come and (to_come[0][0] <= step or not scheduler.has_work):
            scheduler.submit([to_come.popleft()[1]])
        plan = scheduler.plan()
        check_conservation(scheduler)
        if plan is not None:
            in_flight.append((plan, fake.forward(plan)))
        if plan is None or len(in_flight) > lag:
            oldest, results = in_flight.popleft()
            completions += scheduler.commit(oldest, *results)
            check_conservation(scheduler)
        assert scheduler.num_in_flight == len(in_flight)
        step += 1
        assert step <= max_steps, "no end in sight"
    assert scheduler.pool.available == len(scheduler.pool.owners)
    by_id = {completion.request_id: completion for completion in completions}
    assert len(by_id) == len(completions)
    return by_id


@st.composite
def workloads(draw, tokens):
    """A scheduler's settings, whether it replays, room for growth, passes ahead, and requests with their arrival."""
    page_size, num_slots = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    num_pages = draw(st.integers(-(-4 // page_size), 24))
    max_seq_len = draw(st.integers(4, 60))
    room = min(max_seq_len, num_pages * page_size)
    stems = draw(st.lists(st.lists(tokens, max_size=room), min_size=1, max_size=3))
    arrivals = []
    for index in range(draw(st.integers(1, 12))):
        stem, tail = draw(st.sampled_from(stems)), draw(st.lists(tokens, min_size=1, max_size=6))
        prompt = tuple([*stem, *tail][-(room - 1) :] if draw(st.booleans()) else [*stem, *tail][: room - 1])
        sampling = SamplingConfig(max_tokens=draw(st.integers(1, 30)))
        stop_ids = tuple(draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4)))
        arrivals.append((draw(st.integers(0, 20)), Request(f"{index}", prompt, sampling, 0, stop_ids)))
    settings_ = (num_slots, num_pages, page_size, max_seq_len, draw(st.integers(1, 40)))
    return settings_, draw(st.booleans()), draw(st.integers(1, 40)), draw(st.integers(0, 3)), arrivals


def check_workload(workload) -> None:
    settings_, replay, growth, lag, arrivals = workload
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "_GROWTH_TOKENS", growth)
        scheduler = Scheduler(*settings_, replay=replay)
        got = drive(scheduler, arrivals, max_steps=5000, lag=lag)
    expected = {request.id: rollout(request, scheduler.max_seq_len) for _, request in arrivals}
    assert got == expected
    assert all(got[id_].logprobs == completion.logprobs for id_, completion in expected.items())


@settings(max_examples=250, deadline=None)
@given(workloads(st.integers(0, 2)))
def test_every_request_gets_what_it_would_get_alone(workload):
    check_workload(workload)


@settings(max_examples=150, deadline=None)
@given(workloads(st.sampled_from([0, 0, 0, 1, 1, POISON])))
def test_a_broken_request_ends_as_nan_and_harms_no_other(workload):
    check_workload(workload)


def mixed_requests(rng: random.Random, num_requests: int, num_stems: int) -> list[Request]:
    """Prompts of 1 to 79 tokens that begin with one of a few stems, responses of up to 60."""
    stems = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(60))] for _ in range(num_stems)]
    requests = []
    for index in range(num_requests):
        prompt = (*rng.choice(stems), *[rng.randrange(VOCAB_SIZE) for _ in range(1 + rng.randrange(20))])
        stop_ids = tuple(rng.sample(range(VOCAB_SIZE), rng.randrange(2)))
        requests.append(Request(f"{index}", prompt, SamplingConfig(max_tokens=rng.randint(1, 60)), 0, stop_ids))
    return requests


def test_three_thousand_requests_of_mixed_length(fresh_seed, monkeypatch):
    monkeypatch.setattr(scheduler_module, "_GROWTH_TOKENS", 1)
    requests = mixed_requests(random.Random(fresh_seed), 3000, num_stems=30)
    scheduler = Scheduler(num_slots=64, num_pages=400, page_size=4, max_seq_len=100, max_step_tokens=200)
    got = drive(scheduler, [(0, request) for request in requests], max_steps=20_000)
    assert got == {request.id: rollout(request, 100) for request in requests}
    assert scheduler.preemptions > 0


@pytest.mark.parametrize("max_step_tokens", [11, 23])
def test_a_crowded_pool_mixes_nothing_up(fresh_seed, monkeypatch, max_step_tokens):
    """Prompts are preempted half-read, and a slot may change hands within one step."""
    monkeypatch.setattr(scheduler_module, "_GROWTH_TOKENS", 1)
    rng = random.Random(fresh_seed)
    for _ in range(20):
        requests = mixed_requests(rng, 40, num_stems=2)
        scheduler = Scheduler(8, num_pages=40, page_size=4, max_seq_len=100, max_step_tokens=max_step_tokens)
        got = drive(scheduler, [(0, request) for request in requests], max_steps=5000)
        assert got == {request.id: rollout(request, 100) for request in requests}


def test_room_for_growth_avoids_computing_tokens_twice():
    sampling = SamplingConfig(max_tokens=60)
    requests = [Request(f"{index}", (*range(9), index % VOCAB_SIZE), sampling, 0, ()) for index in range(100)]

    def recomputed(growth: int) -> float:
        """Share of tokens computed more than once."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scheduler_module, "_GROWTH_TOKENS", growth)
            scheduler = Scheduler(num_slots=32, num_pages=100, page_size=16, max_seq_len=100, max_step_tokens=100)
            drive(scheduler, [(0, request) for request in requests], max_steps=5000)
        return scheduler.computed_tokens / (100 * 69) - 1

    assert recomputed(60) == 0
    assert recomputed(1) > 0.1


def test_planning_and_committing_a_pass_of_512_responses_takes_a_tenth_of_a_millisecond():
    """The shortest of many, since other work shares the processor."""
    scheduler = Scheduler(num_slots=512, num_pages=20_480, page_size=64, max_seq_len=4096, max_step_tokens=8192)
    sampling = SamplingConfig(max_tokens=2000)
    scheduler.submit(Request(str(i), tuple(range(64)), sampling, i, (VOCAB_SIZE,)) for i in range(512))
    shortest = 1.0
    for _ in range(300):
        started = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter() - started
        tokens, logprobs = np.ones(plan.completes.sum(), np.int64), np.zeros(plan.completes.sum(), np.float32)
        started = time.perf_counter()
        scheduler.commit(plan, tokens, logprobs)
        if len(plan.slots) == 512 and plan.is_decode:
            shortest = min(shortest, planned + time.perf_counter() - started)
    assert shortest < 100e-6


def test_a_preempted_response_is_replayed_from_its_prompt_where_it_must_not_be_read():
    """Response tokens are then computed by decode passes alone."""
    requests = mixed_requests(random.Random(1), 60, num_stems=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "_GROWTH_TOKENS", 1)
        scheduler = Scheduler(8, num_pages=40, page_size=4, max_seq_len=100, max_step_tokens=23, replay=True)
        planned, plan = [], scheduler.plan

        def watched():
            planned.append(plan())
            if planned[-1] is not None and not planned[-1].is_decode:
                assert (planned[-1].ends <= scheduler.num_prompt[planned[-1].slots]).all()
            return planned[-1]

        scheduler.plan = watched
        got = drive(scheduler, [(0, request) for request in requests], max_steps=5000)
    assert got == {request.id: rollout(request, 100) for request in requests}
    assert scheduler.preemptions > 0


def test_requests_are_admitted_in_order_of_arrival():
    """A prompt that must wait for pages is not overtaken for ever by smaller ones."""
    scheduler = Scheduler(num_slots=4, num_pages=20, page_size=4, max_seq_len=80, max_step_tokens=64)
    large = Request("large", tuple(range(60)), SamplingConfig(max_tokens=4), 0, ())
    small = [Request(f"{i}", (i, i), SamplingConfig(max_tokens=30), 0, ()) for i in range(40)]
    finished = list(drive(scheduler, [(0, request) for request in [small[0], small[1], large, *small[2:]]], 2000))
    assert finished.index("large") <= 2


@pytest.mark.parametrize("length", [0, 16, 40])
def test_a_batch_with_a_request_that_can_never_run_leaves_the_queue_as_it_was(length):
    scheduler = Scheduler(num_slots=4, num_pages=4, page_size=4, max_seq_len=80, max_step_tokens=64)
    fits = Request("fits", (1,) * 15, SamplingConfig(max_tokens=4), 0, ())
    with pytest.raises(ValueError):
        scheduler.submit([fits, Request("never", (1,) * length, SamplingConfig(), 0, ())])
    assert not scheduler.has_work
    assert drive(scheduler, [(0, fits)], max_steps=20) == {"fits": rollout(fits, 16)}


class PoolMachine(RuleBasedStateMachine):
    """The pool against a plain account of who owns what and which digest a page's contents have."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(6)
        self.owners = Counter()
        self.contents: dict[int, bytes] = {}  # pages that are offered
        self.idle: list[int] = []  # offered pages without an owner, oldest first

    @precondition(lambda self: self.pool.available)
    @rule()
    def allocate(self):
        blank = 6 - len(+self.owners) - len(self.idle)
        page = self.pool.allocate()
        assert self.owners[page] == 0
        if blank:
            assert page not in self.idle, "a blank page is given before one that can still be shared"
        else:
            assert page == self.idle.pop(0), "the page that has been idle for longest goes first"
            del self.contents[page]
        self.owners[page] = 1

    @precondition(lambda self: not self.pool.available)
    @rule()
    def allocate_from_nothing(self):
        with pytest.raises(IndexError):
            self.pool.allocate()

    @precondition(lambda self: +self.owners)
    @rule(data=st.data(), digest=st.sampled_from([b"a", b"b", b"c"]))
    def register(self, data, digest):
        page = data.draw(st.sampled_from(sorted(+self.owners)))
        self.pool.register(page, digest)
        if page not in self.contents and digest not in self.contents.values():
            self.contents[page] = digest

    @rule(digests=st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=3, unique=True))
    def share(self, digests):
        page_of = {digest: page for page, digest in self.contents.items()}
        pages = self.pool.shared_prefix(digests)
        known = [digest in page_of for digest in digests]
        length = known.index(False) if False in known else len(digests)
        assert pages == [page_of[digest] for digest in digests[:length]]
        for page in pages:
            self.pool.take(page)
            self.owners[page] += 1
            if page in self.idle:
                self.idle.remove(page)

    @precondition(lambda self: +self.owners)
    @rule(data=st.data())
    def forget(self, data):
        page = data.draw(st.sampled_from(sorted(+self.owners)))
        self.pool.forget(page)
        self.contents.pop(page, None)

    @precondition(lambda self: +self.owners)
    @rule(data=st.data())
    def release(self, data):
        page = data.draw(st.sampled_from(sorted(+self.owners)))
        self.pool.release(page)
        self.owners[page] -= 1
        if self.owners[page] == 0 and page in self.contents:
            self.idle.append(page)

    @invariant()
    def owners_and_free_pages_add_up(self):
        assert {page: n for page, n in enumerate(self.pool.owners.tolist()) if n} == +self.owners
        assert self.pool.available == 6 - len(+self.owners)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12), st.integers(1, 4))
def test_digests_are_equal_exactly_where_the_whole_prefix_is(a, b, page_size):
    digests_a, digests_b = prefix_digests(a, page_size), prefix_digests(b, page_size)
    assert len(digests_a) == len(a) // page_size
    for index, (x, y) in enumerate(zip(digests_a, digests_b, strict=False), start=1):
        assert (x == y) == (a[: index * page_size] == b[: index * page_size])


@given(st.lists(st.integers(0, 500), max_size=40), st.integers(1, 2000))
def test_decoding_rows_are_batched_by_length_within_the_bound(lengths, bound):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_decode, "_BATCH_TOKENS", bound)
        batches = paged_decode._similar_lengths(torch.tensor(lengths, dtype=torch.int64))
    assert sorted(row for rows, _ in batches for row in rows.tolist()) == [r for r, n in enumerate(lengths) if n]
    for rows, length in batches:
        assert len(rows) == 1 or len(rows) * length <= bound
        assert all(0 <= length - lengths[row] < paged_decode.STRETCH for row in rows.tolist())
