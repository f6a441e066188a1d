"""Configurations of public models, to estimate a run and to measure kernels before a model is downloaded.

Each entry holds the keys that the decoder reads from the model's config.json. Weights and tokenizers are not here.
"""


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool = False) -> dict:
    """Return the keys of a config.json in which models of one family differ."""
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
    "rope_theta": 1e6,
}
_QWEN2 = {"model_type": "qwen2", "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128_256, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
_LLAMA31 = _LLAMA3 | {
    "max_position_embeddings": 131_072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_MISTRAL = {
    "model_type": "mistral",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
}

PUBLIC_CONFIGS = {
    "Qwen/Qwen3-0.6B": _QWEN3 | _sizes(1024, 3072, 28, 16, 8, tied=True),
    "Qwen/Qwen3-1.7B": _QWEN3 | _sizes(2048, 6144, 28, 16, 8, tied=True),
    "Qwen/Qwen3-4B": _QWEN3 | _sizes(2560, 9728, 36, 32, 8, tied=True),
    "Qwen/Qwen3-8B": _QWEN3 | _sizes(4096, 12_288, 36, 32, 8),
    "Qwen/Qwen3-14B": _QWEN3 | _sizes(5120, 17_408, 40, 40, 8),
    "Qwen/Qwen3-32B": _QWEN3 | _sizes(5120, 25_600, 64, 64, 8),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2 | {"vocab_size": 151_936} | _sizes(1536, 8960, 28, 12, 2),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN2 | {"vocab_size": 152_064} | _sizes(3584, 18_944, 28, 28, 4),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA31 | _sizes(4096, 14_336, 32, 32, 8),
    "meta-llama/Meta-Llama-3-8B": _LLAMA3 | {"max_position_embeddings": 8192} | _sizes(4096, 14_336, 32, 32, 8),
    "meta-llama/Llama-Guard-3-8B": _LLAMA31 | _sizes(4096, 14_336, 32, 32, 8),
    "allenai/wildguard": _MISTRAL | {"vocab_size": 32_768} | _sizes(4096, 14_336, 32, 32, 8),
    "Qwen/Qwen3Guard-Gen-0.6B": _QWEN3 | _sizes(1024, 3072, 28, 16, 8, tied=True),
    "Qwen/Qwen3Guard-Gen-4B": _QWEN3 | _sizes(2560, 9728, 36, 32, 8, tied=True),
    "Qwen/Qwen3Guard-Gen-8B": _QWEN3 | _sizes(4096, 12_288, 36, 32, 8),
}
"""The entries of config.json that `ModelConfig.from_hugging_face` reads, by the model's name on the Hugging Face
hub."""
