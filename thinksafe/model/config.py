"""The configuration of a decoder (sizes and options), read from a Hugging Face config.json.

One dataclass covers Qwen3, Qwen2, Llama 3 and Mistral: they differ in biases, in the norm on q and k, and in the
scaling of rotary frequencies. An option of a config.json that this decoder would compute differently is an error.
"""

from dataclasses import dataclass
from functools import cached_property

from thinksafe.errors import UserError

FAMILIES = ("qwen3", "qwen2", "llama", "mistral")
"""Values of `model_type` in a config.json that the decoder supports."""
_LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


_SIZE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of one model, or of the part of it that a process holds under tensor parallelism.

    Attributes:
        family: one of `FAMILIES`.
        intermediate_size: number of neurons in the MLP of one layer.
        num_heads: number of query heads.
        num_kv_heads: number of key-value heads, which divides num_heads.
        max_seq_len: largest number of tokens of a sequence; at most the window, if the model has sliding-window
            attention.
        rms_norm_eps: number added to the mean square in every norm.
        rope_theta: base of the rotary frequencies.
        llama3_scaling: the four parameters of Llama 3's scaling of rotary frequencies; None without scaling.
        qkv_bias: whether the projections q, k and v have biases.
        o_bias: whether the projection of attention's output has a bias.
        mlp_bias: whether the projections of the MLP have biases.
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
        """Projections (linear maps) of one layer: name -> (out features, in features, whether it has a bias)."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (q, hidden, self.qkv_bias),
            "k_proj": (kv, hidden, self.qkv_bias),
            "v_proj": (kv, hidden, self.qkv_bias),
            "o_proj": (hidden, q, self.o_bias),
            "gate_proj": (inner, hidden, self.mlp_bias),
            "up_proj": (inner, hidden, self.mlp_bias),
            "down_proj": (hidden, inner, self.mlp_bias),
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
        """Return the FLOP of q kᵀ and of the weighted sum of v in a forward pass, over all layers and heads.

        FLOP = 4 * num_layers * num_heads * head_dim * num_pairs

        Args:
            num_pairs: number of (query token, key token) pairs within the causal mask.
        """
        return 4 * self.num_layers * self.num_heads * self.head_dim * num_pairs

    @property
    def kv_elements_per_token(self) -> int:
        """Number of elements that one token adds to the key-value cache: keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @classmethod
    def from_hugging_face(cls, raw: dict, source: str) -> "ModelConfig":
        """Return the configuration that a config.json describes.

        Args:
            raw: contents of the config.json.
            source: path of the file or name of the model, for error messages.

        Raises:
            UserError: the family is not supported, a key is missing or has an invalid value, or the decoder does not
                support an option.
        """
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise UserError(f"{source}: model_type {family!r} is not supported; choose one of {', '.join(FAMILIES)}")
        _check_supported(raw, source)
        for key in _SIZE_KEYS:
            value = raw.get(key, 1)
            if type(value) is not int or value < 1:
                raise UserError(f"{source}: {key} must be a positive whole number, found {value!r}")
        try:
            num_heads = raw["num_attention_heads"]
            attention_bias = raw.get("attention_bias", False)
            max_seq_len = raw["max_position_embeddings"]
            if raw.get("sliding_window") and raw.get("use_sliding_window", family == "mistral"):
                # Within the window, sliding-window attention equals full attention, so the window limits the context.
                max_seq_len = min(max_seq_len, raw["sliding_window"])
            rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
            rope_type = rope.get("rope_type", rope.get("type", "default"))
            return cls(
                family=family,
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_layers=raw["num_hidden_layers"],
                num_heads=num_heads,
                num_kv_heads=raw.get("num_key_value_heads") or num_heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // num_heads,
                max_seq_len=max_seq_len,
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


def _check_supported(raw: dict, source: str) -> None:
    """Raise a UserError, which names `source`, if the decoder would compute an option of `raw` differently."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{source}: rope_type {rope_type!r} is not supported; use 'default' or 'llama3'")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported; only 'silu' is")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{source}: partial rotary embedding is not supported")
    if raw.get("quantization_config"):
        raise UserError(f"{source}: quantized checkpoints are not supported; use the bf16 original")
