"""The world's tokenizer: one token a word, Qwen3's control tokens, and a chat template of the same shape as Qwen3's.

Decoding gives the words back, joined by single spaces. Newlines are white space like any other and vanish, so the
template can be written as Qwen3's is without a token for them. Control tokens are added tokens, no words of the
vocabulary, so a tokenizer that is told to treat text as data reads `<|im_end|>` in a prompt as `<unk>`.

Nothing here knows what the words mean.
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
    """Args: words: the vocabulary, without control tokens, in the order of their ids (after `<unk>`, which is 0)."""
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
