"""Log-probabilities of chosen next tokens are those of transformers."""

import math

import numpy as np
import pytest
import torch

from tests.support.checkpoints import FAMILIES
from tests.support.engines import PROMPTS, SHARED, answers, engine_of, make_requests, models, scores_of


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_log_softmax_of_transformers(crowded, family):
    decoder, model = models(family)
    token_ids = (3, 399, 17)
    with torch.no_grad():
        expected = [model(torch.tensor([p])).logits[0, -1].log_softmax(-1)[list(token_ids)] for p in PROMPTS]
    for num_pages, max_step_tokens in [(200, 256), (17, 32)]:
        engine = engine_of(decoder, page_size=4, num_pages=num_pages, max_step_tokens=max_step_tokens)
        prompts = [(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
        scores = scores_of(engine, prompts, token_ids)
        for i, row in enumerate(expected):
            torch.testing.assert_close(torch.from_numpy(scores[str(i)]), row, atol=1e-4, rtol=1e-4)


def test_scores_are_nan_where_an_activation_overflows(monkeypatch):
    """Else a verdict would be read out of a distribution that is none."""
    engine = engine_of(models("qwen3")[0])
    read = engine.runner._read

    def overflowing(plan):
        hidden = read(plan).clone()
        hidden[plan.ends[plan.completes] == 3, 50] = torch.inf
        return hidden

    monkeypatch.setattr(engine.runner, "_read", overflowing)
    scores = scores_of(engine, [("bad", (1, 2, 3)), ("good", (4, 5))], (5, 6))
    assert all(math.isnan(value) for value in scores["bad"])
    assert all(math.isfinite(value) for value in scores["good"])


def test_one_engine_generates_and_scores_in_turn():
    decoder, _ = models("qwen3")
    engine, requests = engine_of(decoder, page_size=4), make_requests(PROMPTS)
    first = answers(engine, requests)
    list(engine.score([("s", SHARED)], (1, 2)))
    assert answers(engine, requests) == first


def test_batch_invariant_scores_have_the_same_bits_in_every_batch():
    decoder, _ = models("llama")
    prompts = [(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
    engine = engine_of(decoder, batch_invariant=True)
    together = scores_of(engine, prompts, (3, 399, 17))
    usual = scores_of(engine_of(decoder), prompts, (3, 399, 17))
    for id_, prompt in prompts:
        cut = engine_of(decoder, batch_invariant=True, max_step_tokens=5, page_size=4)
        assert np.array_equal(scores_of(cut, [(id_, prompt)], (3, 399, 17))[id_], together[id_])
        np.testing.assert_allclose(usual[id_], together[id_], atol=1e-4)
