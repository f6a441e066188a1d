#!/usr/bin/env bash
# tiktoken drops text that the split pattern does not match; the same pattern in tokenizers keeps it.
#
# Versions: tiktoken 0.14.0, tokenizers 0.23.3.
# Guess: decode(encode(text)) == text for every pattern once the vocabulary holds all 256 bytes; text between two
#   matches is a piece as well, as with pre_tokenizers.Split of tokenizers.
# Behavior: encode() goes through the matches alone. A pattern for words and numbers loses punctuation and newlines
#   without an error. A tokenizer converted from tokenizer.json into tiktoken changes every prompt.
# Output seen:
#   tiktoken:   'Is 2+2 = 4?' -> 'Is224'
#   tokenizers: 'Is 2+2 = 4?' -> 'Is 2+2 = 4?'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tiktoken==0.14.0 tokenizers==0.23.3
"$work/venv/bin/python" - <<'PY'
import sys

import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

pattern = "[A-Za-z]+|[0-9]+"
text = "Is 2+2 = 4?"

encoding = tiktoken.Encoding(
    "bytes", pat_str=pattern, mergeable_ranks={bytes([byte]): byte for byte in range(256)}, special_tokens={}
)
from_tiktoken = encoding.decode(encoding.encode(text))

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
tokenizer.decoder = decoders.ByteLevel()
from_tokenizers = tokenizer.decode(tokenizer.encode(text).ids)

print(f"tiktoken:   {text!r} -> {from_tiktoken!r}")
print(f"tokenizers: {text!r} -> {from_tokenizers!r}")
if (from_tiktoken, from_tokenizers) != ("Is224", text):
    sys.exit("changed: the text survives otherwise")
PY
