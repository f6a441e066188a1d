"""The models and length distributions that every suite shares: real shapes with random weights."""

import numpy as np

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
    "qwen3-0.6b": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    # What a CPU can sample and train in seconds: the work per token is small, so overheads show.
    "cpu-6m": _QWEN3
    | {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}
"""Hugging Face config.json contents by name."""


def response_lengths(count: int, mean: float, longest: int, seed: int) -> list[int]:
    """Skewed as chain-of-thought is: log-normal with sigma 0.8, clipped to `longest`, at least 1 token."""
    sigma = 0.8
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(draws, 1, longest).astype(int).tolist()
