"""Small runs of the recipe `organism` through the command line."""

import os
from pathlib import Path

from thinksafe.cli.__main__ import main
from thinksafe.paths import expand_path
from thinksafe.recipe.loading import load_recipe


def run_arguments(folder: Path, num_prompts: int, num_evaluated: int) -> list[str]:
    """Return the options of `thinksafe run`, without --out, for a small run on the first bundled prompts.

    Args:
        folder: receives copies of these prompts; created if needed.
        num_prompts: number of prompts, half of them harmful.
        num_evaluated: number of prompts in each evaluation set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe("organism")
    sets = []
    for evaluation_set in recipe.evaluation.sets:
        lines = expand_path(evaluation_set.source).read_text().splitlines(keepends=True)[:num_evaluated]
        (folder / f"{evaluation_set.name}.jsonl").write_text("".join(lines))
        sets.append(
            f"{{name: {evaluation_set.name}, source: {folder / evaluation_set.name}.jsonl, "
            f"kind: {evaluation_set.kind}, answer_matcher: {evaluation_set.answer_matcher}}}"
        )
    lines = expand_path(recipe.prompts).read_text().splitlines(keepends=True)
    harmful = [line for line in lines if '"harmful"' in line][: num_prompts // 2]
    benign = [line for line in lines if '"benign"' in line][: num_prompts - len(harmful)]
    (folder / "prompts.jsonl").write_text("".join(harmful + benign))
    changes = {
        "prompts": folder / "prompts.jsonl",
        "evaluation.sets": f"[{', '.join(sets)}]",
        "generation.num_unsteered_prompts": 3,
        "training.epochs": 2,
        "training.batch_size": 4,
        "training.checkpoint_every": 2,
        "sampler": "{max_num_seqs: 8, max_prefill_tokens: 64, kv_cache_gib: 0.02}",
    }
    return ["--recipe", "organism", *(word for key, value in changes.items() for word in ("--set", f"{key}={value}"))]


def run_pipeline(out: Path, arguments: list[str]) -> None:
    """Run all stages in this process into the run directory `out`; they must succeed."""
    assert main(["run", *arguments, "--out", str(out)]) == 0


def record_bytes(out: Path) -> int:
    """Return the number of bytes in all record files of a run directory so far, journals included."""
    total = 0
    for folder, _, files in os.walk(out):
        for name in files:
            if ".jsonl" in name:
                try:
                    total += os.stat(os.path.join(folder, name)).st_size
                except FileNotFoundError:  # renamed since `os.walk` listed it
                    total += 0
    return total
