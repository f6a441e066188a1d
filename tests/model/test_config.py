"""config.json: every value of every key gives the logits of transformers or one clear error; two keys never differ.

The oracle is transformers' model of the same folder.
"""

import json
import random
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import FAMILIES, make_checkpoint
from thinksafe.errors import UserError
from thinksafe.model.attention import PackedAttention, packed_positions
from thinksafe.model.config import ModelConfig
from thinksafe.model.public_configs import PUBLIC_CONFIGS
from thinksafe.model.weights import load_config, load_decoder, save_decoder

IDS = torch.arange(3, 23) * 7 % 371
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
FULL, SLIDING = "full_attention", "sliding_attention"

ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 2, 4, 16, 64, 400, 10**12, 10**400),
    *(0.0, 1.0, -1.0, 0.5, 1e-6, 1e6, 1e300, 1e-300, float("nan"), float("inf")),
    *("", "2", "silu", FULL, "bfloat16", [], [1], [FULL] * 2, [FULL, SLIDING], [SLIDING] * 3),
    *({}, PLAIN_ROPE, {"rope_type": "default"}, {"type": "linear", "factor": 2.0}, {FULL: PLAIN_ROPE}, LLAMA3),
]
KEYS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "model_type"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "architectures", "layer_types", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "rope_parameters", "rope_scaling", "rope_theta"),
    *("partial_rotary_factor", "original_max_position_embeddings", "pretraining_tp", "text_config"),
    *("quantization_config", "compression_config", "per_layer_config", "transformers_weights", "an_unknown_key"),
]
ROPE_KEYS = [*LLAMA3, "rope_theta", "type", "partial_rotary_factor", "attention_factor"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: make_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture
def checkpoint(folders, tmp_path):
    """A function that returns a copy of a family's checkpoint with changed keys of config.json; ... removes one."""

    def copy(family, **changes):
        shutil.copytree(folders[family], tmp_path / family, dirs_exist_ok=True)
        raw = json.loads((folders[family] / "config.json").read_text()) | changes
        raw = {key: value for key, value in raw.items() if value is not ...}
        (tmp_path / family / "config.json").write_text(json.dumps(raw))
        return tmp_path / family

    return copy


def logits(folder):
    """Return the decoder's logits of `IDS`, or of their beginning if the context is shorter."""
    decoder = load_decoder(folder, torch.float32, "cpu")
    length = min(len(IDS), decoder.config.max_seq_len)
    with torch.no_grad():
        hidden = decoder(IDS[:length], packed_positions([length], "cpu"), PackedAttention.of([length], "cpu"))
        return hidden @ decoder.head.T


def transformers_logits(folder, num_tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS[None, :num_tokens]).logits[0]


def assert_equal_or_error(folder):
    """Check that a checkpoint's logits are those of transformers, or that loading it is an error of one line."""
    try:
        ours = logits(folder)
    except UserError as error:
        assert str(error).startswith(str(folder)) and "\n" not in str(error) and len(str(error)) < 500
        return
    try:
        expected = transformers_logits(folder, len(ours))
    except Exception:
        return  # transformers is stricter where it cannot matter: with 1 for 1.0, or null for a default
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_values_give_equal_logits_or_an_error(checkpoint, family, fresh_seed):
    rng = random.Random(fresh_seed)
    rope = json.loads((checkpoint(family) / "config.json").read_text())["rope_parameters"]
    for _ in range(60):
        changes = {rng.choice(KEYS): rng.choice(ODD_VALUES) for _ in range(rng.choice([1, 1, 2]))}
        if rng.random() < 0.3:
            changes = {"rope_parameters": rope | {rng.choice(ROPE_KEYS): rng.choice(ODD_VALUES)}}
        assert_equal_or_error(checkpoint(family, **changes))


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_every_odd_value_gives_equal_logits_or_an_error(checkpoint, family):
    rope = json.loads((checkpoint(family) / "config.json").read_text())["rope_parameters"]
    for value in [*ODD_VALUES, ...]:
        for key in KEYS:
            assert_equal_or_error(checkpoint(family, **{key: value}))
        for key in ROPE_KEYS:
            changed = {name: entry for name, entry in (rope | {key: value}).items() if entry is not ...}
            assert_equal_or_error(checkpoint(family, rope_parameters=changed))


EQUAL = {
    "two equal objects for the rotary embedding": ("llama", {"rope_scaling": LLAMA3 | {"rope_theta": 500_000.0}}),
    "the base beside the object": ("llama", {"rope_parameters": LLAMA3, "rope_theta": 500_000.0}),
    "the base in both places": ("llama", {"rope_theta": 500_000}),
    "no rotary settings": ("qwen2", {"rope_parameters": ...}),
    "null for the older key": ("qwen3", {"rope_scaling": None, "rope_theta": 10_000.0}),
    "bias that the family never has": ("mistral", {"attention_bias": True, "mlp_bias": True}),
    "bias that the family always has": ("qwen2", {"attention_bias": False}),
    "activation by its other name": ("llama", {"hidden_act": "swish"}),
    "head size null": ("mistral", {"head_dim": None}),
    "no head size": ("qwen2", {"head_dim": ...}),
    "class without a head": ("qwen3", {"architectures": ["Qwen3Model"]}),
    "class with the prefix of FSDP": ("qwen2", {"architectures": ["FSDPQwen2ForCausalLM"]}),
    "window that no layer has": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "layers all with full attention": ("qwen2", {"layer_types": [FULL] * 2, "sliding_window": 4}),
    "key that nothing reads": ("llama", {"pretraining_tp": 2, "an_unknown_key": 3}),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equivalent_configs_give_the_logits_of_transformers(checkpoint, name):
    family, changes = EQUAL[name]
    folder = checkpoint(family, **changes)
    ours = logits(folder)
    assert len(ours) == len(IDS)
    torch.testing.assert_close(ours, transformers_logits(folder, len(IDS)), atol=1e-4, rtol=1e-4)


WINDOWS = {
    "mistral": ("mistral", {"sliding_window": 6, "use_sliding_window": False}, 6),
    "mistral by default": ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, 4096),
    "qwen, last layer": ("qwen2", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}, 6),
    "qwen, layers named": (
        "qwen3",
        {"sliding_window": 6, "use_sliding_window": True, "layer_types": [FULL, SLIDING]},
        6,
    ),
    "qwen, layers named full": (
        "qwen3",
        {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 0, "layer_types": [FULL, FULL]},
        512,
    ),
    "qwen by default": ("qwen3", {"sliding_window": 6, "use_sliding_window": ..., "max_window_layers": 0}, 512),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_context_is_the_window_of_transformers(checkpoint, name):
    family, changes, max_seq_len = WINDOWS[name]
    folder = checkpoint(family, **({"layer_types": ...} | changes))
    assert load_config(folder)[0].max_seq_len == max_seq_len
    ours = logits(folder)
    torch.testing.assert_close(ours, transformers_logits(folder, len(ours)), atol=1e-4, rtol=1e-4)


ERRORS = {
    "two objects that differ": ("llama", {"rope_scaling": PLAIN_ROPE}, "rope_parameters and rope_scaling differ"),
    "older object without the base": ("llama", {"rope_scaling": LLAMA3}, "rope_parameters and rope_scaling differ"),
    "two bases": ("qwen3", {"rope_theta": 1e6}, "rope_theta must be 10000, or be removed .found 1000000.0."),
    "two types": ("qwen3", {"rope_parameters": PLAIN_ROPE | {"type": "llama3"}}, "type differs from rope_type"),
    "scaling without a type": ("qwen3", {"rope_scaling": {"factor": 8.0}}, "rope_scaling: factor has no meaning"),
    "rotary settings by layer": ("qwen3", {"rope_parameters": {FULL: PLAIN_ROPE}}, f"{FULL} has no meaning"),
    "context before scaling": ("llama", {"original_max_position_embeddings": 16}, "original_max.* must be 64"),
    "base of zero": ("qwen3", {"rope_parameters": PLAIN_ROPE | {"rope_theta": 0}}, "rope_theta must be a number from"),
    "base that is no number": ("qwen2", {"rope_parameters": None, "rope_theta": float("nan")}, "rope_theta must be"),
    "scaling by zero": ("llama", {"rope_parameters": LLAMA3 | {"factor": 0}}, "factor must be a number from 1 to"),
    "bands in the wrong order": ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor"),
    "epsilon that is no number": ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
    "negative window": ("mistral", {"sliding_window": -4}, "sliding_window must be a positive whole number"),
    "window of zero": ("mistral", {"sliding_window": 0}, "sliding_window must be a positive whole number"),
    "window of llama": ("llama", {"sliding_window": 8}, "sliding_window is not supported for model_type llama"),
    "layers that slide without a window": ("qwen3", {"layer_types": [SLIDING] * 2}, "no window is set"),
    "text for a number": ("qwen3", {"hidden_size": "64"}, "hidden_size must be a positive whole number"),
    "fraction for a whole number": ("qwen3", {"num_hidden_layers": 2.0}, "num_hidden_layers must be a positive whole"),
    "true for a whole number": ("qwen3", {"num_key_value_heads": True}, "num_key_value_heads must be a positive whole"),
    "number for true": ("qwen3", {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
    "heads that do not divide": ("qwen3", {"num_key_value_heads": 3}, "key-value heads must divide heads"),
    "odd heads": ("qwen3", {"head_dim": 31}, "elements must be even"),
    "another class": ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, "architectures must name"),
    "class of another family": ("mistral", {"architectures": ["LlamaForCausalLM"]}, "architectures must name"),
    "parts": ("qwen3", {"text_config": {"hidden_size": 64}}, "text_config: models of several parts"),
    "single layers with other sizes": (
        "qwen3",
        {"per_layer_config": {"0": {"head_dim": 16}}},
        "per_layer_config: layers that",
    ),
    "fp8": ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantized checkpoints are not supported"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_contradiction_is_an_error_that_names_the_key(checkpoint, name):
    family, changes, message = ERRORS[name]
    folder = checkpoint(family, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_config(folder)
    assert str(caught.value).startswith(f"{folder}/config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"", b"3"], ids=len)
def test_file_that_is_no_json_object_is_an_error(checkpoint, content):
    folder = checkpoint("qwen3")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: not (valid JSON|a JSON object)"):
        load_config(folder)


def test_last_of_two_equal_keys_counts_as_in_transformers(checkpoint):
    folder = checkpoint("qwen3")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"rms_norm_eps": 0.5, "hidden_size": 7, ', 1))
    torch.testing.assert_close(logits(folder), transformers_logits(folder, len(IDS)), atol=1e-4, rtol=1e-4)


def test_saved_config_states_the_dtype_once(checkpoint, tmp_path):
    raw = json.loads((checkpoint("qwen3", torch_dtype="float16", dtype=...) / "config.json").read_text())
    save_decoder(load_decoder(checkpoint("qwen3"), torch.bfloat16, "cpu"), raw, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["dtype"] == "bfloat16" and "torch_dtype" not in saved


def test_window_of_a_public_model_does_not_cut_its_context():
    name = "allenai/wildguard"
    assert ModelConfig.from_hugging_face(PUBLIC_CONFIGS[name], name).max_seq_len == 32_768
