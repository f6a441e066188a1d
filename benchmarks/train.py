"""LoRA fine-tuning: our packed loop against transformers + PEFT on padded batches, same model, data and batch size.

Padding to the longest of eight sequences computes tokens nobody needs; the loss over the whole vocabulary is formed
for prompt tokens that carry none. Both sides train rank-32 adapters on q_proj and v_proj with AdamW.
"""

import statistics

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from benchmarks.harness import Result, interleaved
from benchmarks.sampler import _models
from benchmarks.shapes import response_lengths
from thinksafe.model.lora import LoraConfig, attach
from thinksafe.training.engine import SingleEngine
from thinksafe.training.packing import TrainingSequence, pack

_PROMPT, _BATCH = 64, 8


def run() -> Result:
    """Measure on whatever device there is."""
    gpu = torch.cuda.is_available()
    name, steps, mean, longest = ("qwen3-0.6b", 12, 700, 8192) if gpu else ("cpu-6m", 6, 120, 600)
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    ours, theirs = _models(name, device, dtype)
    rng = np.random.default_rng(0)
    sequences = [
        TrainingSequence(rng.integers(0, ours.config.vocab_size, _PROMPT + length, dtype=np.int32), _PROMPT)
        for length in response_lengths(steps * _BATCH, mean, longest, seed=1)
    ]
    batches = [sequences[start : start + _BATCH] for start in range(0, len(sequences), _BATCH)]

    attach(ours, LoraConfig(), seed=0)
    engine = SingleEngine(ours, max_grad_norm=1.0, weight_decay=0.0)

    def packed() -> None:
        for batch in batches:
            engine.step(pack(batch, 16_384, device), 1e-5)

    settings = PeftConfig(r=32, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(theirs, settings).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)

    def padded() -> None:
        for batch in batches:
            width = max(map(len, batch))
            input_ids = torch.zeros(_BATCH, width, dtype=torch.long)
            labels = torch.full((_BATCH, width), -100)
            mask = torch.zeros(_BATCH, width, dtype=torch.long)
            for row, sequence in enumerate(batch):
                ids = torch.from_numpy(sequence.input_ids).long()
                input_ids[row, : len(ids)], mask[row, : len(ids)] = ids, 1
                labels[row, sequence.response_start : len(ids)] = ids[sequence.response_start :]
            out = adapted(input_ids.to(device), attention_mask=mask.to(device), labels=labels.to(device))
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    times = interleaved({"ThinkSafe, packed": packed, "transformers + PEFT, padded": padded}, rounds=3)
    tokens = sum(map(len, sequences))
    table = []
    for variant, taken in times.items():
        median = statistics.median(taken)
        table.append({"variant": variant, "seconds": median, "tokens/s": tokens / median})
    for row in table:
        row["ThinkSafe is faster by"] = table[0]["tokens/s"] / row["tokens/s"]
    return Result(
        "train",
        "Packing computes no padding and no logits of prompt tokens.",
        table,
        [f"{name}, random weights, {steps} steps of {_BATCH} sequences, {tokens:,} tokens, padding not counted"],
    )
