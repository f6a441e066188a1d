"""Models, length distributions and hidden states that the suites share. Shapes are real, weights are random."""

import numpy as np
import torch

from thinksafe.model.public_configs import PUBLIC_CONFIGS

VOCAB_SIZE = 151_936
"""Vocabulary size of Qwen3."""

_QWEN3 = PUBLIC_CONFIGS["Qwen/Qwen3-0.6B"]

MODELS = {
    "qwen3-0.6b": _QWEN3,
    "qwen3-1.7b": PUBLIC_CONFIGS["Qwen/Qwen3-1.7B"],
    "qwen3-4b": PUBLIC_CONFIGS["Qwen/Qwen3-4B"],
    "qwen3-8b": PUBLIC_CONFIGS["Qwen/Qwen3-8B"],
    "llama-3-8b": PUBLIC_CONFIGS["meta-llama/Meta-Llama-3-8B"],
    "r1-distill-qwen-1.5b": PUBLIC_CONFIGS["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"],
    # A guard that a CPU can run in seconds: matmuls outweigh attention, as in an 8B model.
    "cpu-guard-14m": PUBLIC_CONFIGS["meta-llama/Meta-Llama-3-8B"]
    | {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 4, "vocab_size": 4096}
    | {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096},
    # A model that a CPU can sample and train in seconds: the work per token is small, so overheads are visible.
    "cpu-6m": _QWEN3
    | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 4096, "head_dim": 32}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048},
    # So small that a CPU waits for the host and not for matmuls, like a GPU with one short sequence.
    "cpu-0.3m": _QWEN3
    | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "vocab_size": 512, "head_dim": 16}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
}
"""Name of a model in the suites -> entries of its config.json."""
MODELS["cpu-6m-qwen2"] = MODELS["cpu-6m"] | {"model_type": "qwen2"}


def response_lengths(count: int, mean: float, longest: int, seed: int) -> list[int]:
    """Return `count` lengths in tokens with the skew of chain-of-thought: log-normal with sigma 0.8 and this mean, then
    clipped to 1 .. `longest`."""
    sigma = 0.8
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(draws, 1, longest).astype(int).tolist()


def head_case(T: int, H: int, data: str, device: str, vocab_size: int = VOCAB_SIZE) -> tuple[torch.Tensor, ...]:
    """Return (hidden states [T, H], weight matrix [V, H], targets [T] int64) of a language-model head, in bf16.

    With `random` data all tokens are about equally likely. `peaked` data is like that of a trained model: token
    frequencies follow a Zipf law that starts at id 0, as in a byte-pair vocabulary, and the confidence of the rows in
    their target ranges from none to certain."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(vocab_size, H, device=device, generator=generator) / H**0.5
    noise = torch.randn(T, H, device=device, generator=generator)
    if data == "random":
        target = torch.randint(vocab_size, (T,), device=device, generator=generator)
        return noise.bfloat16(), weight.bfloat16(), target
    log_frequency = -1.2 * torch.log(torch.arange(vocab_size, device=device) + 10.0)
    target = torch.multinomial(log_frequency.exp(), T, replacement=True, generator=generator)
    confidence = torch.rand(T, 1, device=device, generator=generator) * 24
    x = 2 * noise + confidence * weight[target]
    # The last hidden dimension carries the Zipf law.
    x[:, -1], weight[:, -1] = 1.0, log_frequency
    return x.bfloat16(), weight.bfloat16(), target
