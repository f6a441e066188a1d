"""An engine in bf16 answers by the kernels that are compiled for a Hopper GPU as it does in plain torch."""

import pytest

pytest.importorskip("triton")

from dataclasses import replace

import torch

from tests.emulation.ptx_on_cpu import on_hopper
from tests.support.checkpoints import make_checkpoint
from tests.support.engines import PROMPTS, SAMPLED, answers, engine_of, make_requests
from thinksafe.kernels.dispatch import INTERPRETED
from thinksafe.model.weights import load_decoder

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen3", {}), ("qwen2", {"kv_cache_dtype": "fp8"}), ("llama", {})],
)
def test_an_engine_answers_as_in_plain_torch(tmp_path, family, settings):
    """Until a token is another one, which a last digit may make it; prompts share pages, and some fill them."""
    decoder = load_decoder(make_checkpoint(family, tmp_path, seed=11), torch.bfloat16, "cpu")
    requests = make_requests(PROMPTS[3:9], replace(SAMPLED, max_tokens=4), stop_ids=())

    def answered():
        return answers(engine_of(decoder, max_running=8, **settings), requests)

    expected = answered()
    with on_hopper():
        found = answered()
    assert all(found[request.id].finish_reason == "length" for request in requests)
    same = 0
    for request in requests:
        mine, theirs = found[request.id], expected[request.id]
        for at, token in enumerate(mine.tokens):
            if mine.tokens[:at] != theirs.tokens[:at]:
                break
            if token == theirs.tokens[at]:
                assert abs(mine.logprobs[at] - theirs.logprobs[at]) < 0.25
                same += 1
    assert same > len(requests) * 4 / 2
