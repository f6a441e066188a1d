#!/usr/bin/env bash
# A byte-level tokenizer cannot decode its own added token "naïve": the ï comes back as a replacement character.
#
# Versions: tokenizers 0.23.3.
# Guess: an added token is kept as it is written, so decode gives it back; "naïve" is encoded as one token.
# Behavior: the ByteLevel decoder also runs over added tokens. A token made only of the 256 characters that stand for
#   bytes (the letters of Western Europe are among them) is decoded as bytes; one with any other character is kept.
# Output seen:
#   'a naïve b' one token True, decoded 'a na�ve b'
#   'a tőke b' one token True, decoded 'a tőke b'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3
"$work/venv/bin/python" - <<'PY'
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
words = ["na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve", "t\N{LATIN SMALL LETTER O WITH DOUBLE ACUTE}ke"]
tokenizer.add_tokens(words)
same = []
for word in words:
    text = f"a {word} b"
    encoding = tokenizer.encode(text)
    decoded = tokenizer.decode(encoding.ids)
    print(f"{text!r} one token {word in encoding.tokens}, decoded {decoded!r}")
    same.append(decoded == text)
if same != [False, True]:
    sys.exit("changed: added tokens are decoded otherwise")
PY
