"""The world's tokenizer: one token for each word, Qwen3's control tokens, and a chat template like Qwen3's.

Decoding returns the words, joined by single spaces. Newlines are white space and disappear, so the template can be
written like Qwen3's without a token for them.
"""

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

UNKNOWN, END_OF_TURN, PADDING = "<unk>", "<|im_end|>", "<|endoftext|>"
SPECIAL_TOKENS = ["<|im_start|>", END_OF_TURN, PADDING]
THINK_TOKENS = ["<think>", "</think>"]  # not special, as in Qwen3: decoding keeps them

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer in which `<unk>` has id 0, the words have the next ids in order, then the control tokens."""
    vocabulary = {word: index for index, word in enumerate([UNKNOWN, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
