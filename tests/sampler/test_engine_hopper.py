"""The engine in bf16 with the kernels compiled for a Hopper GPU: the responses equal those of plain torch.

The compiled kernels run on a CPU by emulation (tests/emulation/ptx_on_cpu.py).
"""

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

pytestmark = pytest.mark.slow  # each test compiles kernels


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen3", {}), ("qwen2", {"kv_cache_dtype": "fp8"}), ("llama", {})],
)
def test_compiled_kernels_give_the_responses_of_plain_torch(tmp_path, family, settings):
    """Responses are compared up to the first different token, which a rounding error may cause. Some prompts share
    pages."""
    decoder = load_decoder(make_checkpoint(family, tmp_path, seed=11), torch.bfloat16, "cpu")
    requests = make_requests(PROMPTS[3:9], replace(SAMPLED, max_tokens=4), stop_ids=())

    def answer_all():
        return answers(engine_of(decoder, max_num_seqs=8, **settings), requests)

    expected = answer_all()
    with on_hopper():
        emulated = answer_all()
    assert all(emulated[request.id].finish_reason == "length" for request in requests)
    num_equal = 0
    for request in requests:
        completion, torch_completion = emulated[request.id], expected[request.id]
        for index, token in enumerate(completion.tokens):
            if completion.tokens[:index] != torch_completion.tokens[:index]:
                break
            if token == torch_completion.tokens[index]:
                assert abs(completion.logprobs[index] - torch_completion.logprobs[index]) < 0.25
                num_equal += 1
    assert num_equal > len(requests) * 4 / 2
