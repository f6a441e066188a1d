#!/usr/bin/env bash
# The same tokenizer.json gives other token ids when the config.json beside it says "qwen2" instead of "llama".
#
# Versions: transformers 5.23.0, tokenizers 0.23.3, without torch.
# Guess: the ids of tokenizer.json in both cases. tokenizer_config.json names the generic class PreTrainedTokenizerFast,
#   and the file describes the whole tokenizer; the model type says nothing about it.
# Behavior: AutoTokenizer takes the class of the model type and builds normalizer and pre-tokenizer anew; only
#   vocabulary and merges are read from tokenizer.json. Here the digits split otherwise. There is no warning, and
#   decoding gives the same text: only the token ids show that a model sees sequences it was not trained on.
# Output seen:
#   llama: TokenizersBackend, ids as in tokenizer.json: True
#   qwen2: Qwen2Tokenizer, ids as in tokenizer.json: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/home" HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile transformers==5.23.0 tokenizers==0.23.3
cd "$work"
"$work/venv/bin/python" - 2>"$work/errors" <<'PY' || { tail -n 1 "$work/errors"; exit 1; }
import json
import sys

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|."), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=300,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<end>"],
    show_progress=False,
)
tokenizer.train_from_iterator(["the year 2024 and the year 1969"] * 20, trainer)
tokenizer.save("tokenizer.json")
with open("tokenizer_config.json", "w") as file:
    json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}, file)

text = "the year 2024 and 1969"
results = []
for model_type in ("llama", "qwen2"):
    with open("config.json", "w") as file:
        json.dump({"model_type": model_type}, file)
    loaded = AutoTokenizer.from_pretrained(".")
    assert loaded.decode(loaded.encode(text)) == text
    results.append(loaded.encode(text) == tokenizer.encode(text).ids)
    print(f"{model_type}: {type(loaded).__name__}, ids as in tokenizer.json: {results[-1]}")
if results != [True, False]:
    sys.exit("changed: the ids differ otherwise")
PY
