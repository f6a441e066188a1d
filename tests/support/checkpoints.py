"""Tiny Hugging Face checkpoints of every family: random weights, and a tokenizer and chat template of the public form.

    folder = make_checkpoint("qwen3", tmp_path / "student", seed=3, num_hidden_layers=1)

The standard deviation of the weights is large: at the usual 0.02 a random model repeats its last token, and a wrong
kernel would pass. Norms and biases are random too, so that a test notices if two of them are swapped. Making a
checkpoint takes a tenth of a second.
"""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("qwen3", "qwen2", "llama", "mistral")

VOCAB_SIZE = 400
"""Vocabulary size of the model; the tokenizer has a few tokens less, as in the public checkpoints."""

_PLAIN_PIECES = 380
"""Number of pieces in a tokenizer's vocabulary, without control and think tokens; ids below it are text."""

_CORPUS = """\
The gardener waters the tulips early, before the sun climbs over the wall. Let me think: two rows of seven plants make
fourteen, and three more in the pots are seventeen. So the answer is seventeen.
How do I fold a paper boat? First fold the sheet in half, then open it again and bring both corners to the middle.
A safe ladder stands on level ground; an unsafe ladder leans on a branch. I should help the user and explain each step.
User: what is the capital of the valley of the mills? Agent: I do not know that valley, but I can describe a mill.
Okay, the user wants to know whether bread dough should rise twice. It should, because the second rise gives it air.
I cannot help with that request. Instead, here is what the conversation is about: categories, assessment and policy.
"""

# Words that are single tokens of a guard, as in the public guards: verdicts, and the numbers of categories.
_GUARD_REPLIES = """\
Harmful request: yes yes yes yes
Response refusal: no no no no
Harmful response: n/a n/a
S1 S2 S3 S4 S5 S6 S7 S8 S9 S10 S11 S12 S13 S14
Safety: Safe, Unsafe, Controversial.
Categories: None, Violent, Non-violent, Sexual, PII, Suicide, Unethical, Politically, Copyright.
Refusal: Yes. No.
"""

_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 512}
_DIMENSIONS = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.2, "rms_norm_eps": 1e-6, **_SIZES, **_ATTENTION}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # so short that each of the three bands of the scaling contains a frequency
}
_OPTIONS = {
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "llama": {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False},
}

# family -> special tokens: beginning of a text (or None), end of a turn, padding (or None), and the others
_CONTROL_TOKENS = {
    "qwen3": (None, "<|im_end|>", "<|endoftext|>", ["<|im_start|>"]),
    "qwen2": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", None, ["<｜User｜>", "<｜Assistant｜>"]),
    "llama": ("<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "mistral": ("<s>", "</s>", None, ["[INST]", "[/INST]"]),
}
_THINK_TOKENS = {"qwen3": ["<think>", "</think>"], "qwen2": ["<think>", "</think>"]}

_TEMPLATES = {
    "qwen3": """\
{%- for turn in messages -%}
{%- set text = turn.content.split('</think>')[-1].lstrip('\\n') if turn.role == 'assistant' else turn.content -%}
{{- '<|im_start|>' + turn.role + '\\n' + text + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}""",
    "qwen2": """\
{{- bos_token -}}
{%- for turn in messages -%}
{%- if turn.role == 'user' -%}{{- '<｜User｜>' + turn.content -}}
{%- else -%}{{- '<｜Assistant｜>' + turn.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}""",
    "llama": """\
{{- bos_token -}}
{%- for turn in messages -%}
{{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' + turn.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}""",
    "mistral": """\
{{- bos_token -}}
{%- for turn in messages -%}
{%- if turn.role == 'user' -%}{{- '[INST] ' + turn.content + ' [/INST]' -}}
{%- else -%}{{- ' ' + turn.content + eos_token -}}{%- endif -%}
{%- endfor -%}""",
}

_QWEN3GUARD_TEMPLATE = """\
{{- '<|im_start|>user\\nTask: Check the last message by the policy.\\n\\n<BEGIN CONVERSATION>\\n\\n' -}}
{%- for turn in messages -%}
{{- turn.role | upper + ': ' + turn.content.split('</think>')[-1] + '\\n\\n' -}}
{%- endfor -%}
{{- '<END CONVERSATION><|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' -}}"""


def make_checkpoint(family: str, folder: Path, seed: int = 0, **overrides) -> Path:
    """Write a checkpoint as `save_pretrained` does: fp32 weights, config, tokenizer, template, generation config.

    Args:
        family: one of FAMILIES; qwen2 has a tokenizer like R1-Distill's.
        seed: seed of the weights.
        overrides: entries of the config, such as `num_hidden_layers=1` or `tie_word_embeddings=True`.

    Returns:
        The folder.
    """
    tokenizer = make_tokenizer(family)
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = make_model(family, seed, **{**ids, **overrides})
    model.save_pretrained(folder)
    eos_token_ids = [tokenizer.eos_token_id] + ([tokenizer.pad_token_id] if family in ("qwen3", "llama") else [])
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=eos_token_ids, pad_token_id=tokenizer.pad_token_id
    )
    generation.save_pretrained(folder)
    return Path(folder)


def make_llama_guard(folder: Path, seed: int = 0, **overrides) -> Path:
    """Write a checkpoint for Llama Guard's format, with enough context for its prompt, and return its folder.

    Its verdicts are random. The arguments of this and the next two functions are those of `make_checkpoint`.
    """
    return _make_guard("llama", folder, seed, overrides)


def make_wildguard(folder: Path, seed: int = 0, **overrides) -> Path:
    """Write a checkpoint for WildGuard's format, with a vocabulary like Mistral's, and return its folder."""
    return _make_guard("mistral", folder, seed, overrides)


def make_qwen3guard(folder: Path, seed: int = 0, **overrides) -> Path:
    """Write a checkpoint for Qwen3Guard's format, whose chat template puts the policy around two turns.

    Returns:
        The folder.
    """
    _make_guard("qwen3", folder, seed, overrides)
    (folder / "chat_template.jinja").write_text(_QWEN3GUARD_TEMPLATE)
    return folder


def _make_guard(family: str, folder: Path, seed: int, overrides: dict) -> Path:
    make_checkpoint(family, folder, seed, **{"max_position_embeddings": 4096, **overrides})
    make_tokenizer(family, _GUARD_REPLIES).save_pretrained(folder)
    return Path(folder)


def make_model(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """Return a transformers model with random weights, in fp32 and in evaluation mode; nothing is written.

    Args:
        family, seed, overrides: as for `make_checkpoint`.
    """
    config = AutoConfig.for_model(family, **{**_DIMENSIONS, **_OPTIONS[family], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.2)
    return model


def make_tokenizer(family: str, frequent_text: str = "") -> PreTrainedTokenizerFast:
    """Return a tokenizer with the family's control tokens and pre-processing, and merges from a few harmless sentences.

    Args:
        family: one of FAMILIES.
        frequent_text: text whose words become single tokens.
    """
    lines = _CORPUS.splitlines() + frequent_text.splitlines() * 50
    bos_token, eos_token, pad_token, other_tokens = _CONTROL_TOKENS[family]
    special_tokens = [token for token in (bos_token, eos_token, pad_token, *other_tokens) if token]
    if family == "mistral":
        backend = _sentencepiece_tokenizer(special_tokens, lines)
    else:
        backend = _byte_level_tokenizer(lines)
        if family == "qwen3":
            backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    think_tokens = _THINK_TOKENS.get(family, [])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in think_tokens])
    if bos_token:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", special_tokens=[(bos_token, backend.token_to_id(bos_token))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos_token,
        eos_token=eos_token,
        pad_token=pad_token or eos_token,
        chat_template=_TEMPLATES[family],
        clean_up_tokenization_spaces=False,
    )


def _byte_level_tokenizer(lines: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_PLAIN_PIECES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def _sentencepiece_tokenizer(special_tokens: list[str], lines: list[str]) -> Tokenizer:
    """Return a tokenizer like those converted from sentencepiece: its vocabulary starts with the control tokens,
    followed by all bytes."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    num_merged_pieces = _PLAIN_PIECES - len(bytes_) - len(special_tokens)
    learner.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=num_merged_pieces, show_progress=False))
    bpe_model = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", *special_tokens, *bytes_, *bpe_model["vocab"]]
    vocabulary = {piece: id_ for id_, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in bpe_model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
