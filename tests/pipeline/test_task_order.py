"""The order of the sampling tasks saves time. A scheduler runs without a model; sampler/roofline.py times each pass."""

import numpy as np
import pytest

from benchmarks.shapes import MODELS, response_lengths
from thinksafe.data.records import Prompt
from thinksafe.hardware import hardware_named
from thinksafe.model.config import ModelConfig
from thinksafe.pipeline.responses import SamplingTask, longest_first
from thinksafe.sampler.config import SamplingConfig
from thinksafe.sampler.request import Request
from thinksafe.sampler.roofline import ByteCounts, roofline_seconds
from thinksafe.sampler.scheduler import Scheduler


def seconds_of(lengths: list[int]) -> float:
    """Return the roofline time of Qwen3-8B on an H200 for responses of these lengths, started in this order."""
    config, hardware = ModelConfig.from_hugging_face(MODELS["qwen3-8b"], ""), hardware_named("H200")
    sizes = ByteCounts(2, 2, 2 * config.kv_elements_per_token)
    scheduler = Scheduler(64, 6000, 64, config.max_seq_len, 8192)
    prompt = tuple(range(100))
    scheduler.submit(Request(str(i), prompt, SamplingConfig(max_tokens=n), 0, ()) for i, n in enumerate(lengths))
    seconds = 0.0
    while scheduler.has_work:
        batch = scheduler.schedule()
        seconds += roofline_seconds(batch, config, sizes, hardware)
        scheduler.commit(
            batch, np.ones(batch.needs_logits.sum(), np.int64), np.zeros(batch.needs_logits.sum(), np.float32)
        )
    return seconds


@pytest.mark.slow
def test_starting_steered_responses_last_saves_time():
    """The mean lengths are the paper's: 442 tokens with a refusal instruction, 866 without."""
    prompts = [Prompt(f"p{i}", f"prompt {i}", "harmful" if i % 2 else "benign") for i in range(300)]
    tasks = [SamplingTask(prompt, "prefix" if prompt.label == "harmful" else None) for prompt in prompts]
    order = longest_first(range(300), tasks)
    assert sorted(order) == list(range(300))
    savings = []
    for seed in range(4):
        lengths = np.empty(300, dtype=int)
        for mean, half in ((866, slice(0, None, 2)), (442, slice(1, None, 2))):
            lengths[half] = response_lengths(150, mean, 16_384, seed)
        savings.append(1 - seconds_of(lengths[order].tolist()) / seconds_of(lengths.tolist()))
    assert np.mean(savings) > 0.01


def test_samples_of_a_prompt_stay_together():
    """They share the pages of their prompt."""
    prompts = [Prompt(f"p{i}", f"prompt {i}", "harmful" if i % 2 else "benign") for i in range(4)]
    tasks = [
        SamplingTask(p, "prefix" if p.label == "harmful" else None, sample) for p in prompts for sample in range(3)
    ]
    assert longest_first(range(12), tasks) == [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]
    assert longest_first([], tasks) == []
