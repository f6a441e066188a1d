#!/usr/bin/env bash
# The v2 and v3 tokenizers of Mistral put the system prompt into the last user message of a conversation, not the first.
#
# Versions: mistral-common 1.13.1 (the package ships the tokenizer files).
# Guess: the system prompt is part of the first user message, as in Llama 2 and in v1 of the same package. So the prompt
#   of turn 2 starts with the tokens of turn 1, and its cached keys and values can be used again.
# Behavior: in v2 and v3 the system prompt moves to the newest user message at every turn. Token sequences of a training
#   example with two turns differ from those of the first turn, and prefix caching of the first turn is lost.
# Output seen:
#   v1: SYSTEM in user message 1 of 2; turn 1 is a prefix of turn 2: True
#   v2: SYSTEM in user message 2 of 2; turn 1 is a prefix of turn 2: False
#   v3: SYSTEM in user message 2 of 2; turn 1 is a prefix of turn 2: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet mistral-common==1.13.1 sentencepiece==0.2.3
"$work/venv/bin/python" - 2>"$work/errors" <<'PY' || { tail -n 1 "$work/errors"; exit 1; }
import sys

from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

first = [SystemMessage(content="SYSTEM"), UserMessage(content="one")]
second = [*first, AssistantMessage(content="answer"), UserMessage(content="two")]
results = []
for version in ("v1", "v2", "v3"):
    tokenizer = getattr(MistralTokenizer, version)()
    turns = [tokenizer.encode_chat_completion(ChatCompletionRequest(messages=turn)) for turn in (first, second)]
    user_messages = turns[1].text.split("[INST]")[1:]
    number = next(index for index, text in enumerate(user_messages, 1) if "SYSTEM" in text)
    is_prefix = turns[1].tokens[: len(turns[0].tokens)] == turns[0].tokens
    print(f"{version}: SYSTEM in user message {number} of 2; turn 1 is a prefix of turn 2: {is_prefix}")
    results.append((number, is_prefix))
if results != [(1, True), (2, False), (2, False)]:
    sys.exit("changed: the place of the system prompt differs")
PY
