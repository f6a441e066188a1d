"""Write counted time and memory on one GPU into each recipe: `python -m tools.recipe_estimates`.

The comment precedes the recipe's keys and comes from thinksafe/estimate; tests/estimate/test_estimate.py checks that it
is up to date.
"""

from pathlib import Path

from thinksafe.estimate.stages import estimate
from thinksafe.formatting import duration
from thinksafe.hardware import GPU_NAMES, hardware_named
from thinksafe.recipe.loading import load_recipe

RECIPES = Path(__file__).parents[1] / "launch" / "recipes"
RECIPE_NAMES = [
    *(f"qwen3-{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")),
    *(f"r1-distill-{model}" for model in ("qwen-1.5b", "qwen-7b", "llama-8b")),
]
"""Names of the recipes for the paper's models, without `.yaml`; the command updates these."""
_HEADER = "# Time and memory on one GPU by `thinksafe estimate`: counted, not measured; no run has confirmed them."


def estimate_comment(name: str) -> str:
    """Return the comment for a recipe: a header, then one line per GPU with time and memory, or why the run does not
    fit.

    Args:
        name: one of RECIPE_NAMES.
    """
    lines = [_HEADER]
    for gpu in GPU_NAMES:
        recipe_estimate = estimate(load_recipe(str(RECIPES / f"{name}.yaml")), hardware_named(gpu))
        if recipe_estimate.problems:
            lines.append(f"#   {gpu:<8} does not fit: {recipe_estimate.problems[0]}")
            continue
        stages_by_name = {stage.name: stage for stage in recipe_estimate.stages}
        stage_durations = ", ".join(
            f"{stage_name} {duration(stages_by_name[stage_name].seconds)}"
            for stage_name in ("generate", "filter", "train")
        )
        lines.append(
            f"#   {gpu:<8} total {duration(recipe_estimate.seconds)}: {stage_durations}; training needs "
            f"{stages_by_name['train'].peak_bytes / 2**30:.0f} GiB"
        )
    return "\n".join(lines) + "\n"


def with_estimate_comment(text: str, name: str) -> str:
    """Return the text of a recipe with its estimate comment replaced, or inserted below the opening comment.

    Args:
        text: present text of the recipe.
        name: one of RECIPE_NAMES.
    """
    before, header, after = text.partition(_HEADER + "\n")
    if not header:
        lines = text.splitlines(keepends=True)
        first_key_line = next(index for index, line in enumerate(lines) if not line.startswith("#"))
        before, after = "".join(lines[:first_key_line]), "".join(lines[first_key_line:])
    following_lines = after.splitlines(keepends=True)
    return before + estimate_comment(name) + "".join(line for line in following_lines if not line.startswith("#   "))


if __name__ == "__main__":
    for recipe in RECIPE_NAMES:
        file = RECIPES / f"{recipe}.yaml"
        file.write_text(with_estimate_comment(file.read_text(), recipe))
        print(file)
