"""Which responses are begun first, on a scheduler that runs without a model, each pass timed by sampler/limits.py."""

import numpy as np

from benchmarks.shapes import MODELS, response_lengths
from thinksafe.data.records import Prompt
from thinksafe.hardware import hardware_named
from thinksafe.model.config import ModelConfig
from thinksafe.pipeline.responses import Task, longest_first
from thinksafe.sampler.request import Request, SamplingConfig
from thinksafe.sampler.roofline import Sizes, pass_seconds
from thinksafe.sampler.scheduler import Scheduler


def seconds_of(lengths: list[int]) -> float:
    """Least time on an H200 for Qwen3-8B to write responses of these lengths, begun in this order."""
    config, hardware = ModelConfig.from_hugging_face(MODELS["qwen3-8b"], ""), hardware_named("H200")
    sizes = Sizes(2, 2, 2 * config.kv_elements_per_token)
    scheduler = Scheduler(64, 6000, 64, config.max_seq_len, 8192)
    prompt = tuple(range(100))
    scheduler.submit(Request(str(i), prompt, SamplingConfig(max_tokens=n), 0, ()) for i, n in enumerate(lengths))
    seconds = 0.0
    while scheduler.has_work:
        plan = scheduler.plan()
        seconds += pass_seconds(plan, config, sizes, hardware)
        scheduler.commit(plan, np.ones(plan.completes.sum(), np.int64), np.zeros(plan.completes.sum(), np.float32))
    return seconds


def test_steered_responses_begun_last_shorten_the_tail():
    """Lengths as the paper reports them: 442 tokens where the student was told to refuse, else 866."""
    prompts = [Prompt(f"p{i}", f"prompt {i}", "harmful" if i % 2 else "benign") for i in range(300)]
    tasks = [Task(prompt, "prefix" if prompt.label == "harmful" else None) for prompt in prompts]
    order = longest_first(enumerate(tasks))
    assert sorted(order) == list(range(300))
    gained = []
    for seed in range(4):
        lengths = np.empty(300, dtype=int)
        for mean, half in ((866, slice(0, None, 2)), (442, slice(1, None, 2))):
            lengths[half] = response_lengths(150, mean, 16_384, seed)
        gained.append(1 - seconds_of(lengths[order].tolist()) / seconds_of(lengths.tolist()))
    assert np.mean(gained) > 0.01


def test_responses_to_one_prompt_stay_together():
    """They share its pages."""
    prompts = [Prompt(f"p{i}", f"prompt {i}", "harmful" if i % 2 else "benign") for i in range(4)]
    tasks = [Task(p, "prefix" if p.label == "harmful" else None, sample) for p in prompts for sample in range(3)]
    assert longest_first(enumerate(tasks)) == [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]
    assert longest_first([]) == []
