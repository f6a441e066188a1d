"""Scoring: the log-probabilities of given next tokens equal the log-softmax of transformers."""

import math

import numpy as np
import pytest
import torch

from tests.support.checkpoints import FAMILIES
from tests.support.engines import PROMPTS, SHARED, answers, engine_of, make_requests, models, scores_of


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_log_softmax_of_transformers(overcommit, family):
    decoder, model = models(family)
    token_ids = (3, 399, 17)
    with torch.no_grad():
        expected = [model(torch.tensor([p])).logits[0, -1].log_softmax(-1)[list(token_ids)] for p in PROMPTS]
    for num_pages, max_prefill_tokens in [(200, 256), (17, 32)]:
        engine = engine_of(decoder, page_size=4, num_pages=num_pages, max_prefill_tokens=max_prefill_tokens)
        prompts = [(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
        scores = scores_of(engine, prompts, token_ids)
        for i, row in enumerate(expected):
            torch.testing.assert_close(torch.from_numpy(scores[str(i)]), row, atol=1e-4, rtol=1e-4)


def test_overflow_gives_nan_scores(monkeypatch):
    """Otherwise a guard's verdict would come from an invalid distribution."""
    engine = engine_of(models("qwen3")[0])
    prefill = engine.runner._prefill

    def overflowing(batch):
        hidden = prefill(batch).clone()
        hidden[batch.ends[batch.needs_logits] == 3, 50] = torch.inf
        return hidden

    monkeypatch.setattr(engine.runner, "_prefill", overflowing)
    scores = scores_of(engine, [("bad", (1, 2, 3)), ("good", (4, 5))], (5, 6))
    assert all(math.isnan(value) for value in scores["bad"])
    assert all(math.isfinite(value) for value in scores["good"])


def test_one_engine_generates_and_scores_in_turn():
    decoder, _ = models("qwen3")
    engine, requests = engine_of(decoder, page_size=4), make_requests(PROMPTS)
    expected = answers(engine, requests)
    list(engine.score([("s", SHARED)], (1, 2)))
    assert answers(engine, requests) == expected


def test_batch_invariant_scores_do_not_depend_on_the_batch():
    decoder, _ = models("llama")
    prompts = [(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
    engine = engine_of(decoder, batch_invariant=True)
    batched = scores_of(engine, prompts, (3, 399, 17))
    default_scores = scores_of(engine_of(decoder), prompts, (3, 399, 17))
    for id_, prompt in prompts:
        chunked_engine = engine_of(decoder, batch_invariant=True, max_prefill_tokens=5, page_size=4)
        assert np.array_equal(scores_of(chunked_engine, [(id_, prompt)], (3, 399, 17))[id_], batched[id_])
        np.testing.assert_allclose(default_scores[id_], batched[id_], atol=1e-4)
