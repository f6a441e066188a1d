"""The models, length distributions and hidden states that suites share: real shapes with random weights."""

import numpy as np
import torch

from thinksafe.model.public_configs import PUBLIC

VOCABULARY = 151_936
"""Qwen3's."""


_QWEN3 = PUBLIC["Qwen/Qwen3-0.6B"]

MODELS = {
    "qwen3-0.6b": _QWEN3,
    "qwen3-1.7b": PUBLIC["Qwen/Qwen3-1.7B"],
    "qwen3-4b": PUBLIC["Qwen/Qwen3-4B"],
    "qwen3-8b": PUBLIC["Qwen/Qwen3-8B"],
    "llama-3-8b": PUBLIC["meta-llama/Meta-Llama-3-8B"],
    "r1-distill-qwen-1.5b": PUBLIC["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"],
    # What a CPU can judge with in seconds: products outweigh attention as in an 8B model.
    "cpu-guard-14m": PUBLIC["meta-llama/Meta-Llama-3-8B"]
    | {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    # What a CPU can sample and train in seconds: the work per token is small, so overheads show.
    "cpu-6m": _QWEN3
    | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 4096, "head_dim": 32}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048},
    # So small that a CPU, like a GPU with one short sequence, waits for the host and not for products.
    "cpu-0.3m": _QWEN3
    | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "vocab_size": 512, "head_dim": 16}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
}
"""Entries of config.json by name."""
MODELS["cpu-6m-qwen2"] = MODELS["cpu-6m"] | {"model_type": "qwen2"}


def response_lengths(count: int, mean: float, longest: int, seed: int) -> list[int]:
    """Skewed as chain-of-thought is: log-normal with sigma 0.8, clipped to `longest`, at least 1 token."""
    sigma = 0.8
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(draws, 1, longest).astype(int).tolist()


def head_case(T: int, H: int, data: str, device: str, vocabulary: int = VOCABULARY) -> tuple[torch.Tensor, ...]:
    """(hidden states [T, H], head [V, H], targets [T]), bf16, as a language-model head sees them.

    `random` is noise: every token is about as likely as any other. `peaked` is what a trained model gives: a Zipf law
    over token ids, which frequent tokens lead as in a byte-pair vocabulary, and rows whose confidence in their target
    runs from none to certain.
    """
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(vocabulary, H, device=device, generator=generator) / H**0.5
    noise = torch.randn(T, H, device=device, generator=generator)
    if data == "random":
        target = torch.randint(vocabulary, (T,), device=device, generator=generator)
        return noise.bfloat16(), weight.bfloat16(), target
    log_frequency = -1.2 * torch.log(torch.arange(vocabulary, device=device) + 10.0)
    target = torch.multinomial(log_frequency.exp(), T, replacement=True, generator=generator)
    strength = torch.rand(T, 1, device=device, generator=generator) * 24
    x = 2 * noise + strength * weight[target]
    # The last hidden dimension carries the law.
    x[:, -1], weight[:, -1] = 1.0, log_frequency
    return x.bfloat16(), weight.bfloat16(), target
