#!/usr/bin/env bash
# In one config.json of transformers 5, the old key rope_scaling beats rope_parameters, the old key rope_theta loses.
#
# Versions: transformers 5.23.0, without torch.
# Guess: one rule for both. Either the new key rope_parameters holds everything and the old keys are ignored, or a
#   conflict is an error.
# Behavior: rope_scaling replaces rope_parameters, with the base of rope_parameters lost; rope_theta only fills a base
#   that rope_parameters lacks. A file that was edited for a longer context under either key can lose the edit silently.
# Output seen:
#   rope_scaling and rope_parameters: {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 10000.0}
#   rope_theta and rope_parameters:   {'rope_type': 'default', 'rope_theta': 1000000.0}
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/home" HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile transformers==5.23.0
cd "$work"
"$work/venv/bin/python" - 2>"$work/errors" <<'PY' || { tail -n 1 "$work/errors"; exit 1; }
import json
import sys

from transformers import AutoConfig

new = {"rope_type": "default", "rope_theta": 1e6}
old_keys = {
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "rope_theta": 5e5,
}
results = []
for key, value in old_keys.items():
    with open("config.json", "w") as file:
        json.dump({"model_type": "qwen3", "rope_parameters": new, key: value}, file)
    parameters = dict(AutoConfig.from_pretrained(".").rope_parameters)
    print(f"{key} and rope_parameters:".ljust(33), parameters)
    results.append(parameters)
if results != [{"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, new]:
    sys.exit("changed: the precedence differs")
PY
