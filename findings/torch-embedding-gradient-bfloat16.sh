#!/usr/bin/env bash
# The gradient of a bfloat16 embedding stops at 256 occurrences of a token.
#
# Versions: torch 2.13.0, CPU.
# Guess: 1000 (or the bfloat16 number next to it) for a token that occurs 1,000 times with gradient 1 each: torch sums
#   bfloat16 in float32, as tensor.sum() and the gradient of expand() do.
# Behavior: the backward pass of torch.nn.Embedding adds in bfloat16, one occurrence at a time. 256 + 1 rounds to 256,
#   so frequent tokens (newline, padding, a think tag) get a gradient that is several times too small.
# Output seen:
#   embedding 256.0   index_add 256.0   expand 1000.0   scatter_add 1000.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import sys

import torch

torch.set_num_threads(1)
tokens = torch.zeros(1000, dtype=torch.long)
ones = torch.ones(1000, dtype=torch.bfloat16)
embedding = torch.nn.Embedding(2, 1).bfloat16()
embedding(tokens).sum().backward()
row = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
row.expand(1000).sum().backward()
results = {
    "embedding": embedding.weight.grad[0, 0].item(),
    "index_add": torch.zeros(1, dtype=torch.bfloat16).index_add_(0, tokens, ones).item(),
    "expand": row.grad.item(),
    "scatter_add": torch.zeros(1, dtype=torch.bfloat16).scatter_add_(0, tokens, ones).item(),
}
print("   ".join(f"{name} {value}" for name, value in results.items()))
if list(results.values()) != [256.0, 256.0, 1000.0, 1000.0]:
    sys.exit("changed: the sums differ")
PY
