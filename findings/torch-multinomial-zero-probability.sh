#!/usr/bin/env bash
# torch.multinomial without replacement returns classes of probability zero once the others are used up.
#
# Versions: torch 2.13.0, CPU.
# Guess: RuntimeError. The documentation says that num_samples must not exceed the number of nonzero elements of a row,
#   and a probability below zero is an error too. After top-k filtering, a token with probability zero never appears.
# Behavior: no error; the filtered classes fill the remaining places. Drawing several distinct next tokens from a
#   distribution cut by top-p returns tokens that the filter removed.
# Output seen:
#   probabilities [0.0, 0.0, 0.75, 0.25, 0.0]: two of four classes have probability 0 in 100 of 100 draws
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import sys

import torch

torch.manual_seed(0)
probabilities = torch.tensor([0.0, 0.0, 0.75, 0.25, 0.0])
try:
    draws = [torch.multinomial(probabilities, 4) for _ in range(100)]
except RuntimeError as error:
    sys.exit(f"changed: an error now: {error}")
hits = sum(int((probabilities[draw] == 0).sum() == 2) for draw in draws)
print(f"probabilities {probabilities.tolist()}: two of four classes have probability 0 in {hits} of 100 draws")
if hits != 100:
    sys.exit("changed: the draws differ")
PY
