"""The models, length distributions and hidden states that suites share: real shapes with random weights."""

import numpy as np
import torch

VOCABULARY = 151_936
"""Qwen3's."""


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }


_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "hidden_act": "silu",
}

MODELS = {
    "qwen3-0.6b": _QWEN3 | _sizes(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7b": _QWEN3 | _sizes(2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4b": _QWEN3 | _sizes(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": _QWEN3 | _sizes(4096, 12_288, 36, 32, 8, tied=False),
    "llama-3-8b": _sizes(4096, 14_336, 32, 32, 8, tied=False)
    | {
        "model_type": "llama",
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "hidden_act": "silu",
    },
    # What a CPU can sample and train in seconds: the work per token is small, so overheads show.
    "cpu-6m": _QWEN3
    | _sizes(256, 768, 6, 8, 4, tied=True)
    | {"vocab_size": 4096, "head_dim": 32, "max_position_embeddings": 2048},
}
"""Hugging Face config.json contents by name."""


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
