"""The configuration of a decoder (sizes and options), read from a Hugging Face config.json.

One dataclass covers Qwen3, Qwen2, Llama 3 and Mistral: they differ in biases, in the norm on q and k, and in the
scaling of rotary frequencies. An option of a config.json that this decoder would compute differently is an error.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Annotated, Literal, NamedTuple

from thinksafe.errors import UserError
from thinksafe.section import Bounds, Section

WeightDtype = Literal["auto", "fp8"]
"""Dtype of the layers' projections: the model's dtype (`auto`) or e4m3 (`fp8`)."""

FAMILIES = ("qwen3", "qwen2", "llama", "mistral")
"""Values of `model_type` in a config.json that the decoder supports."""


class ProjectionKind(NamedTuple):
    """A projection (linear map) of a layer, apart from its sizes: the block of transformers that holds it, names of its
    input and output (`ModelConfig.projections` has their widths), and the field of `ModelConfig` for its bias."""

    block: str
    input: str
    output: str
    bias: str

    @property
    def split_dim(self) -> int:
        """Dimension of its weight that tensor parallelism splits: 0 for outputs, 1 for inputs, which gives partial
        sums."""
        return 1 if self.output == "hidden" else 0


PROJECTIONS = {
    "q_proj": ProjectionKind("self_attn", "hidden", "q", "qkv_bias"),
    "k_proj": ProjectionKind("self_attn", "hidden", "kv", "qkv_bias"),
    "v_proj": ProjectionKind("self_attn", "hidden", "kv", "qkv_bias"),
    "o_proj": ProjectionKind("self_attn", "q", "hidden", "o_bias"),
    "gate_proj": ProjectionKind("mlp", "hidden", "inner", "mlp_bias"),
    "up_proj": ProjectionKind("mlp", "hidden", "inner", "mlp_bias"),
    "down_proj": ProjectionKind("mlp", "inner", "hidden", "mlp_bias"),
}
"""All projections of a layer by name, in the order of computation."""

PROJECTION_GROUPS = tuple(tuple(names) for _, names in groupby(PROJECTIONS, lambda name: PROJECTIONS[name][:2]))
"""Names of the projections, grouped by the tensor that they read: q, k and v; o; gate and up; down."""


_SIZE_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
}
"""Field of `ModelConfig` -> key of a config.json, a positive whole number."""
_LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of one model, or of the part of it that a process holds under tensor parallelism.

    Attributes:
        family: one of `FAMILIES`.
        intermediate_size: number of neurons in the MLP of one layer.
        num_heads, num_kv_heads: number of query heads, and of key-value heads, which divides it.
        max_seq_len: largest number of tokens of a sequence; at most the window, if the model has sliding-window
            attention.
        rms_norm_eps: number added to the mean square in every norm.
        rope_theta: base of the rotary frequencies.
        llama3_scaling: the four parameters of Llama 3's scaling of rotary frequencies; None without scaling.
        qk_norm: whether every head of q and k is normalized before the rotation.
        tied_head: whether the language-model head is the embedding matrix.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    rms_norm_eps: float
    rope_theta: float
    llama3_scaling: dict | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool

    @cached_property
    def projections(self) -> dict[str, tuple[int, int, bool]]:
        """Sizes of one layer's projections: name -> (out features, in features, whether it has a bias)."""
        width = {
            "hidden": self.hidden_size,
            "q": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "inner": self.intermediate_size,
        }
        return {
            name: (width[kind.output], width[kind.input], getattr(self, kind.bias))
            for name, kind in PROJECTIONS.items()
        }

    @property
    def layer_weights(self) -> int:
        """Number of weights in one layer's projections, without biases; a forward pass costs two FLOP for each weight
        and token."""
        return sum(out_features * in_features for out_features, in_features, _ in self.projections.values())

    @property
    def head_weights(self) -> int:
        """Number of weights in the language-model head, which is also the number in the embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Number of all parameters; a language-model head that is tied to the embedding counts once."""
        biases = sum(out_features for out_features, _, has_bias in self.projections.values() if has_bias)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        layers = self.num_layers * (self.layer_weights + biases + norms)
        return layers + self.head_weights * (1 if self.tied_head else 2) + self.hidden_size

    def attention_flop(self, num_pairs: float) -> float:
        """Return the FLOP of q kᵀ and of the weighted sum of v in a forward pass, over all layers and heads, for a
        number of (query token, key token) pairs within the causal mask: 4 FLOP per pair and element of a head."""
        return 4 * self.num_layers * self.num_heads * self.head_dim * num_pairs

    @property
    def kv_elements_per_token(self) -> int:
        """Number of elements that one token adds to the key-value cache: keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @classmethod
    def from_hugging_face(cls, raw: dict, source: str) -> "ModelConfig":
        """Return the configuration that the contents of a config.json describe.

        Raises:
            UserError: the decoder does not support the family or an option, or a key is missing or has an invalid
                value; names `source`, the file or the model.
        """
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise UserError(f"{source}: model_type {family!r} is not supported; choose one of {', '.join(FAMILIES)}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        _check_supported(raw, rope, rope_type, source)
        try:
            sizes = {field: raw[key] for field, key in _SIZE_KEYS.items()}
            attention_bias = raw.get("attention_bias", False)
            if raw.get("sliding_window") and raw.get("use_sliding_window", family == "mistral"):
                # Within the window, sliding-window attention equals full attention, so the window limits the context.
                sizes["max_seq_len"] = min(sizes["max_seq_len"], raw["sliding_window"])
            return cls(
                **sizes,
                family=family,
                num_kv_heads=raw.get("num_key_value_heads") or sizes["num_heads"],
                head_dim=raw.get("head_dim") or sizes["hidden_size"] // sizes["num_heads"],
                rms_norm_eps=raw["rms_norm_eps"],
                rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
                llama3_scaling={key: rope[key] for key in _LLAMA3_SCALING} if rope_type == "llama3" else None,
                qkv_bias=family == "qwen2" or attention_bias,
                o_bias=family in ("llama", "qwen3") and attention_bias,
                mlp_bias=raw.get("mlp_bias", False),
                qk_norm=family == "qwen3",
                tied_head=raw.get("tie_word_embeddings", False),
            )
        except KeyError as error:
            raise UserError(f"{source}: key {error} is missing") from None
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{source}: a value has the wrong type ({error})") from None


def _check_supported(raw: dict, rope: dict, rope_type: str, source: str) -> None:
    """Raise a UserError if a size is invalid, or if the decoder would compute an option of `raw` differently."""
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{source}: rope_type {rope_type!r} is not supported; use 'default' or 'llama3'")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported; only 'silu' is")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{source}: partial rotary embedding is not supported")
    if raw.get("quantization_config"):
        raise UserError(f"{source}: quantized checkpoints are not supported; use the bf16 original")
    for key in _SIZE_KEYS.values():
        value = raw.get(key, 1)
        if type(value) is not int or value < 1:
            raise UserError(f"{source}: {key} must be a positive whole number, found {value!r}")


@dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank adapters (LoRA), which add an update B A to frozen weights. The defaults are the paper's."""

    rank: Annotated[int, Bounds(ge=1)] = 32
    """Rank of the update, the number of columns of B. Higher ranks can learn more and need more memory."""
    alpha: float = 16.0
    """Scale of the update; B A is multiplied by alpha / rank."""
    dropout: Annotated[float, Bounds(ge=0, lt=1)] = 0.05
    """Share of the elements of an adapter's input that training sets to zero."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Projections that carry an adapter, any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj."""

    def check(self) -> None:
        if not self.target_modules:
            raise ValueError("target_modules: must name at least one projection")
