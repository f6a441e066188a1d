"""The sections of a recipe that configure the sampler: the engine, and how tokens are sampled."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from thinksafe.model.config import WeightDtype
from thinksafe.section import Bounds, Section

KV_CACHE_SHARE = 0.85
"""Share of a GPU's free memory that the page cache takes if `kv_cache_gib` is null."""
CacheDtype = Literal["auto", "fp8"]
"""Dtype of cached keys and values: the model's dtype (`auto`) or e4m3 (`fp8`)."""


@dataclass(frozen=True)
class SamplingConfig(Section):
    """How response tokens are sampled. The defaults are the paper's settings for Qwen3."""

    temperature: Annotated[float, Bounds(ge=0)] = 0.6
    """Divisor of the logits; larger values give more varied responses. 0 always takes the most likely token."""
    top_p: Annotated[float, Bounds(gt=0, le=1)] = 0.95
    """Sample only from the smallest set of most likely tokens whose probabilities, after `top_k`, add up to this value;
    1 turns this off."""
    top_k: Annotated[int, Bounds(ge=0)] = 20
    """Sample only from this number of most likely tokens; 0 turns this off."""
    max_tokens: Annotated[int, Bounds(ge=1)] = 16_384
    """Largest number of response tokens; a longer response is cut off."""
    stop_on_repetition: bool = False
    """End a response once it repeats a block of up to 256 tokens eight times in a row. This saves time, but a useful
    text may repeat a line that often too."""


@dataclass(frozen=True)
class EngineConfig(Section):
    """Batch size, memory and number formats of the engine that samples responses or runs a guard."""

    MEMORY_ONLY_FIELDS: ClassVar = ("max_num_seqs", "max_prefill_tokens", "kv_cache_gib", "tensor_parallel_size")
    """Fields that change memory use and speed, and affect responses only through rounding errors. They may change when
    a run resumes, except for `tensor_parallel_size` in batch-invariant mode."""

    max_num_seqs: Annotated[int, Bounds(ge=1)] = 256
    """Largest number of sequences that run at once on one copy of the model. More sequences use a GPU better, as long
    as the key-value cache has room for them."""
    max_prefill_tokens: Annotated[int, Bounds(ge=1)] = 8192
    """Largest number of prompt tokens in one forward pass; longer prompts are read in chunks. More tokens use a GPU
    better and need more memory for activations."""
    page_size: Annotated[int | None, Bounds(ge=1)] = None
    """Tokens per page of the key-value cache. Prompts share a common prefix in whole pages. `null` is 64 on a GPU,
    where a page of one key-value head is a tile of the kernels, and 16 on a CPU."""
    kv_cache_gib: Annotated[float | None, Bounds(gt=0)] = None
    """Size of the key-value cache in GiB, per worker. A larger cache holds more sequences at once. `null` takes 85% of
    a GPU's free memory, or 1 GiB on a CPU."""
    kv_cache_dtype: CacheDtype = "auto"
    """`auto` stores keys and values in the model's dtype. `fp8` stores them in e4m3: half the bytes of bfloat16, with
    more rounding error. Keys of models with biases on q, k and v (Qwen2, R1-Distill-Qwen) always stay in the model's
    dtype. On a GPU, `fp8` needs compute capability 8.9 or higher."""
    tensor_parallel_size: Annotated[int, Bounds(ge=1)] = 1
    """Number of GPUs that share one copy of the model, for a model that does not fit on one. That many workers form one
    group. With 1, every worker holds the whole model."""
    weight_dtype: WeightDtype = "auto"
    """`auto` keeps the weights in the model's dtype. `fp8` quantizes the layers' projections to e4m3 when they are
    loaded, and multiplies in e4m3: half the bytes and twice the speed of bfloat16, with more rounding error. Training
    never uses these weights."""
    batch_invariant: bool = False
    """Give a response the same tokens and log-probabilities, bit for bit, in every batch, in every order of the
    requests and on any number of workers with one kind of device. Results still differ between values of
    `tensor_parallel_size`. The mode is checked on the device at start-up, and matmuls get slower."""
