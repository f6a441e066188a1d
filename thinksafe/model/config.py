"""The configuration of a decoder (sizes and options), read from a Hugging Face config.json.

One dataclass covers Qwen3, Qwen2, Llama 3 and Mistral: they differ in biases, in the norm on q and k, and in the
scaling of rotary frequencies. A config.json means here what it means to transformers. An option that this decoder would
compute differently is an error, and so are two keys that give one option two values.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, product
from typing import Annotated, Literal, NamedTuple

from thinksafe.errors import UserError
from thinksafe.section import Bounds, Section

WeightDtype = Literal["auto", "fp8"]
"""Dtype of the layers' projections: the model's dtype (`auto`) or e4m3 (`fp8`)."""

FAMILY_DEFAULTS = {
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
}
"""What transformers takes for a missing key of a config.json, where families differ, by `model_type`."""
FAMILIES = tuple(FAMILY_DEFAULTS)
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


_ROPE_KEYS = ("rope_parameters", "rope_scaling")
"""Keys of a config.json that hold the settings of the rotary embedding, from transformers 5 on and before."""
_LLAMA3_FACTORS = {"factor": 1.0, "low_freq_factor": 1e-6, "high_freq_factor": 1e-6}
"""Numbers of Llama 3's scaling of rotary frequencies, and their smallest values."""
_UNSUPPORTED_KEYS = {
    "quantization_config": "quantized checkpoints are not supported; use the bf16 original",
    "compression_config": "quantized checkpoints are not supported; use the bf16 original",
    "per_layer_config": "layers that differ in size are not supported",
    "text_config": "models of several parts are not supported",
    "transformers_weights": "weights under another name are not supported; rename the file to model.safetensors",
}
"""Keys of a config.json that change what transformers loads, and the ends of their error messages."""
_MAX_SIZE = 2**24
"""Largest supported size of a model. The context is a size too: the table of rotary angles has a row per position."""


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
            raise UserError(
                f"{source}: model_type {family!r:.60} is not supported; choose one of {', '.join(FAMILIES)}"
            )
        keys = JsonKeys(FAMILY_DEFAULTS[family] | raw, source)
        _check_supported(keys, family)
        hidden_size, num_heads = keys.count("hidden_size"), keys.count("num_attention_heads")
        num_kv_heads = keys.count("num_key_value_heads", default=num_heads)
        head_dim = keys.count("head_dim", default=max(1, hidden_size // num_heads))
        if num_heads % num_kv_heads or head_dim % 2 or num_heads * head_dim > _MAX_SIZE:
            problem = (
                f"{num_heads} heads of {head_dim} elements, with {num_kv_heads} key-value heads, are not supported"
            )
            raise UserError(f"{source}: {problem}; key-value heads must divide heads, and elements must be even")
        rope_theta, llama3_scaling = _rope(keys)
        attention_bias = family in ("llama", "qwen3") and keys.flag("attention_bias")
        num_layers = keys.count("num_hidden_layers")
        return cls(
            family=family,
            vocab_size=keys.count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=keys.count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            # Within the window, sliding-window attention equals full attention, so the window limits the context.
            max_seq_len=min(keys.count("max_position_embeddings"), _window(keys, family, num_layers) or _MAX_SIZE),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-20, 1),
            rope_theta=rope_theta,
            llama3_scaling=llama3_scaling,
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family == "llama" and keys.flag("mlp_bias"),
            qk_norm=family == "qwen3",
            tied_head=keys.flag("tie_word_embeddings"),
        )


@dataclass(frozen=True)
class JsonKeys:
    """The keys of a JSON object. Its methods check the type of a value, and raise a UserError that names the key.

    Attributes:
        values: the object.
        source: the file, and the key of the object if it is a value itself.
    """

    values: dict
    source: str

    def error(self, key: str, problem: str) -> UserError:
        """Return the error for a key; `problem` says of its value what is wrong, such as "must be ..."."""
        if key not in self.values:
            return UserError(f"{self.source}: key {key!r} is missing")
        return UserError(f"{self.source}: {key} {problem} (found {self.values[key]!r:.60})")

    def count(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number; `default`, if there is one, for a key that is missing or null."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= _MAX_SIZE:
            raise self.error(key, f"must be a positive whole number, at most {_MAX_SIZE}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        """Return a number from `low` to `high`, which are included."""
        value = self.values.get(key)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.error(key, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return true or false; false for a missing key."""
        value = self.values.get(key, False)
        if type(value) is not bool:
            raise self.error(key, "must be true or false")
        return value


def _check_supported(keys: JsonKeys, family: str) -> None:
    """Raise a UserError if config.json describes a model that is none of `family` as the decoder computes it."""
    for key, problem in _UNSUPPORTED_KEYS.items():
        if keys.values.get(key) is not None:
            raise UserError(f"{keys.source}: {key}: {problem}")
    if keys.values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise keys.error("hidden_act", "must be silu")
    classes = keys.values.get("architectures") or [f"{family}model"]
    # FSDP in accelerate puts its name before that of the class.
    names = {str(name).lower().removeprefix("fsdp") for name in classes} if isinstance(classes, list) else {""}
    if not names <= {f"{family}forcausallm", f"{family}model"}:
        raise keys.error("architectures", f"must name the causal language model of model_type {family}")


def _window(keys: JsonKeys, family: str, num_layers: int) -> int | None:
    """Return the window of sliding-window attention, in tokens; None if every layer attends to the whole context."""
    full, sliding = "full_attention", "sliding_attention"
    kinds = keys.values.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(kind in (full, sliding) for kind in kinds)):
        raise keys.error("layer_types", f"must be a list of {full} and {sliding}")
    if kinds is not None and len(kinds) != num_layers:
        raise keys.error("layer_types", f"must have num_hidden_layers entries, {num_layers}")
    window = None if keys.values.get("sliding_window") is None else keys.count("sliding_window")
    if family == "llama" and window:
        raise keys.error("sliding_window", "is not supported for model_type llama")
    if family.startswith("qwen"):
        first_layer = keys.values.get("max_window_layers", 28)
        if type(first_layer) is not int:
            raise keys.error("max_window_layers", "must be a whole number")
        has_window = keys.flag("use_sliding_window") and (sliding in kinds if kinds else first_layer < num_layers)
        window = window if has_window else None
    if sliding in (kinds or ()) and window is None:
        raise keys.error("layer_types", "names layers with a window, but no window is set")
    return window


def _rope(keys: JsonKeys) -> tuple[float, dict | None]:
    """Return base and Llama 3 scaling of the rotary frequencies, as in the fields of `ModelConfig`."""
    objects = {key: keys.values[key] for key in _ROPE_KEYS if keys.values.get(key) not in (None, {})}
    settings = []
    for key, values in (objects or {_ROPE_KEYS[0]: {}}).items():
        if not isinstance(values, dict):
            raise keys.error(key, "must be an object")
        settings.append(_rope_settings(JsonKeys(values, f"{keys.source}: {key}"), keys))
    if any(setting != settings[0] for setting in settings):
        raise UserError(f"{keys.source}: rope_parameters and rope_scaling differ; remove what is out of date")
    return settings[0]


def _rope_settings(rope: JsonKeys, keys: JsonKeys) -> tuple[float, dict | None]:
    """Return what `_rope` does, from one of the objects for the rotary embedding and the keys beside it."""
    rope_type = rope.values.get("rope_type", rope.values.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UserError(f"{rope.source}: rope_type {rope_type!r:.60} is not supported; use 'default' or 'llama3'")
    scaling = {}
    if rope_type == "llama3":
        scaling = {key: rope.number(key, low, 1e6) for key, low in _LLAMA3_FACTORS.items()}
        scaling["original_max_position_embeddings"] = rope.count("original_max_position_embeddings")
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise rope.error("high_freq_factor", "must be larger than low_freq_factor")
    bases = [level.number("rope_theta", 1, 1e15) for level in (rope, keys) if "rope_theta" in level.values]
    settings = {"rope_theta": (bases or [10_000.0])[0], "partial_rotary_factor": 1.0} | scaling
    for key in rope.values:
        if key not in settings and key not in ("rope_type", "type"):
            raise rope.error(key, f"has no meaning for rope_type {rope_type}")
    for level, key in product((rope, keys), settings):
        if level.values.get(key) not in (None, settings[key]):
            raise level.error(key, f"must be {settings[key]:g}, or be removed")
    if rope.values.get("type", rope_type) != rope_type:
        raise rope.error("type", f"differs from rope_type, {rope_type}")
    return settings["rope_theta"], scaling or None


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
